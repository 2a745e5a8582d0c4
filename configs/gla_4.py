"""GLA-4: four latent heads, each read by a quarter of the query heads (paper, 2.9 B).

    python train.py configs/gla_4.py  # 2,873,220,096 parameters (counted from the shapes)

Hardware    8 x H100 80 GB (from the paper's repository). Wall time: not run
Result      perplexity 9.307 on FineWeb-Edu, 13.815 mean of seven corpora; 58.19 % zero-shot mean (from the paper)
"""

from mlra_jax.config import TrainConfig

from ._paper import latent_attention, paper_config


def get_config() -> TrainConfig:
    return paper_config("gla_4", latent_attention(n_latent_heads=4, n_branches=1), d_ff=10136)
