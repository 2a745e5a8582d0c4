"""Decode attention in plain XLA: online softmax over blocks of the cache, no further than the longest row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mlra_jax.ops.decode import reference
from mlra_jax.ops.decode.reference import Parts, unabridged

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


def over_blocks(
    attend: Callable[..., tuple[jax.Array, jax.Array]],
    arrays: Sequence[jax.Array],
    kv_len_BT: jax.Array,
    *,
    scores_per_token: int,
    page_table: jax.Array | None,
    layout: str,
) -> tuple[jax.Array, jax.Array]:
    """Attention over a cache from attention over one block of its tokens after the other.

    Args:
      attend: of the cached arrays, kv_len, and as keywords page_table and kv_start: output and log-sum-exp.
      arrays: cached, [P, L, S, W] in the layout.
      kv_len_BT: how many of the leading tokens each query sees.
      scores_per_token: float32 numbers that `attend` holds for each token of a block.
      page_table: see `mlra_jax.ops.decode.latent_decode_attention`.
      layout: the same.
    """
    s_axis = 3 if layout == "feature_major" else 2
    page = arrays[0].shape[s_axis]
    s = page if page_table is None else page * page_table.shape[1]
    kv_len_BT = jnp.clip(kv_len_BT, 0, s)
    block = min(s, max(128, BLOCK_ELEMENTS // scores_per_token))
    if page_table is not None:
        block = max(block // page, 1) * page
    if block == s:
        return attend(arrays, kv_len_BT, page_table=page_table, kv_start=0)

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
        out, lse = attend([cut(x) for x in arrays], kv_len, page_table=table, kv_start=i * block - start)
        return out.astype(jnp.float32), lse

    def step(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        i, out, lse = state
        return i + 1, *merge(out, lse, *one_block(i))

    n_blocks = -(-kv_len_BT.max() // block)
    first = (jnp.ones_like(n_blocks), *one_block(0))
    _, out, lse = jax.lax.while_loop(lambda state: state[0] < n_blocks, step, first)
    return out, lse


@unabridged
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
    queries = [q for q, _ in parts]

    def attend(arrays: Sequence[jax.Array], *args: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array]:
        pairs = list(zip(queries, arrays, strict=False))
        v = arrays[-1] if len(arrays) > len(pairs) else None
        return reference.decode_attention(pairs, v, *args, scale=scale, layout=layout, **kwargs)

    arrays = [k for _, k in parts] + ([] if v is None else [v])
    out, lse = over_blocks(
        attend,
        arrays,
        kv_len_BT,
        scores_per_token=math.prod(queries[0].shape[:-1]),
        page_table=page_table,
        layout=layout,
    )
    return out.astype(queries[0].dtype), lse


def factored_decode_attention(
    q_BTKMH: jax.Array,
    factors: Sequence[jax.Array],
    kv_len_BT: jax.Array,
    *,
    scale: float,
    page_table: jax.Array | None = None,
    layout: str = "token_major",
) -> tuple[jax.Array, jax.Array]:
    """See `mlra_jax.ops.decode.reference.factored_decode_attention`."""

    def attend(factors: Sequence[jax.Array], *args: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array]:
        return reference.factored_decode_attention(
            q_BTKMH, factors, *args, scale=scale, layout=layout, **kwargs
        )

    rank = max(x.shape[2 if layout == "feature_major" else 3] for x in (factors[0], factors[2]))
    out, lse = over_blocks(
        attend,
        factors,
        kv_len_BT,
        scores_per_token=rank * math.prod(q_BTKMH.shape[:-1]),
        page_table=page_table,
        layout=layout,
    )
    return out.astype(q_BTKMH.dtype), lse
