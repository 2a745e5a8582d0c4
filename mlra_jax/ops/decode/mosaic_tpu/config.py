"""How the TPU kernel is tiled, and all that it is compiled for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from mlra_jax.ops.columns import Columns
from mlra_jax.ops.decode.shape import Shape

LANES = 128
MAX_ROWS = 128
"""Most query rows of a tile."""


def row_tiles(shape: Shape) -> tuple[int, int]:
    """Tiles of query rows of a head, and rows of a tile, a multiple of 8."""
    tiles = -(-shape.rows // MAX_ROWS)
    return tiles, -(-shape.rows // (8 * tiles)) * 8


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes, in tokens; powers of two, each at least 128."""

    block: int
    """Copied and attended at a time, where every query sees all of it."""
    step: int
    """Of one softmax; a block holds several, which overlap."""
    tail: int
    """Copied and attended at a time past the last whole block, in two steps."""
    shares: int = 1
    """Cores that share the tokens of each row (1, or all cores of the device); with 1 they share the rows."""

    def fits(self, shape: Shape, info: Any) -> bool:
        """Whether a core's VMEM holds the blocks (see `heuristic`), and cores and sizes are divided evenly."""
        return (
            self.block <= _most_tokens(shape, info)
            and self.block % self.step == self.block % self.tail == 0
            and self.shares in (1, info.num_cores)
        )

    @classmethod
    def heuristic(cls, shape: Shape, info: Any) -> Config:
        """Block sizes that the compiler's estimates favour (benchmarks/results/tpu_static.md), within the core's VMEM.

        Args:
          shape: of the call.
          info: `pltpu.TpuInfo` of the TPU.
        """
        cores = info.num_cores
        # Cores take a share of every row where rows are long or do not divide among them, else whole rows.
        long = shape.capacity >= 8192 * 4 * cores
        shares = cores if cores > 1 and (shape.batch % cores or long) else 1
        wanted = min(16384, max(8192, shape.capacity // shares // 16))
        block = max(LANES, _power_of_two(min(wanted, shape.capacity, _most_tokens(shape, info))))
        # Two steps at least, so that one overlaps the other; long ones wait less often for a reduction over lanes.
        return cls(block=block, step=min(4096, max(block // 2, LANES)), tail=min(2048, block), shares=shares)


def _most_tokens(shape: Shape, info: Any) -> int:
    """Tokens of a block in half of VMEM: two buffers; a step's scores, weights and values take a few times as much."""
    return info.vmem_capacity_bytes // 2 // (2 * shape.token_bytes + 8 * row_tiles(shape)[1])


def _power_of_two(n: int) -> int:
    return 1 << (n.bit_length() - 1)


@dataclasses.dataclass(frozen=True)
class Pool:
    """Where in a pool [P, S, pairs, 2, width] of a serving engine a token's latents and rotary key lie."""

    pairs: int
    """Pairs of slots of a token. A pair is 32 bits of each lane: an even slot in the low ones, the odd one above."""
    width: int
    """Of a slot, a multiple of 128."""
    parts: tuple[tuple[int, int], ...]
    """Of each part of the key, the slot of the first head, and how many slots lie from a head to the next."""

    @classmethod
    def of(cls, keys: Sequence[Columns]) -> Pool:
        """Of the parts of the key.

        Raises:
          NotImplementedError: the kernel does not read such columns.
        """
        *shape, two, width = keys[0].array.shape
        if len(shape) < 2 or two != 2 or width % LANES:
            raise NotImplementedError(
                "It reads pools [P, S, ..., 2, 128] or of a larger multiple of 128, in which two bfloat16 slots share "
                f"the 32 bits of a lane; got {list(keys[0].array.shape)}."
            )
        parts = []
        for key in keys:
            slots = [start / width for start in key.starts]
            step = slots[1] - slots[0] if len(slots) > 1 else 0
            whole = all(slot.is_integer() for slot in slots) and step % 2 == 0
            if not whole or not key.evenly_spaced or key.width > width:
                raise NotImplementedError(
                    f"It reads one slot of {width} columns for each head, from its start on, at equal distances of an "
                    f"even number of slots; got {key.width} columns from each of {list(key.starts)} on."
                )
            parts.append((int(slots[0]), int(step)))
        return cls(math.prod(shape[2:]), width, tuple(parts))


@dataclasses.dataclass(frozen=True)
class Program:
    """All that is known when the kernel is compiled."""

    shape: Shape
    config: Config
    cores: int
    scale: float
    static: bool
    """For the compiler's estimate: every row is full, which is known when compiling, and no block is copied."""
    pool: Pool | None = None
    """None: keys and values are feature-major arrays."""

    @property
    def tiles(self) -> int:
        """Tiles of query rows of each head."""
        return row_tiles(self.shape)[0]

    @property
    def rows(self) -> int:
        """Query rows of a tile."""
        return row_tiles(self.shape)[1]

    @property
    def row_pages(self) -> int:
        """Pages of a row."""
        return self.shape.row_pages or 1

    @property
    def items(self) -> int:
        """Rows of the batch that one core attends to."""
        return self.shape.batch if self.config.shares > 1 else self.shape.batch // self.cores
