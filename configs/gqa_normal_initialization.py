"""GQA with output projections that start normal, not zero: an ablation (paper, 2.9 B).

    python train.py configs/gqa_normal_initialization.py

Parameters  2,872,593,408 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      not run
"""

from . import gqa
from ._paper import normal_initialization

get_config = normal_initialization(gqa.get_config)
