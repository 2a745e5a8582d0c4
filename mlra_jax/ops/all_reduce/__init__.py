"""Sums over devices, alone or with what follows in a layer: the residual sum, and the norm of that."""

from mlra_jax.ops.all_reduce.api import all_reduce, all_reduce_add_rms_norm, fitting
from mlra_jax.ops.all_reduce.workspace import Workspace

__all__ = ["Workspace", "all_reduce", "all_reduce_add_rms_norm", "fitting"]
