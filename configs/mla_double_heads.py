"""MLA with 48 query heads: an ablation (paper, 2.9 B).

    python train.py configs/mla_double_heads.py

Parameters  2,873,232,384 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 13.836 mean of seven corpora (from the paper)
"""

from . import mla
from ._paper import double_heads

get_config = double_heads(mla.get_config, d_ff=7320)
