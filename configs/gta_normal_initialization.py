"""GTA with output projections that start normal, not zero: an ablation (paper, 2.9 B).

    python train.py configs/gta_normal_initialization.py  # 2,872,003,584 parameters (counted from the shapes)

Hardware    8 x H100 80 GB (from the paper's repository). Wall time: not run
Result      not run
"""

from mlra_jax.config import TrainConfig

from . import gta
from ._paper import normal_initialization


def get_config() -> TrainConfig:
    return normal_initialization(gta.get_config())
