"""GLA-2: two latent heads, each read by half of the query heads (paper, 2.9 B).

    python train.py configs/gla_2.py

Parameters  2,872,630,272 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository)
Wall time   not run
Result      perplexity 9.249 on FineWeb-Edu, 13.779 mean of seven corpora; 58.30 % zero-shot mean (from the paper)
"""

import mlra_jax as mlra

from ._paper import paper_config


def get_config() -> mlra.TrainConfig:
    return paper_config(
        "gla_2",
        attention=mlra.LatentAttentionConfig(
            n_latent_heads=2,
            n_branches=1,
            q_lora_rank=1024,
            kv_lora_rank=512,
            d_nope=128,
            d_rope=64,
        ),
        d_ff=10048,
    )
