"""Causal attention and its gradients on Hopper GPUs in Pallas Mosaic GPU."""

from mlra_jax.ops.attention.mosaic_gpu.back_end import MosaicGPU
from mlra_jax.ops.attention.mosaic_gpu.config import Config

__all__ = ["Config", "MosaicGPU"]
