"""Skinny GEMM on Hopper GPUs: a Pallas Mosaic GPU kernel that reads the matrix once."""

from mlra_jax.ops.skinny_gemm.mosaic_gpu.back_end import MosaicGPU
from mlra_jax.ops.skinny_gemm.mosaic_gpu.config import Config

__all__ = ["Config", "MosaicGPU"]
