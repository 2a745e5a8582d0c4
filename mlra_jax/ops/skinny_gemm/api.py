"""The public ops: skinny GEMM (few rows times a large matrix), and the same with the MLP's gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from mlra_jax.ops import device
from mlra_jax.ops.back_end import BackEnd, Function, Lazy
from mlra_jax.ops.dispatch import Implementation, dispatch
from mlra_jax.ops.skinny_gemm import reference

_KERNEL = Lazy("mlra_jax.ops.skinny_gemm.mosaic_gpu", "MosaicGPU", device.require_hopper)
SKINNY_GEMM: Mapping[str, BackEnd] = {
    "mosaic_gpu": _KERNEL,
    "reference": Function(reference.skinny_gemm),
}
"""Back ends of `skinny_gemm`, in order of preference."""
SWIGLU: Mapping[str, BackEnd] = {
    "mosaic_gpu": _KERNEL,
    "reference": Function(reference.swiglu),
}
"""Back ends of `swiglu`, in order of preference."""


def has_kernel(rows: int, dtype: jnp.dtype) -> bool:
    """Whether a kernel on the current device multiplies so many rows of this type with a large matrix."""
    try:
        kernel: Any = _KERNEL.load()
        return kernel.takes_rows(rows, dtype)
    except NotImplementedError:
        return False


def skinny_gemm(
    x: Float[Array, "N K"],
    w: Float[Array, "F K"],
    *,
    dtype: Any = None,
    implementation: Implementation = None,
) -> Float[Array, "N F"]:
    """x w^T, summed in float32.

    Args:
      x: rows.
      w: in the type of `x`; K is the last axis, so that each row of `w` is contiguous.
      dtype: of the result; None: that of `x`.
      implementation: a name in `SKINNY_GEMM`, or a back end, or several to be tried in order; None: as `choose` says,
        or the first that takes the call.

    Raises:
      NotImplementedError: the named implementation does not take these arguments.
    """
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    return dispatch("skinny_gemm", SKINNY_GEMM, implementation, x, w, dtype=dtype)


def swiglu(
    x: Float[Array, "N K"],
    w: Float[Array, "2 F K"],
    *,
    implementation: Implementation = None,
) -> Float[Array, "N F"]:
    """silu(x w[0]^T) * (x w[1]^T), computed in float32, in the type of `x`.

    Args:
      x: rows.
      w: matrices of gate and up, in the type of `x`; see `skinny_gemm`.
      implementation: see `skinny_gemm`; the names are those in `SWIGLU`.

    Raises:
      NotImplementedError: the named implementation does not take these arguments.
    """
    return dispatch("swiglu", SWIGLU, implementation, x, w)
