"""The public ops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from mlra_jax.ops import device
from mlra_jax.ops.all_reduce import reference
from mlra_jax.ops.all_reduce.workspace import Workspace
from mlra_jax.ops.back_end import BackEnd, Function, Lazy
from mlra_jax.ops.dispatch import Implementation, dispatch

_MODULE = "mlra_jax.ops.all_reduce.mosaic_gpu"
ALL_REDUCE: Mapping[str, BackEnd] = {
    "mosaic_gpu": Lazy(_MODULE, "AllReduce", device.require_hopper),
    "reference": Function(reference.all_reduce),
}
ALL_REDUCE_ADD_RMS_NORM: Mapping[str, BackEnd] = {
    "mosaic_gpu": Lazy(_MODULE, "AllReduceAddRMSNorm", device.require_hopper),
    "reference": Function(reference.all_reduce_add_rms_norm),
}
"""Back ends, in order of preference."""
_FITTING: Mapping[str, BackEnd] = {
    "mosaic_gpu": Lazy(_MODULE, "Fitting", device.require_hopper),
    "reference": Function(reference.fitting),
}


def fitting(workspace: Workspace | None, rows: int) -> Workspace | None:
    """The workspace through which `all_reduce_add_rms_norm` exchanges so many rows of a model; None: `psum` does.

    For callers that leave sums to the op only where its kernel runs. It is chosen, logged and explained as the op is.

    Args:
      workspace: of the model, if it has one.
      rows: on each device.

    Raises:
      NotImplementedError: `choose` names the kernel alone, and it declines.
    """
    return dispatch("all_reduce_add_rms_norm", _FITTING, None, workspace, rows)


def all_reduce(
    y: Float[Array, "*rows D"],
    workspace: Workspace | None = None,
    *,
    axis: str | tuple[str, ...],
    implementation: Implementation = None,
) -> Float[Array, "*rows D"]:
    """psum(y), on each device; inside `shard_map(check_vma=False)`.

    Args:
      y: float32, this device's part of the sum.
      workspace: this device's part of one made by `Workspace.create`; None: `psum` exchanges.
      axis: mesh axis of the devices, or several, among which `psum` sums.
      implementation: a name in `ALL_REDUCE`, or a back end, or several to be tried in order; None: the first that takes
        the call.

    Raises:
      NotImplementedError: the named implementation does not take these arguments.
    """
    if not isinstance(axis, str) and len(axis) == 1:
        (axis,) = axis
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
    implementation: Implementation = None,
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
      implementation: see `all_reduce`; the names are those in `ALL_REDUCE_ADD_RMS_NORM`.

    Returns:
      The sum in float32, and its norm in `dtype`.

    Raises:
      NotImplementedError: the named implementation does not take these arguments.
    """
    options = {"axis": axis, "eps": eps, "dtype": dtype}
    return dispatch(
        "all_reduce_add_rms_norm", ALL_REDUCE_ADD_RMS_NORM, implementation, x, y, gain, workspace, **options
    )
