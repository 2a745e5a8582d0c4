"""Causal attention in plain XLA with bounded memory: a block of queries at a time, recomputed in the backward pass."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mlra_jax.ops.attention import reference
from mlra_jax.ops.attention.qk_parts import Joined
from mlra_jax.ops.remat import ATTENTION

BLOCK_ELEMENTS = 1 << 26
"""Most scores held at a time: 256 MiB of float32."""


def causal_attention(args: Joined) -> jax.Array:
    """See `mlra_jax.ops.attention.causal_attention`."""
    (b, t, n, _), s = args.q.shape, args.k.shape[1]
    block = max(1, min(t, BLOCK_ELEMENTS // (b * n * s)))
    if block == t:
        return checkpoint_name(reference.causal_attention(args), ATTENTION)

    @jax.checkpoint
    def one_block(i: jax.Array) -> jax.Array:
        q = jax.lax.dynamic_slice_in_dim(padded_BTNH, i * block, block, axis=1)
        return reference.causal_attention(dataclasses.replace(args, q=q, q_start=args.q_start + i * block))

    n_blocks = -(-t // block)
    padded_BTNH = jnp.pad(args.q, ((0, 0), (0, n_blocks * block - t), (0, 0), (0, 0)))
    blocks = jax.lax.map(one_block, jnp.arange(n_blocks))  # [T / block, B, block, N, V]
    return checkpoint_name(blocks.swapaxes(0, 1).reshape(b, n_blocks * block, n, -1)[:, :t], ATTENTION)
