"""TPA with output projections that start normal, not zero: an ablation (paper, 2.9 B).

    python train.py configs/tpa_normal_initialization.py  # 2,873,183,232 parameters (counted from the shapes)

Hardware    8 x H100 80 GB (from the paper's repository). Wall time: not run
Result      perplexity 14.478 mean of seven corpora (from the paper)
"""

from mlra_jax.config import TrainConfig

from . import tpa
from ._paper import normal_initialization


def get_config() -> TrainConfig:
    return normal_initialization(tpa.get_config())
