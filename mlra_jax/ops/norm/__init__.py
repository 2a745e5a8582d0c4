"""The residual sum and the norm of what it gives, in one kernel where there is one."""

from mlra_jax.ops.norm.api import add_rms_norm

__all__ = ["add_rms_norm"]
