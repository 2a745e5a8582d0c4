"""GQA with a gate on the heads' output (paper, 2.9 B).

    python train.py configs/gqa_gated.py

Parameters  2,872,593,408 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 13.806 mean of seven corpora (from the paper)
"""

from . import gqa
from ._paper import gated

get_config = gated(gqa.get_config)
