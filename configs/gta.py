"""GTA: six tied heads, each key and value at once, and half a rotary key for all (paper, 2.9 B).

    python train.py configs/gta.py

Parameters  2,872,003,584 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 9.346 on FineWeb-Edu, 13.972 mean of seven corpora; 57.80 % zero-shot mean (from the paper)
"""

import mlra_jax as mlra

from ._paper import paper_config

get_config = paper_config("gta", attention=mlra.TiedAttentionConfig(n_tied_heads=6, d_head=128), d_ff=9960)
