"""MHA: every query head has its own key-value head (paper, 2.9 B).

    python train.py configs/mha.py  # 2,872,593,408 parameters (counted from the shapes)

Hardware    8 x H100 80 GB (from the paper's repository). Wall time: not run
Result      perplexity 9.434 on FineWeb-Edu, 13.860 mean of seven corpora; 57.81 % zero-shot mean (from the paper)
"""

from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.config import TrainConfig

from ._paper import paper_config


def get_config() -> TrainConfig:
    return paper_config("mha", GroupedAttentionConfig(n_kv_heads=24, d_head=128), d_ff=8192)
