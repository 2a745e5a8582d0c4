"""GLA-2 with 48 query heads: an ablation (paper, 2.9 B).

    python train.py configs/gla_2_double_heads.py

Parameters  2,873,220,096 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 13.851 mean of seven corpora (from the paper)
"""

from . import gla_2
from ._paper import double_heads

get_config = double_heads(gla_2.get_config, d_ff=8344)
