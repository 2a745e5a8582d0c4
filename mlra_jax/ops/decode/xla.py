"""Decode attention in plain XLA: online softmax over blocks of the cache, no further than the longest row."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mlra_jax.ops.columns import Columns
from mlra_jax.ops.decode import reference
from mlra_jax.ops.decode.reference import Arguments, FactoredArguments

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
    attend: Callable[..., tuple[jax.Array, jax.Array]], args: Arguments | FactoredArguments
) -> tuple[jax.Array, jax.Array]:
    """Attention over a cache, one block of tokens after the other.

    Args:
      attend: of arguments, and the first token that is seen: output and log-sum-exp.
      args: of the whole cache.
    """
    s_axis = 3 if args.layout == "feature_major" else 2
    page, page_table = args.cached[0].shape[s_axis], args.page_table
    s = page if page_table is None else page * page_table.shape[1]
    args = dataclasses.replace(args, kv_len=jnp.clip(args.kv_len, 0, s))
    block = min(s, max(128, BLOCK_ELEMENTS // math.prod(args.score_shape)))
    if page_table is not None:
        block = max(block // page, 1) * page
    if block == s:
        return attend(args, 0)

    def one_block(i: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        # The last block is moved back to end with the cache; tokens that an earlier block has seen are left out.
        start = jnp.minimum(i * block, s - block)
        if page_table is None:
            slice_of = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, block, axis=axis)
            cut = lambda x: x.of(slice_of(x.array, 1)) if isinstance(x, Columns) else slice_of(x, s_axis)
            of_block = args.with_cached([cut(x) for x in args.cached])
        else:
            table = jax.lax.dynamic_slice_in_dim(page_table, start // page, block // page, axis=1)
            of_block = dataclasses.replace(args, page_table=table)
        kv_len = jnp.clip(args.kv_len - start, 0, block)
        out, lse = attend(dataclasses.replace(of_block, kv_len=kv_len), i * block - start)
        return out.astype(jnp.float32), lse

    def step(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        i, out, lse = state
        return i + 1, *merge(out, lse, *one_block(i))

    n_blocks = -(-args.kv_len.max() // block)
    first = (jnp.ones_like(n_blocks), *one_block(0))
    _, out, lse = jax.lax.while_loop(lambda state: state[0] < n_blocks, step, first)
    return out, lse


def decode_attention(args: Arguments) -> tuple[jax.Array, jax.Array]:
    """See `mlra_jax.ops.decode.reference.decode_attention`."""
    out, lse = over_blocks(reference.decode_attention, args.expanded())
    return out.astype(args.parts[0][0].dtype), lse


def factored_decode_attention(args: FactoredArguments) -> tuple[jax.Array, jax.Array]:
    """See `mlra_jax.ops.decode.reference.factored_decode_attention`."""
    out, lse = over_blocks(reference.factored_decode_attention, args)
    return out.astype(args.q.dtype), lse
