"""Causal attention on GPUs by Tokamax, an optional dependency."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlra_jax.ops.device import current_device, find_chip
from mlra_jax.ops.manual import unchecked


@functools.cache
def _missing() -> bool:
    return importlib.util.find_spec("tokamax") is None


def causal_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKV: jax.Array, *, scale: float, q_start: jax.Array | int
) -> jax.Array:
    """See `mlra_jax.ops.attention.causal_attention`.

    Raises:
      NotImplementedError: Tokamax is not installed, this is no GPU that it has kernels for, or there are other queries
        than keys.
    """
    platform, kind = current_device()
    chip = find_chip(kind) if platform == "gpu" else None
    if chip is None or chip.capability < 80:
        raise NotImplementedError(
            f"It needs an NVIDIA GPU of the Ampere generation or later; this is a {kind}."
        )
    if _missing():
        raise NotImplementedError("Tokamax is not installed: pip install 'mlra-jax[tokamax]' (Python 3.12).")
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"It takes bfloat16 and float16; got {q_BTNH.dtype}.")
    if not (isinstance(q_start, int | np.integer) and q_start == 0) or q_BTNH.shape[1] != k_BSKH.shape[1]:
        raise NotImplementedError("It takes as many queries as keys, from position 0 on.")
    import tokamax

    # Its Mosaic GPU kernels are for Hopper and later.
    name = "mosaic" if chip.capability >= 90 else "triton"

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return tokamax.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation=name)

    if jax.default_backend() != "gpu":  # compiling for GPUs that are not there
        attend = _for_absent_device(attend)
    return unchecked(lambda _, *arrays: attend(*arrays))(None, q_BTNH, k_BSKH, v_BSKV)


def _for_absent_device(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`attend` whose kernels, forward and backward, do not ask whether the default device can run them."""
    from tokamax.config import cross_compile

    @jax.custom_vjp
    def call(*arrays: jax.Array) -> jax.Array:
        with cross_compile(True):
            return attend(*arrays)

    def forward(*arrays: jax.Array) -> tuple[jax.Array, Any]:
        with cross_compile(True):
            return jax.vjp(attend, *arrays)

    def backward(pullback: Any, gradient: jax.Array) -> tuple[jax.Array, ...]:
        with cross_compile(True):
            return pullback(gradient)

    call.defvjp(forward, backward)
    return call
