"""Argument specifications: calls of decode attention that tests, benchmarks and tuning share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mlra_jax.ops.columns import Columns
from mlra_jax.ops.decode.api import Layout, grouped_decode_attention, latent_decode_attention
from mlra_jax.ops.decode.shape import Shape


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """Sizes of a call of `latent_decode_attention` or, if a `value` width is given, of `grouped_decode_attention`."""

    lengths: tuple[int, ...]
    """Cached tokens of each row. The last query sees them all, each earlier query one less."""
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
    max_len: int | None = None
    """Tokens that the cache has room for in each row; None: those of the longest."""
    page_size: int | None = None
    """Tokens of a page; None: a contiguous cache."""
    layout: Layout = "token_major"
    pool: Literal["packed", "engine"] | None = None
    """Latents and rotary keys are columns of one pool: side by side (`packed`), or as in serving engines, which hold
    for each latent head two slots of a multiple of 128 values, [P, S, L, 2, 128]: its latent, and the rotary key."""

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for, whole pages."""
        max_len = self.max_len or max(*self.lengths, 1)
        return max_len if self.page_size is None else -(-max_len // self.page_size) * self.page_size

    @property
    def shape(self) -> Shape:
        """The sizes by which kernels know the call."""
        parts = 2 if self.rope and self.value is None else 1
        pages = 1 if self.page_size is None else self.capacity // self.page_size
        return Shape(
            batch=len(self.lengths),
            q_len=self.q_len,
            heads=self.heads,
            heads_per_kv=self.rows,
            widths=(self.width, self.rope)[:parts],
            shared=(False, self.heads > 1)[:parts],
            v_width=self.value or self.width,
            latent=self.value is None,
            page_size=self.page_size or self.capacity,
            pages=len(self.lengths) * pages,
            row_pages=None if self.page_size is None else pages,
            pool_width=math.prod(self._pool_token) if self.pool else None,
        )

    @property
    def pool_shape(self) -> tuple[int, ...]:
        """Of the pool, [P, S, ...]."""
        return self.shape.pages, self.shape.page_size, *self._pool_token

    @property
    def _pool_token(self) -> tuple[int, ...]:
        packed = (-(-(self.heads * self.width + self.rope) // 64) * 64,)  # as Hopper's copies want them
        return packed if self.pool == "packed" else (self.heads, 2, self._slot)

    @property
    def _slot(self) -> int:
        return -(-max(self.width, self.rope) // 128) * 128

    def columns(self, pool: Any) -> tuple[Columns, Columns]:
        """Latents and rotary keys of a pool."""
        first, step = (
            (self.heads * self.width, self.width) if self.pool == "packed" else (self._slot, 2 * self._slot)
        )
        copies = 1 if self.pool == "packed" else self.heads
        return (
            Columns(pool, tuple(step * i for i in range(self.heads)), self.width),
            Columns(pool, tuple(first + step * i for i in range(copies)), self.rope),
        )

    @property
    def cache_bytes(self) -> int:
        """Bytes of bfloat16 cache that the queries see, the least that a call must read."""
        width = self.heads * self.width + self.rope
        if self.value is not None:
            width = self.heads * (self.width + self.value)
        return 2 * width * sum(self.lengths)


@dataclasses.dataclass(frozen=True)
class Call:
    """An op and its arguments; calling it runs the op."""

    op: Callable[..., tuple[jax.Array, jax.Array]]
    args: tuple[Any, ...]
    """Arrays, or their `jax.ShapeDtypeStruct`s, in the op's order; last the page table, or None."""
    static: Mapping[str, Any]
    """Keywords that are not arrays."""

    def __call__(self, *args: Any, **keywords: Any) -> tuple[jax.Array, jax.Array]:
        """Runs the op on its own arguments, or on `args` in their place."""
        *arrays, page_table = args or self.args
        return self.op(*arrays, page_table=page_table, **self.static, **keywords)


def abstract_call(spec: ArgSpec, dtype: DTypeLike = jnp.bfloat16, *, scale: float | None = None) -> Call:
    """The call with shapes for arrays: to compile, to explain, or to fill on the device.

    Args:
      spec: sizes.
      dtype: of queries and cache.
      scale: of the scores; None: 1 / sqrt(width + rope).
    """
    b, t, heads, m = len(spec.lengths), spec.q_len, spec.heads, spec.rows
    n = 1 if spec.page_size is None else spec.capacity // spec.page_size
    pages, page_size = b * n, spec.capacity // n

    def cache(*heads: int, width: int) -> jax.ShapeDtypeStruct:
        tokens = (page_size, width) if spec.layout == "token_major" else (width, page_size)
        return jax.ShapeDtypeStruct((pages, *heads, *tokens), dtype)

    query = lambda width: jax.ShapeDtypeStruct((b, t, heads, m, width), dtype)
    kv_len = jax.ShapeDtypeStruct((b, t), jnp.int32)
    page_table = None if spec.page_size is None else jax.ShapeDtypeStruct((b, n), jnp.int32)
    static = {"scale": (spec.width + spec.rope) ** -0.5 if scale is None else scale, "layout": spec.layout}
    arrays: tuple[jax.ShapeDtypeStruct, ...]
    if spec.value is None:
        cached: tuple[Any, Any] = cache(heads, width=spec.width), cache(width=spec.rope)
        if spec.pool:
            cached = spec.columns(jax.ShapeDtypeStruct(spec.pool_shape, dtype))
        queries = query(spec.width), query(spec.rope)
        return Call(latent_decode_attention, (*queries, *cached, kv_len, page_table), static)
    arrays = query(spec.width), cache(heads, width=spec.width), cache(heads, width=spec.value)
    return Call(grouped_decode_attention, (*arrays, kv_len, page_table), static)


_K = 1024

SHARES: Mapping[str, ArgSpec] = MappingProxyType(
    {
        "mlra_4": ArgSpec(()),  # one latent head: what one of four devices holds
        "mlra_4 all heads": ArgSpec((), heads=4),
        "mla": ArgSpec((), width=512),
        "gla_2": ArgSpec((), rows=32, width=256),  # one of two devices
        "gqa": ArgSpec((), rows=8, rope=0, value=128),  # one KV head
    }
)
"""What one device holds of the paper's 2.9 B models with 64 query heads; lengths are to be filled in."""

BENCHMARKS: Mapping[str, ArgSpec] = MappingProxyType(
    {
        f"{variant} {batch}x{size}": dataclasses.replace(spec, lengths=(tokens,) * batch)
        for variant, spec in SHARES.items()
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
