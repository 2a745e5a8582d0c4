"""The residual sum and its RMS norm, in one kernel where there is one."""

from mlra_jax.ops.norm.api import add_rms_norm

__all__ = ["add_rms_norm"]
