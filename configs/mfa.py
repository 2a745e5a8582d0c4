"""MFA: one key-value head, 256 wide, and queries of low rank (paper, 2.9 B).

    python train.py configs/mfa.py  # 2,873,232,384 parameters (counted from the shapes)

Hardware    8 x H100 80 GB (from the paper's repository). Wall time: not run
Result      perplexity 9.506 on FineWeb-Edu, 14.315 mean of seven corpora; 58.53 % zero-shot mean (from the paper)
"""

from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.config import TrainConfig

from ._paper import paper_config


def get_config() -> TrainConfig:
    return paper_config("mfa", GroupedAttentionConfig(n_kv_heads=1, d_head=256, q_lora_rank=2048), d_ff=8024)
