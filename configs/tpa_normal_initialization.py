"""TPA with output projections that start normal, not zero: an ablation (paper, 2.9 B).

    python train.py configs/tpa_normal_initialization.py

Parameters  2,873,183,232 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 14.478 mean of seven corpora (from the paper)
"""

from . import tpa
from ._paper import normal_initialization

get_config = normal_initialization(tpa.get_config)
