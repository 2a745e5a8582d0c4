"""MHA with output projections that start normal, not zero: an ablation (paper, 2.9 B).

    python train.py configs/mha_normal_initialization.py  # 2,872,593,408 parameters (counted from the shapes)

Hardware    8 x H100 80 GB (from the paper's repository). Wall time: not run
Result      perplexity 14.094 mean of seven corpora (from the paper)
"""

from mlra_jax.config import TrainConfig

from . import mha
from ._paper import normal_initialization


def get_config() -> TrainConfig:
    return normal_initialization(mha.get_config())
