"""Decode attention on TPU: a Pallas Mosaic kernel over a feature-major cache."""

from mlra_jax.ops.decode.mosaic_tpu.back_end import MosaicTPU
from mlra_jax.ops.decode.mosaic_tpu.config import Config

__all__ = ["Config", "MosaicTPU"]
