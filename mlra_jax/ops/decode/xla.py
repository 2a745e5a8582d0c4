"""Decode attention in plain XLA: online softmax over blocks of the cache, no further than the longest row."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mlra_jax.ops.decode import reference

BLOCK_ELEMENTS = 1 << 24
"""Most scores held at a time: 64 MiB of float32."""


def merge(
    out_a: jax.Array, lse_a: jax.Array, out_b: jax.Array, lse_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of two disjoint sets of keys, from the outputs and log-sum-exps over each."""
    lse = jnp.logaddexp(lse_a, lse_b)
    base = jnp.where(jnp.isfinite(lse), lse, 0.0)
    out = out_a * jnp.exp(lse_a - base)[..., None] + out_b * jnp.exp(lse_b - base)[..., None]
    return out, lse


def decode_attention(
    parts: Sequence[tuple[jax.Array, jax.Array]],
    v_BLSV: jax.Array,
    kv_len_BT: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `mlra_jax.ops.decode.reference.decode_attention`."""
    b, t, heads, m, _ = parts[0][0].shape
    s = v_BLSV.shape[2]
    block = min(s, max(128, BLOCK_ELEMENTS // (b * t * heads * m)))
    if block == s:
        return reference.decode_attention(parts, v_BLSV, kv_len_BT, scale=scale)

    def one_block(i: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        # The last block is moved back to end with the cache; slots that an earlier block has seen are left out.
        start = jnp.minimum(i * block, s - block)
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, block, axis=2)
        kv_len = jnp.clip(kv_len_BT - start, 0, block)
        keys = [(q, cut(k)) for q, k in parts]
        out, lse = reference.decode_attention(
            keys, cut(v_BLSV), kv_len, scale=scale, kv_start=i * block - start
        )
        return out.astype(jnp.float32), lse

    def step(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        i, out, lse = state
        return i + 1, *merge(out, lse, *one_block(i))

    n_blocks = -(-kv_len_BT.max() // block)
    first = (jnp.ones_like(n_blocks), *one_block(0))
    _, out, lse = jax.lax.while_loop(lambda state: state[0] < n_blocks, step, first)
    return out.astype(parts[0][0].dtype), lse
