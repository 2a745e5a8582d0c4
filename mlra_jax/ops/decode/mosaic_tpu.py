"""Decode attention on TPU: the kernel of `mosaic_tpu_kernel` over a feature-major cache, its limits and block sizes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mlra_jax.ops.decode.mosaic_tpu_kernel import LANES, Ref, Shape, kernel
from mlra_jax.ops.decode.reference import Parts, unabridged
from mlra_jax.ops.decode.xla import merge

MAX_ROWS = 128
"""Most query rows of a tile."""


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


def heuristic(
    *,
    widths: tuple[tuple[int, int], ...],
    rows: int,
    batch: int,
    capacity: int,
    info: pltpu.TpuInfo,
) -> Config:
    """Block sizes that the compiler's estimates favour (benchmarks/results/tpu_static.md), within the core's VMEM.

    Args:
      widths: heads and width of each cached array.
      rows: query rows of a tile.
      batch: rows of the batch.
      capacity: tokens that a row has room for.
      info: of the TPU.
    """
    bytes_per_token = sum(heads * width for heads, width in widths) * 2
    cores = info.num_cores
    # Cores take a share of every row where rows are long or do not divide among them, else whole rows.
    shares = cores if cores > 1 and (batch % cores or capacity >= 8192 * 4 * cores) else 1
    # Two buffers; a step's scores, weights and turned values take a few times the bytes of one. Half of VMEM for all.
    fits = info.vmem_capacity_bytes // 2 // (2 * bytes_per_token + 8 * rows)
    wanted = min(16384, max(8192, capacity // shares // 16))
    block = _power_of_two(min(wanted, capacity, fits))
    # Two steps at least, so that one overlaps the other; long ones, which wait less often for a reduction over lanes.
    return Config(block=block, step=min(4096, max(block // 2, LANES)), tail=min(2048, block), shares=shares)


def _power_of_two(n: int) -> int:
    return 1 << (n.bit_length() - 1)


def tpu_info() -> pltpu.TpuInfo:
    """The TPU that the enclosing mesh, or else JAX's default device, is made of.

    Raises:
      NotImplementedError: it is no TPU.
    """
    try:
        return pltpu.get_tpu_info()
    except ValueError as e:
        raise NotImplementedError("It needs a TPU.") from e


@unabridged
def decode_attention(
    parts: Parts,
    v: jax.Array | None,
    kv_len_BT: jax.Array,
    *,
    scale: float,
    page_table: jax.Array | None = None,
    layout: str = "token_major",
    config: Config | None = None,
    interpret: bool | pltpu.InterpretParams = False,
    info: pltpu.TpuInfo | None = None,
    static: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `mlra_jax.ops.decode.reference.decode_attention`.

    Args:
      parts: pairs of queries and keys, bfloat16.
      v: values; None: the keys of the first part.
      kv_len_BT: how many of the leading tokens each query sees.
      scale: multiplies the scores.
      page_table: pages of each row.
      layout: `feature_major`.
      config: block sizes; None: `heuristic`.
      interpret: runs the kernel on the CPU: True, or with `pltpu.InterpretParams`, its copies too.
      info: of the TPU; None: of the current one.
      static: for the compiler's estimate (benchmarks/tpu_static.py): every row is full, which is known when compiling,
        and no block is copied. The result is meaningless.

    Raises:
      NotImplementedError: not a TPU, not a feature-major bfloat16 cache, or sizes that its tiles do not fit.
    """
    if layout != "feature_major":
        raise NotImplementedError("It needs a feature_major cache.")
    arrays = [k for _, k in parts] + ([] if v is None else [v])
    if any(x.dtype != jnp.bfloat16 for x in (*arrays, *(q for q, _ in parts))):
        raise NotImplementedError("It needs queries and a cache in bfloat16.")
    if scale <= 0:
        raise NotImplementedError(f"It needs a positive scale; got {scale}.")
    for x in arrays:
        width, slots = x.shape[-2:]
        if width % 16 or width > 512:
            raise NotImplementedError(f"It needs widths that are multiples of 16, at most 512; got {width}.")
        if slots % LANES:
            raise NotImplementedError(f"It needs pages of a multiple of {LANES} tokens; got {slots}.")
    info = info or tpu_info()

    b, t, heads, m, _ = parts[0][0].shape
    page_slots, row_pages = arrays[0].shape[-1], 1 if page_table is None else page_table.shape[1]
    if (size := 4 * b * row_pages) > info.smem_capacity_bytes // 2:
        raise NotImplementedError(f"A page table of {size} bytes does not fit the core's scalar memory.")
    tiles = -(-t * m // MAX_ROWS)
    rows = -(-t * m // (8 * tiles)) * 8
    widths = tuple((x.shape[1], x.shape[2]) for x in arrays)
    kv_len_BT = jnp.clip(kv_len_BT, 0, page_slots * row_pages)
    config = config or heuristic(
        widths=widths, rows=rows, batch=b, capacity=page_slots * row_pages, info=info
    )
    cores = info.num_cores if config.shares == 1 and b % info.num_cores == 0 else config.shares
    shape = Shape(
        widths=widths,
        parts=len(parts),
        heads=heads,
        tiles=tiles,
        rows=rows,
        page_slots=page_slots,
        row_pages=row_pages,
        block=config.block,
        step=config.step,
        tail=config.tail,
        items=b if config.shares > 1 else b // cores,
        shares=config.shares,
        scale=scale,
        static=static,
    )
    q = jnp.concatenate([q for q, _ in parts], axis=-1).swapaxes(1, 2).reshape(b, heads, t * m, -1)
    padding = (0, tiles * rows - t * m)
    q = jnp.pad(q, ((0, 0), (0, 0), padding, (0, 0))).reshape(b, heads * tiles, rows, -1)
    seen = jnp.pad(jnp.repeat(kv_len_BT, m, axis=1), ((0, 0), padding)).reshape(b, tiles, 1, rows)
    if page_table is None:
        page_table = jnp.arange(b, dtype=jnp.int32)[:, None]
    inputs = (kv_len_BT.max(axis=1), kv_len_BT.min(axis=1), page_table.reshape(-1), seen, q, *arrays)
    # Inside `shard_map`, what comes out differs between devices wherever something that goes in does.
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in inputs))
    out, lse = _call(shape, cores, info, interpret, varying)(*inputs)
    lse = lse.reshape(*out.shape[:-1])
    out, lse = functools.reduce(lambda x, y: merge(*x, *y), zip(out, lse, strict=True))
    by_query = lambda x: (
        x.reshape(b, heads, tiles * rows, *x.shape[3:])[:, :, : t * m]
        .reshape(b, heads, t, m, *x.shape[3:])
        .swapaxes(1, 2)
    )
    return by_query(out).astype(parts[0][0].dtype), by_query(lse)


def _call(
    shape: Shape,
    cores: int,
    info: pltpu.TpuInfo,
    interpret: bool | pltpu.InterpretParams,
    varying: frozenset[str],
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The kernel as a function of what it reads; its outputs by share, row of the batch, head and tile."""
    batch = shape.items * (cores // shape.shares)
    tiles, rows, v = shape.heads * shape.tiles, shape.rows, shape.value_width
    key = sum(width for _, width in shape.widths[: shape.parts])

    def of_row(*block: int, outputs: bool = False) -> pl.BlockSpec:
        zeros = (0,) * len(block)

        def index(core: jax.Array, item: jax.Array, *_: Ref) -> tuple[jax.Array | int, ...]:
            row = item if shape.shares > 1 else core * shape.items + item
            share = core if shape.shares > 1 else 0
            return (share, row, *zeros) if outputs else (row, *zeros)

        return pl.BlockSpec((1, 1, *block) if outputs else (1, *block), index)

    output = lambda block, dtype: jax.ShapeDtypeStruct(
        (shape.shares, batch, *block), dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=varying)
    )
    tokens = batch * shape.page_slots * shape.row_pages
    token_bytes = 2 * sum(heads * width for heads, width in shape.widths)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(cores, shape.items),
        in_specs=[
            of_row(shape.tiles, 1, rows),
            of_row(tiles, rows, key),
            *[pl.BlockSpec(memory_space=pl.ANY)] * len(shape.widths),
        ],
        out_specs=[of_row(tiles, rows, v, outputs=True), of_row(tiles, 1, rows, outputs=True)],
        scratch_shapes=[
            *[pltpu.VMEM((2, heads, width, shape.block), jnp.bfloat16) for heads, width in shape.widths],
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SMEM((2,), jnp.int32),
            pltpu.VMEM((tiles, rows, LANES), jnp.float32),
            pltpu.VMEM((tiles, rows, LANES), jnp.float32),
            pltpu.VMEM((tiles, rows, v), jnp.float32),
        ],
    )
    return pl.pallas_call(
        functools.partial(kernel, shape),
        grid_spec=grid,
        out_shape=[
            output((tiles, rows, v), jnp.bfloat16 if shape.shares == 1 else jnp.float32),
            output((tiles, 1, rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=info.vmem_capacity_bytes * 7 // 8
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * tiles * rows * (key + v),
            transcendentals=tokens * tiles * rows,
            bytes_accessed=tokens * token_bytes + 2 * batch * tiles * rows * (key + v),
        ),
        interpret=interpret,
        name="decode_attention",
    )
