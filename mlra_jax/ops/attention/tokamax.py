"""Causal attention on GPUs by Tokamax, an optional dependency."""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.backend import get_default_device

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
    if (default := get_default_device().device_kind) != kind:
        raise NotImplementedError(
            f"Tokamax compiles for the default device, a {default}; for a {kind} set `jax.default_device`."
        )
    import tokamax

    # Its Mosaic GPU kernels are for Hopper and later.
    name = "mosaic" if chip.capability >= 90 else "triton"

    def attend(_: None, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return tokamax.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation=name)

    return unchecked(attend)(None, q_BTNH, k_BSKH, v_BSKV)
