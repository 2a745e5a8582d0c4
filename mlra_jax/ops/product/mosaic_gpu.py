"""Products of few rows with a large matrix on Hopper GPUs: a Pallas Mosaic GPU kernel that reads the matrix once.

A program makes some columns of the result. One warpgroup issues the copies of blocks of the matrix, with the rows'
part that belongs to them, into a ring in shared memory; the other multiplies. The tensor cores' product always has 64
rows, used or not; its columns are a program's columns of the result, in any multiple of 8: so all processors get the
same share of almost any matrix. Many rows take more of the second-level cache's bandwidth than the matrix does: then
what is summed over is split as well, and parts are summed after, in a fixed order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mlra_jax.ops.hopper import ROWS, SHARED_MEMORY, check_device, plgpu, transforms
from mlra_jax.ops.shard_map_utils import unchecked

UNIT = 8
"""Rows of x, and columns of the result, come in multiples of this."""
MIN_BYTES = 4 * 1024**2
"""Of the matrix: smaller ones are read before a kernel of ours is under way."""
MAX_BYTES = 256 * 1024**2
"""Larger ones XLA reads as fast, or faster (a token matrix of 309 MB on an H100: 111 us, and 116 by this kernel)."""
MEMORY, CACHE = 3.0e6, 5.5e6
"""Bytes a microsecond that an H100 reads from memory, and through its second-level cache: for the heuristic."""
FEW_STAGES = 6
"""With fewer blocks in flight (with fewer than 4, for up to 16 rows) blocks are cut in two."""
PARTS_US = 2.0
"""What summing parts costs at least."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of a call."""

    rows: int
    """Of x, a multiple of 8."""
    features: int
    """F, of the result."""
    depth: int
    """K, what is summed over."""
    gated: bool
    """Whether there are two matrices, and the result is the gated product."""
    out_bytes: int
    """Of an element of the result."""

    @property
    def matrices(self) -> int:
        """That are read side by side."""
        return 1 + self.gated


@dataclasses.dataclass(frozen=True)
class Config:
    """How a call is cut.

    Attributes:
      tile: columns of the result that a program makes at a time, a multiple of 8.
      tiles: that a program makes one after the other.
      splits: shares into which K is cut, each of programs of its own.
      block: of K, that a program takes at a time: a multiple of 64 that divides K.
      stages: blocks in flight.
      cluster: programs side by side that copy each block of x together, once for all of them.
    """

    tile: int
    tiles: int
    splits: int
    block: int
    stages: int
    cluster: int = 1

    def programs(self, shape: Shape) -> int:
        """Along F, for each share of K: whole clusters."""
        return -(-shape.features // (self.tile * self.tiles * self.cluster)) * self.cluster

    def stage_bytes(self, shape: Shape) -> int:
        """Bytes that a block takes in shared memory."""
        return 2 * self.block * (shape.matrices * self.tile + shape.rows)

    def shared_bytes(self, shape: Shape) -> int:
        """Bytes of shared memory of a program, at most."""
        out = ROWS * self.tile * (4 if self.splits > 1 else shape.out_bytes)
        padding = 2 * self.block * (ROWS - shape.rows)
        return self.stages * self.stage_bytes(shape) + padding + out + 2048

    def fill(self, shape: Shape) -> Config:
        """With as many stages as shared memory holds, and no more than a program has blocks."""
        left = SHARED_MEMORY - dataclasses.replace(self, stages=0).shared_bytes(shape)
        blocks = self.tiles * -(-(shape.depth // self.block) // self.splits)
        return dataclasses.replace(self, stages=min(left // self.stage_bytes(shape), blocks))

    def fits(self, shape: Shape) -> bool:
        """Whether the kernel can be cut so."""
        return (
            shape.depth % self.block == 0
            and self.block % 64 == 0
            and self.tile % UNIT == 0
            and self.tile <= shape.features
            and not (shape.gated and self.splits > 1)  # the gate needs whole sums
            and self.splits <= shape.depth // self.block
            and self.stages >= 2
            and shape.rows % (UNIT * self.cluster) == 0
            and self.shared_bytes(shape) <= SHARED_MEMORY
        )

    def microseconds(self, shape: Shape, processors: int) -> float:
        """What the slowest of memory and cache takes, with all processors waiting for the last."""
        shares = self.programs(shape) * self.splits
        turns = -(-shares // processors)
        columns = turns * processors * self.tiles * self.tile / self.splits
        matrix = 2 * shape.matrices * columns * shape.depth
        rows = 2 * shares * self.tiles * shape.rows * shape.depth / self.splits
        parts = 8 * self.splits * shape.rows * shape.features / CACHE + PARTS_US if self.splits > 1 else 0
        return max(matrix / MEMORY, (matrix + rows) / CACHE) + parts

    @classmethod
    def heuristic(cls, shape: Shape, processors: int) -> Config | None:
        """The cut that should be fastest; None: there is none."""
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


def _kernel(
    x_ref: Any,  # bfloat16 [rows, K]
    w_ref: Any,  # bfloat16 [1 or 2, F, K]
    out_ref: Any,  # [splits, rows, F]
    x_smem: Any,  # [stages * rows + what is missing to 64, block]
    w_smem: Any,  # [1 or 2, stages, tile, block]
    out_smem: Any,  # [64, tile]
    full: Any,
    free: Any,
    *,
    shape: Shape,
    config: Config,
    pitch: int,
) -> None:
    tile, block, stages = config.tile, config.block, config.stages
    group, split, wg = (lax.axis_index(name) for name in ("group", "split", "wg"))
    program = group * config.cluster + (lax.axis_index("member") if config.cluster > 1 else 0)
    together = "member" if config.cluster > 1 else None
    blocks = shape.depth // block
    first = lax.div(split * blocks, config.splits)
    steps = lax.div((split + 1) * blocks, config.splits) - first
    # The last tiles overlap, so that all are whole: what they have in common is made twice, and the same.
    column = lambda t: jnp.minimum((program * config.tiles + t) * tile, shape.features - tile)
    total = config.tiles * steps

    @pl.when(wg == 1)
    def _copy() -> None:
        def one(n: jax.Array, _: None) -> None:
            slot, t = lax.rem(n, stages), lax.div(n, steps)
            pl.when(n >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            at = pl.ds((first + n - t * steps) * block, block)
            for g in range(shape.matrices):
                source = w_ref.at[g, pl.ds(column(t), tile), at]
                plgpu.copy_gmem_to_smem(source, w_smem.at[g, slot], full.at[slot])
            target = x_smem.at[pl.ds(slot * pitch, shape.rows)]
            plgpu.copy_gmem_to_smem(x_ref.at[:, at], target, full.at[slot], collective_axes=together)

        lax.fori_loop(0, total, one, None)
        # A barrier must not be left before all its phases were seen.
        drain = lambda n, _: plgpu.barrier_wait(free.at[lax.rem(n, stages)])
        lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, None)

    @pl.when(wg == 0)
    def _multiply() -> None:
        def one(t: jax.Array, _: None) -> None:
            def sums(*accs: Any) -> list[jax.Array]:
                def step(k: jax.Array, _: None) -> None:
                    n = t * steps + k
                    slot = lax.rem(n, stages)
                    plgpu.barrier_wait(full.at[slot])
                    # Fewer rows than 64 are followed by others, or by anything: of no use, and of no effect on them.
                    x = x_smem.at[pl.ds(slot * pitch, ROWS)]
                    for g, acc in enumerate(accs):
                        plgpu.wgmma(acc, x, w_smem.at[g, slot].transpose((1, 0)))
                    plgpu.wgmma_wait(len(accs))  # for the block before
                    pl.when(k > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(n - 1, stages)]))

                lax.fori_loop(0, steps, step, None)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[lax.rem((t + 1) * steps - 1, stages)])
                return [acc[...] for acc in accs]

            y, *up = pl.run_scoped(sums, *[plgpu.ACC((ROWS, tile), jnp.float32)] * shape.matrices)
            if up:
                y = y / (1 + jnp.exp(-y)) * up[0]
            out_smem[...] = y.astype(out_ref.dtype)
            plgpu.commit_smem()
            target = out_ref.at[split, :, pl.ds(column(t), tile)]
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, shape.rows)], target)
            plgpu.wait_smem_to_gmem(0)

        lax.fori_loop(0, config.tiles, one, None)


@functools.partial(jax.jit, static_argnames=("config", "gated", "dtype", "interpret"))  # once for all layers
def _run(
    x: jax.Array, w: jax.Array, *, config: Config, gated: bool, dtype: jnp.dtype, interpret: Any
) -> jax.Array:
    """[rows, F] of x [rows, K] and w [1 or 2, F, K]."""
    rows = len(x)
    x = jnp.pad(x, ((0, -rows % UNIT), (0, 0)))
    shape = Shape(len(x), w.shape[1], w.shape[2], gated, dtype.itemsize)
    # The interpreter would see a race between a block's rows and what is copied behind them.
    pitch = ROWS if interpret is not None else shape.rows
    bf16 = lambda *s: plgpu.SMEM(s, jnp.bfloat16, transforms=transforms(64))
    part = jnp.dtype(jnp.float32) if config.splits > 1 else dtype
    free = functools.partial(plgpu.Barrier, num_arrivals=1, num_barriers=config.stages)
    cluster = {}
    if config.cluster > 1:  # a slot is free when all of them have used what it holds
        free = functools.partial(
            plgpu.ClusterBarrier, collective_axes=("member",), num_barriers=config.stages
        )
        cluster = {"cluster": (config.cluster,), "cluster_names": ("member",)}
    parts = plgpu.kernel(
        functools.partial(_kernel, shape=shape, config=config, pitch=pitch),
        out_type=jax.ShapeDtypeStruct((config.splits, shape.rows, shape.features), part),
        scratch_types=[
            bf16(config.stages * pitch + ROWS - pitch, config.block),
            bf16(shape.matrices, config.stages, config.tile, config.block),
            plgpu.SMEM((ROWS, config.tile), part),
            plgpu.Barrier(num_arrivals=shape.matrices + 1, num_barriers=config.stages),
            free(),
        ],
        grid=(config.programs(shape) // config.cluster, config.splits),
        grid_names=("group", "split"),
        **cluster,
        num_threads=2,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="swiglu" if gated else "product",
    )(x, w)
    return (parts.sum(axis=0) if config.splits > 1 else parts[0])[:rows].astype(dtype)


def _call(
    x: jax.Array, w: jax.Array, gated: bool, dtype: jnp.dtype, config: Config | None, interpret: Any
) -> jax.Array:
    processors = check_device(interpret)[1]
    rows, depth = x.shape
    if (x.dtype, w.dtype) != (jnp.bfloat16, jnp.bfloat16):
        raise NotImplementedError(
            f"the Mosaic GPU kernel multiplies bfloat16 with bfloat16; got {x.dtype} and {w.dtype}."
        )
    if not 2 <= rows <= ROWS:
        raise NotImplementedError(f"the Mosaic GPU kernel multiplies 2 to {ROWS} rows; got {rows}.")
    if depth % 64 or w.shape[1] % UNIT:
        raise NotImplementedError(
            "the Mosaic GPU kernel takes matrices of a multiple of 8 rows of a multiple of 64 elements; "
            f"got {w.shape[1]} of {depth}."
        )
    size = 2 * math.prod(w.shape)
    if config is None and interpret is None and not MIN_BYTES <= size <= MAX_BYTES:
        raise NotImplementedError(f"the Mosaic GPU kernel is for matrices of 4 to 256 MiB; got {size} bytes.")
    shape = Shape(-(-rows // UNIT) * UNIT, w.shape[1], depth, gated, dtype.itemsize)
    config = config or Config.heuristic(shape, processors)
    if config is None or not config.fits(shape):
        raise NotImplementedError(f"the Mosaic GPU kernel has no cut for {shape}; got {config}.")
    run = functools.partial(_run, config=config, gated=gated, dtype=dtype, interpret=interpret)
    return unchecked(lambda _, x, w: run(x, w))(None, x, w)


def takes_rows(rows: int, dtype: jnp.dtype) -> bool:
    """Whether the kernel multiplies so many rows of this type with a large matrix.

    Raises:
      NotImplementedError: the current device is no Hopper GPU.
    """
    check_device(None)
    return 2 <= rows <= ROWS and dtype == jnp.bfloat16


def product(
    x: jax.Array, w: jax.Array, *, dtype: jnp.dtype, config: Config | None = None, interpret: Any = None
) -> jax.Array:
    """See `mlra_jax.ops.product.product`.

    Args:
      x: bfloat16 [rows, K].
      w: bfloat16 [F, K].
      dtype: of the result.
      config: how the call is cut; None: as the heuristic says.
      interpret: `plgpu.InterpretGPUParams` run the kernel on the CPU.

    Raises:
      NotImplementedError: this is no Hopper GPU, or the arguments are not what the kernel takes.
    """
    return _call(x, w[None], False, dtype, config, interpret)


def swiglu(x: jax.Array, w: jax.Array, *, config: Config | None = None, interpret: Any = None) -> jax.Array:
    """See `mlra_jax.ops.product.swiglu`, and `product` for arguments and errors."""
    return _call(x, w, True, jnp.dtype(x.dtype), config, interpret)
