"""GLA-2 with a gate on the heads' output (paper, 2.9 B).

    python train.py configs/gla_2_gated.py

Parameters  2,872,630,272 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 13.701 mean of seven corpora (from the paper)
"""

from . import gla_2
from ._paper import gated

get_config = gated(gla_2.get_config)
