"""The static sizes of a decode attention call, which all its kernels are compiled and tuned for."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlra_jax.ops.columns import Columns
from mlra_jax.ops.decode.reference import Arguments


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of a call."""

    batch: int
    q_len: int
    heads: int
    """Latent or KV heads (L)."""
    heads_per_kv: int
    """Query heads that read one of them (M)."""
    widths: tuple[int, ...]
    """Of the parts of the key."""
    shared: tuple[bool, ...]
    """Which parts of the key all heads share."""
    v_width: int
    latent: bool
    """Whether the value is the first part of the key."""
    page_size: int
    """Tokens of a page; of a row, if the cache is contiguous."""
    pages: int
    row_pages: int | None
    """Entries of a row of the page table; None: the cache is contiguous."""
    branches: int = 1
    """Heads that share the queries of a part (L / G); their other queries and their outputs are adjacent in memory."""
    rotary: bool = False
    """Whether the queries of the last part are still to be rotated."""
    pool_width: int | None = None
    """Columns of a token of the pool that holds all parts of the key; None: they are arrays of their own."""

    @property
    def rows(self) -> int:
        """Query rows of a head: T * M."""
        return self.q_len * self.heads_per_kv

    @property
    def capacity(self) -> int:
        """Tokens that a row of the batch may hold."""
        return self.page_size * (self.row_pages or 1)

    @property
    def cached(self) -> tuple[tuple[int, int], ...]:
        """Heads and width of each cached array: the parts of the key, then the values if they are not among them."""
        keys = [(1 if shared else self.heads, w) for shared, w in zip(self.shared, self.widths, strict=True)]
        return tuple(keys if self.latent else [*keys, (self.heads, self.v_width)])

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in the bfloat16 cache, padding too."""
        return 2 * (self.pool_width or sum(heads * width for heads, width in self.cached))

    @property
    def tuning_key(self) -> dict[str, Any]:
        """The sizes by which tuned tables know the call."""
        return {
            "heads": self.heads,
            "rows": self.heads_per_kv,
            "q_len": self.q_len,
            "widths": self.widths,
            "v_width": self.v_width,
            "latent": self.latent,
            "batch": self.batch,
            "capacity": self.capacity,
        }

    @classmethod
    def of(cls, args: Arguments) -> Shape:
        """The sizes of a call."""
        tokens, features = (3, 2) if args.layout == "feature_major" else (2, 3)
        b, t, heads, m = args.score_shape
        queries, keys = zip(*args.parts, strict=True)
        values = keys[0] if args.v is None else args.v
        return cls(
            batch=b,
            q_len=t,
            heads=heads,
            heads_per_kv=m,
            widths=tuple(k.shape[features] for k in keys),
            shared=tuple(k.shape[1] < heads for k in keys),
            v_width=values.shape[features],
            latent=args.v is None,
            page_size=keys[0].shape[tokens],
            pages=keys[0].shape[0],
            row_pages=None if args.page_table is None else args.page_table.shape[1],
            branches=heads // min(q.shape[2] for q in queries),
            rotary=args.rotary is not None,
            pool_width=keys[0].token_width if isinstance(keys[0], Columns) else None,
        )
