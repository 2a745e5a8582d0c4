"""Causal attention on TPU: the Splash attention that JAX brings, inside `shard_map` with its checks or without."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from mlra_jax.ops.manual import unchecked
from mlra_jax.ops.remat import ATTENTION

BLOCKS = (512, 256, 128)
"""Tokens of a block of queries or keys: the first that divides them."""


def causal_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKV: jax.Array,
    *,
    scale: float,
    q_start: jax.Array | int,
    interpret: bool = False,
) -> jax.Array:
    """See `mlra_jax.ops.attention.causal_attention`; differentiable once.

    Args:
      q_BTNH: queries.
      k_BSKH: keys.
      v_BSKV: values.
      scale: multiplies the scores.
      q_start: position of the first query, known when compiling.
      interpret: runs the kernels on the CPU.

    Raises:
      NotImplementedError: not a TPU, a position known at run time alone, or sizes that its blocks do not fit.
    """
    if not interpret and not pltpu.is_tpu_device():
        raise NotImplementedError("It needs a TPU.")
    if not isinstance(q_start, int | np.integer):
        raise NotImplementedError("It needs a q_start that is known when compiling.")
    t, s, n = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[2]
    if t % BLOCKS[-1] or s % BLOCKS[-1]:
        raise NotImplementedError(
            f"It needs lengths that are multiples of {BLOCKS[-1]}; got {t} queries, {s} keys."
        )
    if any(width % 64 for width in (k_BSKH.shape[-1], v_BSKV.shape[-1])):
        raise NotImplementedError(
            f"It needs widths that are multiples of 64; got {k_BSKH.shape[-1]} and {v_BSKV.shape[-1]}."
        )
    block_q, block_kv = (next(b for b in BLOCKS if size % b == 0) for size in (t, s))
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        use_fused_bwd_kernel=True,
    )
    mask = splash.MultiHeadMask([splash.CausalMask((t, s), offset=int(q_start))] * n)
    kernel = splash.make_splash_mha_single_device(
        mask, block_sizes=sizes, residual_checkpoint_name=ATTENTION, interpret=interpret
    )
    q = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)  # Splash attention takes no scale
    return unchecked(_attend)(kernel, *(x.swapaxes(1, 2) for x in (q, k_BSKH, v_BSKV))).swapaxes(1, 2)


def _attend(kernel: Callable[..., jax.Array], *qkv_BNTH: jax.Array) -> jax.Array:
    return jax.vmap(kernel)(*qkv_BNTH)
