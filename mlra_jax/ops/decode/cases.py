"""Calls of decode attention that tests, benchmarks and tuning share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import ArrayLike

from mlra_jax.ops.decode.api import Layout, grouped_decode_attention, latent_decode_attention
from mlra_jax.ops.rotary import apply_rope


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call of `latent_decode_attention`, or, with a `value` width, of `grouped_decode_attention`."""

    lengths: tuple[int, ...]
    """Tokens of each row. Its last query sees them all and each earlier query one less; none when there are none."""
    q_len: int = 1
    """Queries of each row (T)."""
    heads: int = 1
    """Local latent heads (L) or KV heads (K)."""
    rows: int = 64
    """Query heads that read one of them (M)."""
    width: int = 128
    """Width of a latent (C) or of a key (H)."""
    rope: int = 64
    """Width of the rotary key that latent heads share (R); 0: none, as in the grouped op."""
    value: int | None = None
    """Width of a value (V); None: the latents are the values."""
    slots: int | None = None
    """Tokens that the cache has room for in each row; None: those of the longest."""
    page: int | None = None
    """Slots of a page; None: a contiguous cache."""
    layout: Layout = "token_major"

    @property
    def capacity(self) -> int:
        """Slots of each row, whole pages."""
        slots = self.slots or max(*self.lengths, 1)
        return slots if self.page is None else -(-slots // self.page) * self.page

    @property
    def cache_bytes(self) -> int:
        """Bytes of bfloat16 cache that the queries see, each once: the least that a call must read."""
        width = self.heads * self.width + self.rope
        if self.value is not None:
            width = self.heads * (self.width + self.value)
        return 2 * width * sum(self.lengths)


@dataclasses.dataclass(frozen=True)
class Call:
    """An op and its arguments; calling it, with more keywords or not, runs the op."""

    op: Callable[..., tuple[jax.Array, jax.Array]]
    args: tuple[Any, ...]
    """Arrays, or their `jax.ShapeDtypeStruct`s, in the op's order; last the page table, or None."""
    static: Mapping[str, Any]
    """Keywords that are no arrays."""

    def __call__(self, *args: Any, **keywords: Any) -> tuple[jax.Array, jax.Array]:
        """Runs the op on its own arguments, or on `args` in their place."""
        *arrays, page_table = args or self.args
        return self.op(*arrays, page_table=page_table, **self.static, **keywords)

    def in_float32(self) -> Call:
        """The same call, its queries and cache widened: what the reference takes to say what is exact."""
        widen = lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
        return dataclasses.replace(self, args=jax.tree.map(widen, self.args))


def abstract_call(case: Case, dtype: DTypeLike = jnp.bfloat16, *, scale: float | None = None) -> Call:
    """The call with shapes for arrays: to compile, to explain, or to fill on the device.

    Args:
      case: sizes.
      dtype: of queries and cache.
      scale: of the scores; None: 1 / sqrt(width + rope).
    """
    b, t, heads, m = len(case.lengths), case.q_len, case.heads, case.rows
    n = 1 if case.page is None else case.capacity // case.page
    pages, slots = b * n, case.capacity // n

    def cache(*heads: int, width: int) -> jax.ShapeDtypeStruct:
        tokens = (slots, width) if case.layout == "token_major" else (width, slots)
        return jax.ShapeDtypeStruct((pages, *heads, *tokens), dtype)

    query = lambda width: jax.ShapeDtypeStruct((b, t, heads, m, width), dtype)
    kv_len = jax.ShapeDtypeStruct((b, t), jnp.int32)
    page_table = None if case.page is None else jax.ShapeDtypeStruct((b, n), jnp.int32)
    static = {"scale": (case.width + case.rope) ** -0.5 if scale is None else scale, "layout": case.layout}
    arrays: tuple[jax.ShapeDtypeStruct, ...]
    if case.value is None:
        arrays = query(case.width), query(case.rope), cache(heads, width=case.width), cache(width=case.rope)
        return Call(latent_decode_attention, (*arrays, kv_len, page_table), static)
    arrays = query(case.width), cache(heads, width=case.width), cache(heads, width=case.value)
    return Call(grouped_decode_attention, (*arrays, kv_len, page_table), static)


def make_case(
    case: Case,
    seed: int = 0,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    scale: float | None = None,
    kv_len: ArrayLike | None = None,
) -> Call:
    """The call with normally distributed queries and cache, NaN in each slot that no query sees.

    The pages of a paged cache are in random order; the entries of the table past a row's end are out of range.

    Args:
      case: sizes.
      seed: of the random numbers.
      dtype: see `abstract_call`.
      scale: see `abstract_call`.
      kv_len: what each query sees, any integers [B, T], in place of what the case's lengths say.
    """
    call = abstract_call(case, dtype, scale=scale)
    *arrays, _, page_table = call.args
    rng = np.random.default_rng(seed)
    if kv_len is None:
        earlier = np.arange(case.q_len - 1, -1, -1)
        kv_len = np.maximum(np.array(case.lengths)[:, None] - earlier, 0)
    kv_len = np.asarray(kv_len, np.int32)
    lengths = np.clip(kv_len.max(axis=1), 0, case.capacity)
    table = np.arange(len(lengths), dtype=np.int32)[:, None]  # a contiguous cache has one page for each row
    seen = np.arange(case.capacity) < lengths[:, None]
    if page_table is not None:
        table = rng.permutation(page_table.size).astype(np.int32).reshape(page_table.shape)
    pages, slots = table.size, case.capacity // table.shape[1]
    seen_in_page = np.empty((pages, slots), bool)
    seen_in_page[table.reshape(-1)] = seen.reshape(pages, slots)

    filled = []
    for x in arrays:
        values = rng.standard_normal(x.shape, np.float32)
        if x.ndim < 5:  # the cache
            last_two = (slots, 1) if case.layout == "token_major" else (1, slots)
            visible = seen_in_page.reshape(pages, *(1,) * (x.ndim - 3), *last_two)
            values = np.where(visible, values, np.nan)
        filled.append(jnp.asarray(values, x.dtype))
    filled.append(jnp.asarray(kv_len))
    if page_table is not None:
        past_the_end = np.arange(table.shape[1]) * slots >= lengths[:, None]
        table[past_the_end] = rng.choice([-1, pages, 2**30], past_the_end.sum())
    return Call(call.op, (*filled, None if page_table is None else jnp.asarray(table)), call.static)


def abridge(call: Call, branches: int) -> tuple[Call, Call]:
    """A latent call whose rotary queries are shared by so many heads, wider than the keys and not yet rotated.

    Args:
      call: made by `make_case`; its number of heads is a multiple of `branches`.
      branches: heads that share rotary queries.

    Returns:
      The call, and the same with those queries rotated and written out for every head.
    """
    q_nope, q_rope, *rest = call.args
    b, t, heads, _, r = q_rope.shape
    shared = q_rope[:, :, : heads // branches]
    angles = jnp.arange(b * t * (r // 2), dtype=jnp.float32).reshape(b, t, r // 2)
    rotary = jnp.cos(angles), jnp.sin(angles)
    wide = jnp.concatenate([jnp.full((*shared.shape[:-1], 8), jnp.nan, shared.dtype), shared], axis=-1)
    turned = jnp.tile(apply_rope(shared, *(x[:, :, None, None] for x in rotary)), (1, 1, branches, 1, 1))
    return (
        Call(call.op, (q_nope, wide, *rest), {**call.static, "rotary": rotary}),
        dataclasses.replace(call, args=(q_nope, turned, *rest)),
    )


_K = 1024

SHARES: Mapping[str, Case] = MappingProxyType(
    {
        "mlra_4": Case(()),  # one latent head: what one of four devices holds
        "mlra_4 all heads": Case((), heads=4),
        "mla": Case((), width=512),
        "gla_2": Case((), rows=32, width=256),  # one of two devices
        "gqa": Case((), rows=8, rope=0, value=128),  # one KV head
    }
)
"""What one device holds in the 2.9 B models of the paper with 64 query heads, for rows of no length yet."""

BENCHMARKS: Mapping[str, Case] = MappingProxyType(
    {
        f"{variant} {batch}x{size}": dataclasses.replace(case, lengths=(tokens,) * batch)
        for variant, case in SHARES.items()
        for batch, size, tokens in (
            (1, "128K", 128 * _K),
            (1, "256K", 256 * _K),
            (1, "512K", 512 * _K),
            (1, "1M", 1024 * _K),
            (1, "2M", 2048 * _K),
            (16, "4K", 4 * _K),
            (16, "16K", 16 * _K),
            (64, "4K", 4 * _K),
            (64, "16K", 16 * _K),
            (128, "32K", 32 * _K),
        )
    }
)
"""`SHARES` at the sizes that are measured and tuned: `VARIANT BATCHxTOKENS`."""

EDGES: Mapping[str, Case] = MappingProxyType(
    {
        "nothing": Case((0, 0), slots=70, rows=16),
        "tiny": Case((1, 2, 0, 17), rows=16),
        "ragged": Case((300, 1, 0, 129), rows=16, slots=320),
        "off by one": Case((63, 64, 65, 127, 128, 129), rows=16, slots=192),
        "several latents": Case((100, 257), heads=4, rows=16, width=64, rope=32),
        "no rope": Case((70, 200), heads=2, rows=32, rope=0),
        "wide": Case((65, 130), rows=16, width=512),
        "half wide": Case((130, 64), rows=32, width=256),
        "odd rows": Case((65, 130), heads=2, rows=3),
        "one row": Case((65, 130), rows=1, width=64),
        "many rows": Case((130, 200), rows=96),
        "causal": Case((1, 3, 0, 129), q_len=4, rows=8),
        "eight causal queries": Case((5, 64, 200), q_len=8, heads=2, rows=16, width=64),
        "pages": Case((63, 64, 0, 300), rows=16, page=64),
        "long pages": Case((127, 257, 1), q_len=2, heads=2, rows=16, page=128),
        "one page": Case((100,), rows=16, width=64, page=128),
        "grouped": Case((129, 0, 300), heads=2, rows=8, rope=0, value=128),
        "grouped, other value width": Case((64, 100), q_len=3, heads=3, rows=4, width=64, rope=0, value=128),
        "grouped, pages": Case((64, 200, 1), heads=2, rows=8, rope=0, value=64, page=64),
    }
)
"""Small calls at the limits of blocks, pages, tiles and lengths, for tests."""
