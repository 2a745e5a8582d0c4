"""TPA: queries, keys and values from few factors; those of keys and values are cached (paper, 2.9 B).

    python train.py configs/tpa.py

Parameters  2,873,183,232 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 9.333 on FineWeb-Edu, 13.985 mean of seven corpora; 57.87 % zero-shot mean (from the paper)
"""

import mlra_jax as mlra

from ._paper import paper_config

get_config = paper_config(
    "tpa", attention=mlra.TensorProductAttentionConfig(rank=2, q_rank=6, d_head=128), d_ff=10760
)
