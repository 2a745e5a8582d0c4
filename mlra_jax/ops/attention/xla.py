"""Causal attention in plain XLA with bounded memory: a block of queries at a time, recomputed in the backward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mlra_jax.ops.attention import reference
from mlra_jax.ops.remat import ATTENTION

BLOCK_ELEMENTS = 1 << 26
"""Most scores held at a time: 256 MiB of float32."""


def causal_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKV: jax.Array, *, scale: float, q_start: jax.Array | int
) -> jax.Array:
    """See `mlra_jax.ops.attention.causal_attention`."""
    b, t, n, _ = q_BTNH.shape
    s = k_BSKH.shape[1]
    block = max(1, min(t, BLOCK_ELEMENTS // (b * n * s)))
    if block == t:
        out = reference.causal_attention(q_BTNH, k_BSKH, v_BSKV, scale=scale, q_start=q_start)
        return checkpoint_name(out, ATTENTION)

    @jax.checkpoint
    def one_block(i: jax.Array) -> jax.Array:
        q = jax.lax.dynamic_slice_in_dim(padded_BTNH, i * block, block, axis=1)
        return reference.causal_attention(q, k_BSKH, v_BSKV, scale=scale, q_start=q_start + i * block)

    n_blocks = -(-t // block)
    padded_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, n_blocks * block - t), (0, 0), (0, 0)))
    blocks = jax.lax.map(one_block, jnp.arange(n_blocks))  # [T / block, B, block, N, V]
    return checkpoint_name(blocks.swapaxes(0, 1).reshape(b, n_blocks * block, n, -1)[:, :t], ATTENTION)
