"""Cached arrays that are columns of one buffer of tokens, as the paged pools of serving engines are."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns of a buffer of pages of tokens, which ops take for a token-major array [P, heads, S, width].

        pool = ...  # [P, S, 2 * U, 128]: of each latent head its latent, then the rotary key, padded
        kv_latent = Columns(pool, tuple(range(0, U * 256, 256)), width=128)
        k_rope = Columns(pool, (128,), width=64)

    Nothing is copied to make one. What no head names, such as the padding above, is never read.

    Attributes:
      array: the buffer [P, S, ...]. All axes after the tokens' are a token's columns, numbered in order: pools are
        taken in the shape that their owner gave them, because on a TPU another shape is another layout, and a copy.
      starts: first column of each head.
      width: columns of a head.
    """

    array: Any
    starts: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    width: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[P, heads, S, width]: of the array that it stands for."""
        pages, page_size, *_ = self.array.shape
        return pages, len(self.starts), page_size, self.width

    @property
    def dtype(self) -> Any:
        """Of the buffer."""
        return self.array.dtype

    @property
    def token_width(self) -> int:
        """Columns of a token."""
        return math.prod(self.array.shape[2:])

    @property
    def flat(self) -> Any:
        """The buffer as [P, S, columns]."""
        return self.array.reshape(*self.array.shape[:2], -1)

    @property
    def evenly_spaced(self) -> bool:
        """Whether heads start at equal distances, so that `start` serves any head."""
        return len({b - a for a, b in itertools.pairwise(self.starts)}) <= 1

    def start(self, head: Any) -> Any:
        """First column of a head, whose number may be traced; of a single head that of any."""
        first, *rest = self.starts
        return first + head * (rest[0] - first) if rest else first

    def of(self, array: Any) -> Columns:
        """The same columns of another buffer."""
        return dataclasses.replace(self, array=array)

    def check(self, name: str, layout: str) -> None:
        """Whether the buffer has these columns, and they can have the layout that an op is told.

        Raises:
          ValueError: it has not, or they cannot.
        """
        if layout != "token_major":
            raise ValueError(
                f"{name} is columns of a buffer of tokens: layout must be token_major, not {layout}."
            )
        if self.array.ndim < 3:
            raise ValueError(
                f"{name} must be columns of a buffer [P, S, ...]; it has {self.array.ndim} axes."
            )
        last = max(self.starts, default=0) + self.width
        if not self.starts or min(self.starts) < 0 or last > self.token_width:
            raise ValueError(
                f"{name} must be columns of its buffer, which has {self.token_width} for each token; got "
                f"{self.width} from each of {list(self.starts)} on."
            )


def unpack(columns: Columns) -> jax.Array:
    """The array [P, heads, S, width] itself."""
    flat, width = columns.flat, columns.width
    return jnp.stack([flat[:, :, start : start + width] for start in columns.starts], axis=1)


def pack(tokens: jax.Array, columns: Columns, rows: jax.Array) -> jax.Array:
    """Rows [B, T, columns of a token] with tokens [B, T, heads, width] in these columns.

    Tokens of one head, or [B, T, width], go to those of every head.
    """
    b, t = tokens.shape[:2]
    tokens = jnp.broadcast_to(tokens.reshape(b, t, -1, columns.width), (b, t, *columns.shape[1::2]))
    for head, start in enumerate(columns.starts):
        rows = rows.at[:, :, start : start + columns.width].set(tokens[:, :, head].astype(rows.dtype))
    return rows


def decline_columns(cached: Iterable[Any], kernel: str) -> None:
    """Declines columns of a buffer, for a kernel that reads arrays of their own.

    Raises:
      NotImplementedError: one is that.
    """
    if any(isinstance(x, Columns) for x in cached):
        raise NotImplementedError(f"{kernel} whole arrays, not columns of a pool.")
