"""MLRA-2 without its scales: an ablation (paper, 2.9 B).

    python train.py configs/mlra_2_no_scale.py

Parameters  2,872,630,272 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 13.808 mean of seven corpora (from the paper)
"""

from . import mlra_2
from ._paper import no_scale

get_config = no_scale(mlra_2.get_config)
