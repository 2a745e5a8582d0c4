"""MLRA-4 with a gate on the heads' output (paper, 2.9 B).

    python train.py configs/mlra_4_gated.py

Parameters  2,873,220,096 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 13.621 mean of seven corpora (from the paper)
"""

from . import mlra_4
from ._paper import gated

get_config = gated(mlra_4.get_config)
