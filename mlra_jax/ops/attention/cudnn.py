"""Causal attention on GPUs by cuDNN's flash attention, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mlra_jax.ops.device import current_device, find_chip
from mlra_jax.ops.libraries import declining
from mlra_jax.ops.shard_map_utils import unchecked


def causal_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKV: jax.Array, *, scale: float, q_start: jax.Array | int
) -> jax.Array:
    """See `mlra_jax.ops.attention.causal_attention`. Values narrower than keys are padded: cuDNN wants one width.

    Raises:
      NotImplementedError: no NVIDIA GPU from Ampere on, or arguments that cuDNN does not take.
    """
    platform, kind = current_device()
    chip = find_chip(kind) if platform == "gpu" else None
    if chip is None or chip.capability < 80:
        raise NotImplementedError(
            f"It needs an NVIDIA GPU of the Ampere generation or later; this is a {kind}."
        )
    h, v_width = q_BTNH.shape[-1], v_BSKV.shape[-1]
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"It takes bfloat16 and float16; got {q_BTNH.dtype}.")
    most = 256 if chip.capability >= 90 else 128
    if h % 8 or h > most or v_width > h:
        raise NotImplementedError(
            f"It takes keys of a multiple of 8 features, {most} at most on this GPU, and values no wider; "
            f"got {h} and {v_width}."
        )
    if not (isinstance(q_start, int | np.integer) and q_start == 0) or q_BTNH.shape[1] != k_BSKH.shape[1]:
        raise NotImplementedError("It takes as many queries as keys, from position 0 on.")
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"cuDNN compiles only where the GPU is; this is compiled for a {kind}.")

    def attend(_: None, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, h - v_width)))
        with declining("jax", remedy="pip install --upgrade 'mlra_jax[cuda]'"):
            out = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
        return out[..., :v_width]

    return unchecked(attend)(None, q_BTNH, k_BSKH, v_BSKV)
