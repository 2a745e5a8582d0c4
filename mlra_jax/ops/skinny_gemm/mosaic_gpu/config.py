"""The static sizes of a call of the skinny GEMM kernel for Hopper GPUs, and how it is tiled."""

from __future__ import annotations

import dataclasses

from mlra_jax.ops.hopper import ROWS, SHARED_MEMORY

UNIT = 8
"""Rows of x and columns of the result come in multiples of this."""
MEMORY, CACHE = 3.0e6, 5.5e6
"""Bytes per microsecond that an H100 reads from memory, and through its L2 cache: for the heuristic."""
FEW_STAGES = 6
"""Blocks are halved if fewer than this fit in flight (4, for up to 16 rows)."""
PARTS_US = 2.0
"""What summing the shares of K costs at least."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of a call."""

    rows: int
    """Rows of x, a multiple of 8."""
    features: int
    """Columns of the result (F)."""
    depth: int
    """What is summed over (K)."""
    gated: bool
    """Whether there are two matrices, and the result is the gated product (SwiGLU)."""
    out_bytes: int
    """Bytes of an element of the result."""

    @property
    def matrices(self) -> int:
        """Matrices that are read side by side."""
        return 1 + self.gated


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiling of a call.

    Attributes:
      tile: columns of the result that a program makes at a time, a multiple of 8.
      tiles: how many of those a program makes, one after the other.
      splits: shares into which K is cut, each with programs of its own (split-K).
      block: elements of K that a program takes at a time: a multiple of 64 that divides K.
      stages: blocks in flight.
    """

    tile: int
    tiles: int
    splits: int
    block: int
    stages: int

    def programs(self, shape: Shape) -> int:
        """Programs along F, for each share of K."""
        return -(-shape.features // (self.tile * self.tiles))

    def stage_bytes(self, shape: Shape) -> int:
        """Bytes that a block takes in shared memory."""
        return 2 * self.block * (shape.matrices * self.tile + shape.rows)

    def shared_bytes(self, shape: Shape) -> int:
        """Bytes of shared memory of a program, at most."""
        out = ROWS * self.tile * (4 if self.splits > 1 else shape.out_bytes)
        padding = 2 * self.block * (ROWS - shape.rows)
        return self.stages * self.stage_bytes(shape) + padding + out + 2048

    def fill(self, shape: Shape) -> Config:
        """The same with as many stages as shared memory holds, but no more than a program has blocks."""
        left = SHARED_MEMORY - dataclasses.replace(self, stages=0).shared_bytes(shape)
        blocks = self.tiles * -(-(shape.depth // self.block) // self.splits)
        return dataclasses.replace(self, stages=min(left // self.stage_bytes(shape), blocks))

    def fits(self, shape: Shape) -> bool:
        """Whether the kernel can be tiled so."""
        return (
            shape.depth % self.block == 0
            and self.block % 64 == 0
            and self.tile % UNIT == 0
            and self.tile <= shape.features
            and not (shape.gated and self.splits > 1)  # the gate needs whole sums
            and self.splits <= shape.depth // self.block
            and self.stages >= 2
            and shape.rows % UNIT == 0
            and self.shared_bytes(shape) <= SHARED_MEMORY
        )

    def microseconds(self, shape: Shape, processors: int) -> float:
        """Estimated time: the slower of memory and cache, with all processors waiting for the last."""
        shares = self.programs(shape) * self.splits
        waves = -(-shares // processors)
        columns = waves * processors * self.tiles * self.tile / self.splits
        matrix = 2 * shape.matrices * columns * shape.depth
        rows = 2 * shares * self.tiles * shape.rows * shape.depth / self.splits
        parts = 8 * self.splits * shape.rows * shape.features / CACHE + PARTS_US if self.splits > 1 else 0
        return max(matrix / MEMORY, (matrix + rows) / CACHE) + parts

    @classmethod
    def heuristic(cls, shape: Shape, processors: int) -> Config | None:
        """The tiling with the shortest estimated time; None: there is none."""
        configs = []
        for splits in (1,) if shape.gated else (1, 2, 3, 4, 6, 8):
            programs = processors // splits
            for tiles in range(1, 9):
                tile = -(-shape.features // (programs * tiles * UNIT)) * UNIT
                config = cls(tile, tiles, splits, 128, 0).fill(shape)
                if shape.depth % 128 or config.stages < (4 if shape.rows <= 16 else FEW_STAGES):
                    config = dataclasses.replace(config, block=64).fill(shape)
                if tile * shape.matrices <= 256 and config.fits(shape):
                    configs.append(config)
        return min(configs, key=lambda c: c.microseconds(shape, processors), default=None)
