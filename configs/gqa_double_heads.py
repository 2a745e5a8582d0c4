"""GQA with 48 query heads: an ablation (paper, 2.9 B).

    python train.py configs/gqa_double_heads.py

Parameters  2,872,593,408 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 14.213 mean of seven corpora (from the paper)
"""

from . import gqa
from ._paper import double_heads

get_config = double_heads(gqa.get_config, d_ff=7680)
