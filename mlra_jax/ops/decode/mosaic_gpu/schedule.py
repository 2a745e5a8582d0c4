"""Which blocks of which sequences each share has, when the cache is read in several shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mlra_jax.ops.decode.mosaic_gpu.config import Config
from mlra_jax.ops.decode.shape import Shape


def blocks_of(tokens: jax.Array, block: int) -> jax.Array:
    """Blocks of so many tokens; one at least, so that every row has an output."""
    return jnp.maximum(1, lax.div(tokens + (block - 1), block))


def make_table(longest: jax.Array, config: Config) -> jax.Array:
    """Which blocks each share has, worked out once for all layers with the same lengths.

    Laid end to end, the blocks of all sequences are cut into equal shares. If as many shares of that size suffice to
    cut each sequence by itself, that is done instead, and no share holds parts of two.

    Args:
      longest: tokens of each sequence that its longest query sees, [B].
      config: of the kernel.

    Returns:
      int32 [4 * n_splits + 2 * B]. Of each share: the first sequence, the last one (less than the first where the share
      is empty), the first block in the first sequence, and the number of blocks. Of each sequence: the range
      [first, end) of its partial results; share i leaves that of sequence b at index i + b.
    """
    n_splits = config.n_splits
    blocks = blocks_of(longest, config.block)
    per = -(-jnp.sum(blocks) // n_splits)
    cuts = -(-blocks // per)
    # On the line that is cut every `per` blocks.
    room = jnp.where(jnp.sum(cuts) <= n_splits, cuts * per, blocks)
    ends = jnp.cumsum(room)
    begin = ends - room
    low = jnp.arange(n_splits) * per
    high = jnp.minimum(low + per, ends[-1])
    first = jnp.sum(ends <= low[:, None], axis=1)
    last = jnp.where(low < high, jnp.sum(ends < high[:, None], axis=1), first - 1)
    inside = lambda x: jnp.clip(x - begin, 0, blocks)  # blocks of each sequence before a place on the line
    start = jnp.max(
        jnp.where((begin <= low[:, None]) & (low[:, None] < ends), inside(low[:, None]), 0), axis=1
    )
    count = jnp.sum(inside(high[:, None]) - inside(low[:, None]), axis=1)
    b = jnp.arange(len(longest))
    results = begin // per + b, (begin + blocks - 1) // per + b + 1
    return jnp.concatenate([first, last, start, jnp.maximum(count, 0), *results]).astype(jnp.int32)


def limit(longest_ref: Any, shape: Shape) -> Callable[[Any], jax.Array]:
    """A function of b: the tokens of sequence b that its longest query sees, no more than the cache may hold.

    Limiting them in the kernel costs nothing.
    """
    return lambda b: jnp.clip(longest_ref[b], 0, shape.capacity)


class Schedule:
    """What a program reads off the table of `make_table`; a single sequence needs none."""

    def __init__(self, longest: Callable[[Any], jax.Array], table_ref: Any, config: Config):
        self.longest, self.table_ref, self.config = longest, table_ref, config

    def blocks(self, b: Any) -> jax.Array:
        """Blocks of sequence b."""
        return blocks_of(self.longest(b), self.config.block)

    def share(self, i: jax.Array) -> list[jax.Array]:
        """Of share i: the first and the last sequence, the first block in the first one, and the number of blocks."""
        n_splits = self.config.n_splits
        if self.table_ref is not None:
            return [self.table_ref[i + k * n_splits] for k in range(4)]
        total = self.blocks(0)
        per = lax.div(total + (n_splits - 1), n_splits)
        count = jnp.clip(total - i * per, 0, per)
        return [jnp.int32(0), jnp.minimum(count, 1) - 1, i * per, count]

    def results(self, b: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
        """The range [first, end) of the partial results of sequence b."""
        n_splits = self.config.n_splits
        if self.table_ref is not None:
            at = 4 * n_splits + b
            return self.table_ref[at], self.table_ref[at + batch]
        total = self.blocks(0)
        per = lax.div(total + (n_splits - 1), n_splits)
        return jnp.int32(0), lax.div(total + (per - 1), per)
