"""How the Triton kernels are tiled."""

from __future__ import annotations

import dataclasses
import math

from mlra_jax.execution.accelerators import Accelerator
from mlra_jax.ops.decode.shape import Shape

MAX_SPLITS = 256
"""Most splits of a row; the kernel that merges them takes them all at once."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiling of the kernel. Sizes of blocks are powers of two from 16."""

    block_rows: int
    """Query rows of one program."""
    block_tokens: int
    """Tokens that it takes at a time; a page holds a whole number of them."""
    splits: int
    """Programs among which the tokens of a row are divided."""
    warps: int
    stages: int
    """Blocks of tokens in flight, each of block_tokens x (key + value) widths of shared memory."""

    @classmethod
    def heuristic(cls, shape: Shape, chip: Accelerator) -> Config:
        """A tiling that fits the GPU."""
        rows, key_width, value_width = shape.rows, sum(shape.widths), shape.v_width
        # Scores and sums of a tile live in registers, its queries in shared memory: the wider a row, the fewer rows.
        width = value_width + max(key_width, value_width)
        most_rows = 64 if width <= 384 else 32 if width <= 640 else 16
        block_rows = max(16, min(most_rows, power_of_two(rows)))
        block_tokens = 64 if width <= 640 else 32

        def stages_for(resident: int) -> int:
            """Most blocks in flight that leave room for so many programs on a processor, which keeps 1 KiB of each."""
            queries = block_rows * (2 * key_width + 2 * block_tokens)  # and weights
            block = 2 * block_tokens * (key_width if shape.latent else key_width + value_width)
            left = (chip.shared_bytes + 1024) // resident - 1024 - queries
            return min(4, left // block + (chip.capability < 90))

        while block_tokens > 16 and (stages_for(1) < 2 or not cls.holds_whole_blocks(shape, block_tokens)):
            block_tokens //= 2
        # Before Hopper one program's softmax hides behind another's products.
        resident = 2 if chip.capability < 90 and stages_for(2) >= 2 else 1
        stages = max(1, stages_for(resident))

        programs = shape.batch * shape.heads * math.ceil(rows / block_rows)
        blocks = math.ceil(shape.capacity / block_tokens)
        at_once = chip.processors * resident

        def time(splits: int) -> float:
            """Blocks that the busiest processor takes; starting a program, and merging its output, count as more."""
            waves = math.ceil(programs * splits / at_once)
            return waves * (math.ceil(blocks / splits) + 4) + splits / 32

        splits = min(range(1, max(1, min(MAX_SPLITS, blocks // 4)) + 1), key=time)
        return cls(block_rows, block_tokens, splits, warps=4, stages=stages)

    @staticmethod
    def holds_whole_blocks(shape: Shape, block_tokens: int) -> bool:
        """Whether a page is a multiple of a block; a contiguous cache may end in a part of one."""
        return shape.row_pages is None or shape.page_size % block_tokens == 0

    def fits(self, shape: Shape, chip: Accelerator) -> bool:
        """Whether pages hold whole blocks, and shared memory queries, weights and blocks."""
        key, value = sum(shape.widths), 0 if shape.latent else shape.v_width
        queries = 2 * self.block_rows * (key + self.block_tokens)
        blocks = 2 * self.stages * self.block_tokens * (key + value)
        return self.holds_whole_blocks(shape, self.block_tokens) and queries + blocks <= chip.shared_bytes


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
