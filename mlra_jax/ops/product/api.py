"""The public ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlra_jax.ops.dispatch import dispatch, lazily
from mlra_jax.ops.product import reference

PRODUCT: Mapping[str, Callable[..., jax.Array]] = {
    "mosaic_gpu": lazily("mlra_jax.ops.product.mosaic_gpu", "product"),
    "reference": reference.product,
}
SWIGLU: Mapping[str, Callable[..., jax.Array]] = {
    "mosaic_gpu": lazily("mlra_jax.ops.product.mosaic_gpu", "swiglu"),
    "reference": reference.swiglu,
}
"""Back ends in the order in which they are tried."""


def has_kernel(rows: int, dtype: jnp.dtype) -> bool:
    """Whether a kernel on the current device multiplies so many rows of this type with a large matrix."""
    try:
        return lazily("mlra_jax.ops.product.mosaic_gpu", "takes_rows")(rows, dtype)
    except NotImplementedError:
        return False


def product(
    x: Float[Array, "N K"],
    w: Float[Array, "F K"],
    *,
    dtype: Any = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "N F"]:
    """x w^T, summed in float32.

    Args:
      x: rows.
      w: in the type of `x`, what is summed over last.
      dtype: of the result; None: that of `x`.
      implementation: None (as `choose` says, or the first that takes the arguments), or one name or several of
        `PRODUCT`.

    Raises:
      NotImplementedError: the named implementation does not take these arguments.
    """
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    return dispatch("product", PRODUCT, implementation, x, w, dtype=dtype)


def swiglu(
    x: Float[Array, "N K"],
    w: Float[Array, "2 F K"],
    *,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "N F"]:
    """silu(x w[0]^T) * (x w[1]^T), in float32, in the type of `x`.

    Args:
      x: rows.
      w: matrices of gate and up, in the type of `x`, what is summed over last.
      implementation: None (as `choose` says, or the first that takes the arguments), or one name or several of
        `SWIGLU`.

    Raises:
      NotImplementedError: the named implementation does not take these arguments.
    """
    return dispatch("swiglu", SWIGLU, implementation, x, w)
