"""GLA-2: two latent heads, each read by half of the query heads (paper, 2.9 B).

    python train.py configs/gla_2.py  # 2,872,630,272 parameters (counted from the shapes)

Hardware    8 x H100 80 GB (from the paper's repository). Wall time: not run
Result      perplexity 9.249 on FineWeb-Edu, 13.779 mean of seven corpora; 58.30 % zero-shot mean (from the paper)
"""

from mlra_jax.config import TrainConfig

from ._paper import latent_attention, paper_config


def get_config() -> TrainConfig:
    return paper_config("gla_2", latent_attention(n_latent_heads=2, n_branches=1), d_ff=10048)
