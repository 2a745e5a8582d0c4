"""Decode attention on Ampere, Ada and Hopper GPUs in Triton, called through jax-triton.

Flash decoding: the tokens of each row are split over programs, each leaves an output and a log-sum-exp, and a second
kernel merges those.
"""

from mlra_jax.ops.decode.triton.back_end import Triton
from mlra_jax.ops.decode.triton.config import Config

__all__ = ["Config", "Triton"]
