"""How the decode kernel for Hopper GPUs is tiled."""

from __future__ import annotations

import dataclasses

from mlra_jax.ops.decode.shape import Shape
from mlra_jax.ops.hopper import ROWS, SHARED_MEMORY

LONG = 48
"""Blocks of each of two streams from which they are faster than one (docs/kernels.md)."""
MAX_PAGES = 4
"""From which a block is gathered; the copies of more would not fit into the producer's registers."""


def value_groups(shape: Shape) -> int:
    """Warpgroups that share the columns of the output: 256 float32 columns fill half of one's registers."""
    return max(1, shape.v_width // 256)


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiling of a call.

    Attributes:
      n_splits: shares into which the tokens of all sequences, laid end to end, are cut for each tile of query rows; the
        partial results are merged afterwards. One: each program takes a whole sequence, and there is nothing to merge.
      block: tokens that a program takes at a time: 64 or 128; a divisor or a multiple of the page size.
      stages: blocks in flight, 2 or more.
      row_groups: warpgroups of a program, each with 64 query rows of its own, that share its blocks.
      streams: shares that a program works on side by side, each with a ring, a producer and consumers of its own: the
        tensor cores multiply for one while another makes weights.
    """

    n_splits: int
    block: int
    stages: int
    row_groups: int = 1
    streams: int = 1

    def shares(self, shape: Shape) -> int:
        """Shares, or whole sequences, of each tile."""
        return shape.batch if self.n_splits == 1 else self.n_splits

    def tiles(self, shape: Shape) -> int:
        """Tiles of query rows of a head, one for each program."""
        return -(-shape.rows // (ROWS * self.row_groups))

    def stages_output(self, shape: Shape) -> bool:
        """Whether outputs go through shared memory: final ones, unless several warpgroups hold parts of a row."""
        return self.n_splits == 1 and value_groups(shape) == 1

    def shared_bytes(self, shape: Shape) -> int:
        """Bytes of shared memory of a program, at most: queries, blocks, weights, and what is small."""
        queries = 2 * self.row_groups * ROWS * sum(shape.widths)
        if self.stages_output(shape) and shape.v_width != shape.widths[0]:
            queries += 2 * self.row_groups * ROWS * shape.v_width  # for outputs; else over the queries
        block = 2 * self.block * (sum(shape.widths) + (0 if shape.latent else shape.v_width))
        weights = 2 * ROWS * self.block if value_groups(shape) > 1 else 0
        rotation = 2 * self.row_groups * shape.widths[-1] ** 2 if shape.rotary else 0
        return self.streams * (queries + self.stages * block + weights + rotation) + 2304

    def pages(self, shape: Shape) -> int:
        """Pages from which a block is gathered."""
        return max(1, self.block // shape.page_size)

    def fits(self, shape: Shape) -> bool:
        """Whether pages hold whole blocks or blocks whole pages, and shared memory holds what a program needs."""
        whole = shape.page_size % self.block == 0
        if shape.row_pages is not None:
            whole |= self.block % shape.page_size == 0 and self.pages(shape) <= MAX_PAGES
        even = self.shares(shape) % self.streams == 0
        return whole and even and self.shared_bytes(shape) <= SHARED_MEMORY

    @classmethod
    def heuristic(cls, shape: Shape, processors: int) -> Config:
        """A tiling that fits the GPU (docs/kernels.md has the measurements behind it)."""
        row_groups = 2 if shape.rows > ROWS and value_groups(shape) == 1 else 1
        tiles = shape.heads * cls(1, 64, 4, row_groups).tiles(shape)
        # A single program for each sequence spares the merge, where that keeps all processors at work.
        programs = tiles * shape.batch
        whole = 0.9 * processors <= programs <= processors or programs >= 4 * processors
        n_splits = 1 if whole else max(1, processors // tiles)
        # Shares that end where sequences of equal length do spare programs the change from one to the next.
        even = n_splits // shape.batch * shape.batch
        n_splits = even if even >= 0.95 * n_splits else n_splits
        # No more shares than it takes with the longest one as long as it is: the rest would only be merged.
        n_blocks = shape.batch * -(-shape.capacity // 64)
        n_splits = -(-n_blocks // -(-n_blocks // n_splits))
        # Long runs over many rows are bound by arithmetic: larger blocks have fewer steps between products.
        large = row_groups == 2 and sum(shape.widths) <= 192
        block = 128 if large and cls(n_splits, 128, 2, row_groups).fits(shape) else 64
        stages = 3 if n_splits > 1 and row_groups == 1 and sum(shape.widths) <= 192 else 4
        config = cls(n_splits, block, stages, row_groups)
        # Where memory is fast or shares are long, a single consumer's turns between products and softmax take longer.
        two = cls(2 * max(1, processors // tiles), 64, 2, 1, streams=2)
        if n_splits > 1 and row_groups == 1 and n_blocks >= LONG * two.n_splits and two.fits(shape):
            narrow = shape.latent and value_groups(shape) == 1
            config = two if narrow else config
        while config.stages > 2 and config.shared_bytes(shape) > SHARED_MEMORY:
            config = dataclasses.replace(config, stages=config.stages - 1)
        return config
