"""MLRA-4: each query head sums four latent heads; the cache splits over four devices (paper, 2.9 B).

    python train.py configs/mlra_4.py  # 2,873,220,096 parameters (counted from the shapes)

Hardware    8 x H100 80 GB (from the paper's repository). Wall time: not run
Result      perplexity 9.193 on FineWeb-Edu, 13.672 mean of seven corpora; 58.84 % zero-shot mean (from the paper)
"""

from mlra_jax.config import TrainConfig

from ._paper import latent_attention, paper_config


def get_config() -> TrainConfig:
    return paper_config("mlra_4", latent_attention(n_latent_heads=4, n_branches=4), d_ff=9880)
