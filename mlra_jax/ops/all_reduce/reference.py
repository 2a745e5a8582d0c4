"""The sum over devices by `psum`."""

from __future__ import annotations

from typing import Any

import jax

from mlra_jax.ops.norm import add_rms_norm


def fitting(workspace: Any, rows: int) -> None:
    """See `mlra_jax.ops.all_reduce.fitting`: `psum` needs no workspace."""
    del workspace, rows


def all_reduce(y: jax.Array, workspace: Any, *, axis: str | tuple[str, ...]) -> jax.Array:
    """See `mlra_jax.ops.all_reduce.all_reduce`."""
    del workspace
    return jax.lax.psum(y, axis)


def all_reduce_add_rms_norm(
    x: jax.Array, y: jax.Array, gain: jax.Array, workspace: Any, *, axis: str, eps: float, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """See `mlra_jax.ops.all_reduce.all_reduce_add_rms_norm`."""
    return add_rms_norm(x, all_reduce(y, workspace, axis=axis).astype(dtype), gain, eps=eps)
