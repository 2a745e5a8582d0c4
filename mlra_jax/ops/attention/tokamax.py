"""Causal attention on GPUs by Tokamax, an optional dependency."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.backend import get_default_device

from mlra_jax.ops.device import current_device, find_chip
from mlra_jax.ops.libraries import declining, name, version
from mlra_jax.ops.shard_map_utils import unchecked

OLDEST = (0, 0, 17)
"""Of Tokamax; it needs JAX 0.11.1, so Python 3.12."""
REMEDY = "pip install --upgrade 'mlra_jax[tokamax]' (Python 3.12)"


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
    if (installed := version("tokamax")) is None:
        raise NotImplementedError(f"Tokamax is not installed: {REMEDY}.")
    if installed < OLDEST or jax.__version_info__ < (0, 11, 1):
        raise NotImplementedError(
            f"It needs Tokamax 0.0.17 and JAX 0.11.1 or later; these are {name('tokamax', 'jax')}: {REMEDY}."
        )
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"It takes bfloat16 and float16; got {q_BTNH.dtype}.")
    if not (isinstance(q_start, int | np.integer) and q_start == 0) or q_BTNH.shape[1] != k_BSKH.shape[1]:
        raise NotImplementedError("It takes as many queries as keys, from position 0 on.")
    if (default := get_default_device().device_kind) != kind:
        raise NotImplementedError(
            f"Tokamax compiles for the default device, a {default}; for a {kind} set `jax.default_device`."
        )
    # Its Mosaic GPU kernels are for Hopper and later.
    kernels = "mosaic" if chip.capability >= 90 else "triton"

    def attend(_: None, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        with declining("tokamax", "jax", remedy=REMEDY):
            import tokamax

            return tokamax.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation=kernels)

    return unchecked(attend)(None, q_BTNH, k_BSKH, v_BSKV)
