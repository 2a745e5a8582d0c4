"""When the TPU kernel applies, and how it is called."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mlra_jax.ops import device
from mlra_jax.ops.columns import Columns
from mlra_jax.ops.decode.back_end import DecodeKernel
from mlra_jax.ops.decode.mosaic_tpu.config import LANES, Config, Pool, Program
from mlra_jax.ops.decode.mosaic_tpu.kernel import kernel
from mlra_jax.ops.decode.reference import Arguments
from mlra_jax.ops.decode.shape import Shape
from mlra_jax.ops.decode.xla import merge


@dataclasses.dataclass(frozen=True)
class MosaicTPU(DecodeKernel[Config]):
    """bfloat16 in and out, float32 softmax and sums; `interpret=pltpu.InterpretParams()` runs its copies too."""

    info: pltpu.TpuInfo | None = None
    """Of the TPU; None: of the current one."""
    static: bool = False
    """For the compiler's estimate (benchmarks/tpu_static.py): every row is full, which is known when compiling, and no
    block is copied. The result is meaningless."""

    name: ClassVar[str] = "mosaic_tpu"
    config_type = Config

    def target(self) -> pltpu.TpuInfo:
        """The TPU that is compiled for."""
        return self.info or device.tpu_info()

    def check(self, args: Arguments) -> Shape:
        """The sizes of a call."""
        pooled = isinstance(args.cached[0], Columns)
        if args.layout != "feature_major" and not pooled:
            raise NotImplementedError(
                "It needs a feature_major cache, or columns of a serving engine's pool."
            )
        if any(x.dtype != jnp.bfloat16 for x in (*args.cached, *(q for q, _ in args.parts))):
            raise NotImplementedError("It needs queries and a cache in bfloat16.")
        if args.scale <= 0:
            raise NotImplementedError(f"It needs a positive scale; got {args.scale}.")
        shape = Shape.of(args)
        for _, width in shape.cached:
            if width % 16 or width > 512:
                raise NotImplementedError(
                    f"It needs widths that are multiples of 16, at most 512; got {width}."
                )
        if pooled:
            _pool_of(args)
        elif shape.page_size % LANES:
            raise NotImplementedError(
                f"It needs pages of a multiple of {LANES} tokens; got {shape.page_size}."
            )
        if (size := 4 * shape.batch * (shape.row_pages or 1)) > self.target().smem_capacity_bytes // 2:
            raise NotImplementedError(f"A page table of {size} bytes does not fit the core's scalar memory.")
        return shape

    def run(self, shape: Shape, config: Config, args: Arguments) -> tuple[jax.Array, jax.Array]:
        """Runs the kernel."""
        info, args = self.target(), args.expanded()
        b, t, heads, m = args.score_shape
        cores = info.num_cores if config.shares == 1 and b % info.num_cores == 0 else config.shares
        pool = _pool_of(args)
        program = Program(shape, config, cores, args.scale, self.static, pool)
        tiles, rows = program.tiles, program.rows
        kv_len_BT = jnp.clip(args.kv_len, 0, shape.capacity)
        q = jnp.concatenate([q for q, _ in args.parts], axis=-1).swapaxes(1, 2).reshape(b, heads, t * m, -1)
        padding = (0, tiles * rows - t * m)
        q = jnp.pad(q, ((0, 0), (0, 0), padding, (0, 0))).reshape(b, heads * tiles, rows, -1)
        seen = jnp.pad(jnp.repeat(kv_len_BT, m, axis=1), ((0, 0), padding)).reshape(b, tiles, 1, rows)
        page_table = args.page_table
        if page_table is None:
            page_table = jnp.arange(b, dtype=jnp.int32)[:, None]
        inputs = (
            kv_len_BT.max(axis=1),
            kv_len_BT.min(axis=1),
            page_table.reshape(-1),
            seen,
            q,
            *args.cached,
        )
        if pool is not None:
            buffer: Any = args.parts[0][1]
            buffer = buffer.array.reshape(*buffer.shape[::2], pool.pairs, 2, pool.width)
            inputs = *inputs[:5], buffer
        # Inside `shard_map`, what comes out differs between devices wherever something that goes in does.
        varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in inputs))
        out, lse = _call(program, info, self.interpret or False, varying)(*inputs)
        lse = lse.reshape(*out.shape[:-1])
        out, lse = functools.reduce(lambda x, y: merge(*x, *y), zip(out, lse, strict=True))
        by_query = lambda x: (
            x.reshape(b, heads, tiles * rows, *x.shape[3:])[:, :, : t * m]
            .reshape(b, heads, t, m, *x.shape[3:])
            .swapaxes(1, 2)
        )
        return by_query(out).astype(args.parts[0][0].dtype), by_query(lse)


def _pool_of(args: Arguments) -> Pool | None:
    keys = [x for x in args.cached if isinstance(x, Columns)]
    return Pool.of(keys) if keys else None


def _call(
    program: Program, info: pltpu.TpuInfo, interpret: Any, varying: frozenset[str]
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The kernel as a function of what it reads; its outputs by share, row of the batch, head and tile."""
    shape, shares, block = program.shape, program.config.shares, program.config.block
    tiles, rows, v, key = shape.heads * program.tiles, program.rows, shape.v_width, sum(shape.widths)

    def of_row(*block: int, outputs: bool = False) -> pl.BlockSpec:
        zeros = (0,) * len(block)

        def index(core: jax.Array, item: jax.Array, *_: Any) -> tuple[jax.Array | int, ...]:
            row = item if shares > 1 else core * program.items + item
            share = core if shares > 1 else 0
            return (share, row, *zeros) if outputs else (row, *zeros)

        return pl.BlockSpec((1, 1, *block) if outputs else (1, *block), index)

    output = lambda block, dtype: jax.ShapeDtypeStruct(
        (shares, shape.batch, *block), dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=varying)
    )
    tokens = shape.batch * shape.capacity
    buffers: list[tuple[int, ...]] = [(heads, width, block) for heads, width in shape.cached]
    if program.pool is not None:
        buffers = [(block, program.pool.pairs, 2, program.pool.width)]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(program.cores, program.items),
        in_specs=[
            of_row(program.tiles, 1, rows),
            of_row(tiles, rows, key),
            *[pl.BlockSpec(memory_space=pl.ANY)] * len(buffers),
        ],
        out_specs=[of_row(tiles, rows, v, outputs=True), of_row(tiles, 1, rows, outputs=True)],
        scratch_shapes=[
            *[pltpu.VMEM((2, *sizes), jnp.bfloat16) for sizes in buffers],
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SMEM((2,), jnp.int32),
            pltpu.VMEM((tiles, rows, LANES), jnp.float32),
            pltpu.VMEM((tiles, rows, LANES), jnp.float32),
            pltpu.VMEM((tiles, rows, v), jnp.float32),
        ],
    )
    return pl.pallas_call(
        functools.partial(kernel, program),
        grid_spec=grid,
        out_shape=[
            output((tiles, rows, v), jnp.bfloat16 if shares == 1 else jnp.float32),
            output((tiles, 1, rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=info.vmem_capacity_bytes * 7 // 8
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * tiles * rows * (key + v),
            transcendentals=tokens * tiles * rows,
            bytes_accessed=tokens * shape.token_bytes + 2 * shape.batch * tiles * rows * (key + v),
        ),
        interpret=interpret,
        name="decode_attention",
    )
