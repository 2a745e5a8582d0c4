"""MLA with a gate on the heads' output (paper, 2.9 B).

    python train.py configs/mla_gated.py

Parameters  2,872,052,736 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 13.642 mean of seven corpora (from the paper)
"""

from . import mla
from ._paper import gated

get_config = gated(mla.get_config)
