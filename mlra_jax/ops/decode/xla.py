"""Decode attention in plain XLA: online softmax over blocks of the cache, no further than the longest row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlra_jax.ops.decode import reference
from mlra_jax.ops.decode.reference import Parts

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
    parts: Parts,
    v: jax.Array | None,
    kv_len_BT: jax.Array,
    *,
    scale: float,
    page_table: jax.Array | None = None,
    layout: str = "token_major",
) -> tuple[jax.Array, jax.Array]:
    """See `mlra_jax.ops.decode.reference.decode_attention`."""
    b, t, heads, m, _ = parts[0][0].shape
    s_axis = 3 if layout == "feature_major" else 2
    page = parts[0][1].shape[s_axis]
    s = page if page_table is None else page * page_table.shape[1]
    block = min(s, max(128, BLOCK_ELEMENTS // (b * t * heads * m)))
    if page_table is not None:
        block = max(block // page, 1) * page
    if block == s:
        return reference.decode_attention(
            parts, v, kv_len_BT, scale=scale, page_table=page_table, layout=layout
        )

    def one_block(i: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        # The last block is moved back to end with the cache; slots that an earlier block has seen are left out.
        start = jnp.minimum(i * block, s - block)
        table = page_table
        if page_table is None:
            cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, block, axis=s_axis)
        else:
            cut = lambda x: x
            table = jax.lax.dynamic_slice_in_dim(page_table, start // page, block // page, axis=1)
        kv_len = jnp.clip(kv_len_BT - start, 0, block)
        out, lse = reference.decode_attention(
            [(q, cut(k)) for q, k in parts],
            None if v is None else cut(v),
            kv_len,
            scale=scale,
            page_table=table,
            layout=layout,
            kv_start=i * block - start,
        )
        return out.astype(jnp.float32), lse

    def step(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        i, out, lse = state
        return i + 1, *merge(out, lse, *one_block(i))

    n_blocks = -(-kv_len_BT.max() // block)
    first = (jnp.ones_like(n_blocks), *one_block(0))
    _, out, lse = jax.lax.while_loop(lambda state: state[0] < n_blocks, step, first)
    return out.astype(parts[0][0].dtype), lse
