"""Decode and prefill attention on Hopper GPUs: a Pallas Mosaic GPU kernel that reads the cache once."""

from mlra_jax.ops.decode.mosaic_gpu.back_end import MosaicGPU
from mlra_jax.ops.decode.mosaic_gpu.config import Config

__all__ = ["Config", "MosaicGPU"]
