"""The public ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from mlra_jax.ops.all_reduce import reference
from mlra_jax.ops.all_reduce.workspace import Workspace
from mlra_jax.ops.dispatch import chosen, dispatch, lazily

ALL_REDUCE: Mapping[str, Callable[..., jax.Array]] = {
    "mosaic_gpu": lazily("mlra_jax.ops.all_reduce.mosaic_gpu", "all_reduce"),
    "reference": reference.all_reduce,
}
ALL_REDUCE_ADD_RMS_NORM: Mapping[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "mosaic_gpu": lazily("mlra_jax.ops.all_reduce.mosaic_gpu", "all_reduce_add_rms_norm"),
    "reference": reference.all_reduce_add_rms_norm,
}
"""Back ends, best first."""


def fitting(workspace: Workspace | None, rows: int) -> Workspace | None:
    """`workspace`, if a kernel on the current device exchanges so many rows through it, else None."""
    if workspace is None or chosen("all_reduce_add_rms_norm") == "reference":
        return None
    declines = lazily("mlra_jax.ops.all_reduce.mosaic_gpu", "declines")
    return None if declines(rows, workspace.width, workspace) else workspace


def all_reduce(
    y: Float[Array, "*rows D"],
    workspace: Workspace | None = None,
    *,
    axis: str,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "*rows D"]:
    """psum(y), on each device; inside `shard_map(check_vma=False)`.

    Args:
      y: float32, this device's part of the sum.
      workspace: this device's part of one made by `Workspace.create`; None: `psum` exchanges.
      axis: mesh axis of the devices.
      implementation: None (the first that takes the arguments), or one name or several of `ALL_REDUCE`.

    Raises:
      NotImplementedError: the named implementation does not take these arguments.
    """
    return dispatch("all_reduce", ALL_REDUCE, implementation, y, workspace, axis=axis)


def all_reduce_add_rms_norm(
    x: Float[Array, "*rows D"],
    y: Float[Array, "*rows D"],
    gain: Float[Array, "D"],
    workspace: Workspace | None = None,
    *,
    axis: str,
    eps: float,
    dtype: Any,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows D"]]:
    """x + psum(y), and its root-mean-square norm times a gain, on each device; inside `shard_map(check_vma=False)`.

    Args:
      x: float32, the residual stream, the same on all devices.
      y: float32, this device's part of the sum. The sum is float32, and rounded to `dtype`.
      gain: of the norm.
      workspace: this device's part of one made by `Workspace.create`; None: `psum` exchanges.
      axis: mesh axis of the devices.
      eps: added to the mean square.
      dtype: of the norm.
      implementation: None (the first that takes the arguments), or one name or several of `ALL_REDUCE_ADD_RMS_NORM`.

    Returns:
      The sum in float32, and its norm in `dtype`.

    Raises:
      NotImplementedError: the named implementation does not take these arguments.
    """
    options = {"axis": axis, "eps": eps, "dtype": dtype}
    return dispatch(
        "all_reduce_add_rms_norm", ALL_REDUCE_ADD_RMS_NORM, implementation, x, y, gain, workspace, **options
    )
