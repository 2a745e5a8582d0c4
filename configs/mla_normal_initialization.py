"""MLA with output projections that start normal, not zero: an ablation (paper, 2.9 B).

    python train.py configs/mla_normal_initialization.py

Parameters  2,872,052,736 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 13.927 mean of seven corpora (from the paper)
"""

from . import mla
from ._paper import normal_initialization

get_config = normal_initialization(mla.get_config)
