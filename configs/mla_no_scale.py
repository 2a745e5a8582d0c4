"""MLA without its scales: an ablation (paper, 2.9 B).

    python train.py configs/mla_no_scale.py

Parameters  2,872,052,736 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 13.779 mean of seven corpora (from the paper)
"""

from . import mla
from ._paper import no_scale

get_config = no_scale(mla.get_config)
