"""MLRA-2: each query head sums two of four latent heads; the cache splits over four devices (paper, 2.9 B).

    python train.py configs/mlra_2.py  # 2,872,630,272 parameters (counted from the shapes)

Hardware    8 x H100 80 GB (from the paper's repository). Wall time: not run
Result      perplexity 9.242 on FineWeb-Edu, 13.804 mean of seven corpora; 58.68 % zero-shot mean (from the paper)
"""

from mlra_jax.config import TrainConfig

from ._paper import latent_attention, paper_config


def get_config() -> TrainConfig:
    return paper_config("mlra_2", latent_attention(n_latent_heads=4, n_branches=2), d_ff=10048)
