"""The TPU kernel of decode attention (Pallas Mosaic): what runs on a core, and nothing around it.

The cache stays in HBM. Blocks of tokens, [width, tokens], are copied to one of two buffers in VMEM while the block in
the other is attended, across the ends of rows too, so that the copies never stop. Each token is copied once and serves
all heads, all queries, and as key and as value.

A row's tokens are whole blocks that every query sees, without a mask, and then short masked blocks, the tail.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mlra_jax.ops.decode.mosaic_tpu.config import LANES, Program

Index = jax.Array | int
Ref = Any
"""A `jax.Ref` or a view of one."""
_UNSEEN = -1e38  # below every score; finite, so that differences are
_TRANSPOSED = 256  # tokens of values transposed at a time: a matrix unit's depth


def kernel(
    program: Program,
    longest_ref: Ref,  # SMEM int32 [B]: tokens that some query of the row sees
    shortest_ref: Ref,  # SMEM int32 [B]: tokens that all of them see
    table_ref: Ref,  # SMEM int32 [B * N]: pages
    seen_ref: Ref,  # VMEM int32 [1, tiles, 1, rows]: tokens that each query row sees
    q_ref: Ref,  # VMEM bf16 [1, heads * tiles, rows, key width]
    *refs: Ref,
) -> None:
    """Attends one row of the batch, or a share of its tokens; grid: cores, rows of each core.

    `refs` are the cached arrays in HBM, bf16 [P, heads, width, page_size]; the outputs in VMEM, [1, 1, heads * tiles,
    rows, V] and the log-sum-exp float32 [1, 1, heads * tiles, 1, rows]; and the scratch.
    """
    shape, config = program.shape, program.config
    n = len(shape.cached)
    cache, (out_ref, lse_ref) = refs[:n], refs[n : n + 2]
    *buffers, copied, state_ref, top_ref, sum_ref, acc_ref = refs[n + 2 :]
    core, item = pl.program_id(0), pl.program_id(1)
    row, share = _row(program, core, item)
    next_buffer, has_begun = 0, 1  # in `state_ref`: the next unit's buffer, and whether its copies have begun

    def units(row: Index) -> tuple[Index, Index]:
        """How many whole blocks and tail blocks of a row are this share's."""
        if program.static:
            return shape.capacity // config.block // config.shares, 0
        whole = shortest_ref[row] // config.block
        tail = pl.cdiv(longest_ref[row] - whole * config.block, config.tail)
        mine = lambda n: (n - share + config.shares - 1) // config.shares
        return mine(whole), mine(tail)

    def tail_start(row: Index, i: Index) -> Index:
        """First token of this share's i-th tail block."""
        return shortest_ref[row] // config.block * config.block + (share + i * config.shares) * config.tail

    def copies(do: Callable[..., None], row: Index, unit: Index, side: Index) -> None:
        """`do` to each copy of a unit to a buffer. A row's units are its whole blocks, then its tail blocks."""
        if program.static:
            return
        whole, _ = units(row)

        def chunks(start: Index, size: int, count: Index) -> None:
            @pl.loop(0, count)
            def chunk(i: jax.Array) -> None:
                at = start + i * size
                page = table_ref[row * program.row_pages + at // shape.page_size]
                source = pl.ds(pl.multiple_of(at % shape.page_size, LANES), size)
                target = pl.ds(pl.multiple_of(i * size, LANES), size)
                for array, buffer in zip(cache, buffers, strict=True):
                    do(array.at[page, :, :, source], buffer.at[side, :, :, target], copied.at[side])

        @pl.when(unit < whole)
        def copy_whole() -> None:
            size = math.gcd(config.block, shape.page_size)
            chunks((share + unit * config.shares) * config.block, size, config.block // size)

        @pl.when(unit >= whole)
        def copy_tail() -> None:
            size = math.gcd(config.tail, shape.page_size)
            start = tail_start(row, unit - whole)
            chunks(start, size, pl.cdiv(jnp.minimum(longest_ref[row] - start, config.tail), size))

    start, wait = functools.partial(copies, _start), functools.partial(copies, _wait)

    @pl.when(item == 0)
    def reset() -> None:
        state_ref[next_buffer] = 0
        state_ref[has_begun] = 0

    for ref, value in ((top_ref, _UNSEEN), (sum_ref, 0.0), (acc_ref, 0.0)):
        ref[...] = jnp.full_like(ref, value)

    whole, tail = units(row)
    total = whole + tail

    @pl.when((total > 0) & (state_ref[has_begun] == 0))
    def begin() -> None:
        start(row, 0, state_ref[next_buffer])

    def attend_unit(i: jax.Array, is_tail: bool) -> None:
        side = state_ref[next_buffer]
        if not program.static:

            @pl.when(i + 1 < total)
            def fetch_next_of_row() -> None:
                start(row, i + 1, 1 - side)

            @pl.when(i + 1 == total)
            def fetch_first_of_next_row() -> None:
                next_row, _ = _row(program, core, jnp.minimum(item + 1, program.items - 1))
                begins = (item + 1 < program.items) & (sum(units(next_row)) > 0)
                state_ref[has_begun] = begins.astype(jnp.int32)

                @pl.when(begins)
                def fetch() -> None:
                    start(next_row, 0, 1 - side)

            state_ref[next_buffer] = 1 - side
            wait(row, i, side)

        @_loop(shape.heads * program.tiles)
        def attend_tile(h: Index) -> None:
            if is_tail:
                at = tail_start(row, i - whole)
                seen = jnp.broadcast_to(seen_ref[0, h % program.tiles], (LANES, program.rows)).T[:, :1] - at
                limits, tokens, step = (
                    (seen, longest_ref[row] - at),
                    config.tail,
                    max(config.tail // 2, LANES),
                )
            else:
                limits, tokens, step = None, config.block, config.step
            head = h // program.tiles
            arrays = [
                buffer.at[side, head if heads > 1 else 0]
                for buffer, (heads, _) in zip(buffers, shape.cached, strict=True)
            ]
            running = (top_ref.at[h], sum_ref.at[h], acc_ref.at[h])
            _attend(program, q_ref[0, h], arrays, limits, tokens, step, *running)

    pl.loop(0, whole)(functools.partial(attend_unit, is_tail=False))
    if not program.static:
        pl.loop(whole, total)(functools.partial(attend_unit, is_tail=True))

    @_loop(shape.heads * program.tiles)
    def write(h: Index) -> None:
        weight = sum_ref[h].sum(axis=-1, keepdims=True)
        some = weight > 0
        weight = jnp.where(some, weight, 1.0)
        out_ref[0, 0, h] = jnp.where(some, acc_ref[h] / weight, 0.0).astype(out_ref.dtype)
        lse = jnp.where(some, top_ref[h] * program.scale + jnp.log(weight), -jnp.inf)
        lse_ref[0, 0, h] = lse.T[:1]


def _start(*copy: Ref) -> None:
    pltpu.make_async_copy(*copy).start()


def _wait(*copy: Ref) -> None:
    pltpu.make_async_copy(*copy).wait()


def _loop(n: int) -> Callable[[Callable[[Index], None]], None]:
    """`pl.loop(0, n)`, without a loop where n is 1."""
    return (lambda body: body(0)) if n == 1 else pl.loop(0, n)


def _row(program: Program, core: Index, item: Index) -> tuple[Index, Index]:
    """The row of the batch that a core attends as its `item`-th, and which share of its tokens."""
    return (item, core) if program.config.shares > 1 else (core * program.items + item, 0)


def _attend(
    program: Program,
    q: jax.Array,  # [rows, key width]
    arrays: Sequence[Ref],  # of one head, [width, tokens] each
    limits: tuple[jax.Array, Index] | None,
    tokens: int,
    step: int,
    top_ref: Ref,  # [rows, 128]: the largest score, the same in each lane
    sum_ref: Ref,  # [rows, 128]: sums of weights, one for each lane
    acc_ref: Ref,  # [rows, V]: weighted sum of values
) -> None:
    """A block of tokens, `step` at a time, into the running softmax of one tile of query rows.

    The next step's scores are computed before this step's weighted sum: the compiler, which does not look across the
    end of a loop, then finds products, exponentials and transposes to run side by side.

    `limits`: how many tokens of the block each row sees, [rows, 1], and how many were copied; None: all.
    """
    keys, values_ref = arrays[: len(program.shape.widths)], arrays[len(program.shape.widths) % len(arrays)]
    factor = program.scale * math.log2(math.e)
    # Whatever `jax_default_matmul_precision` says: there is but one for bfloat16.
    precision = jax.lax.Precision.DEFAULT
    product = functools.partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)
    lanes = lambda x: [x[:, i : i + LANES] for i in range(0, step, LANES)]

    def scores(at: int) -> tuple[jax.Array, jax.Array]:
        k = jnp.concatenate([key[:, at : at + step] for key in keys], axis=0)
        s = product(q, k)
        if limits is not None:
            token = at + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
            s = jnp.where(token < limits[0], s, -jnp.inf)
        return s, functools.reduce(jnp.maximum, lanes(s)).max(axis=-1, keepdims=True)

    def values(at: int) -> jax.Array:
        """[step, V]."""
        transposed = []
        for i in range(at, at + step, _TRANSPOSED):
            v = values_ref[:, i : min(i + _TRANSPOSED, at + step)]
            if limits is not None:  # 0 * NaN is NaN: what was never written must not be multiplied
                token = i + jax.lax.broadcasted_iota(jnp.int32, v.shape, 1)
                v = jnp.where(token < limits[1], v.astype(jnp.float32), 0.0).astype(v.dtype)
            transposed.append(v.T)
        return jnp.concatenate(transposed, axis=0)

    top, total, acc = top_ref[...], sum_ref[...], acc_ref[...]
    ahead = scores(0)
    for at in range(0, tokens, step):
        s, top_of_step = ahead
        if at + step < tokens:
            ahead = scores(at + step)
        new_top = jnp.maximum(top, top_of_step)
        shrink = jnp.exp2((top - new_top) * factor)
        p = jnp.exp2((s - new_top[:, :1]) * factor)
        total = total * shrink + functools.reduce(jnp.add, lanes(p))
        acc = acc * shrink[:, :1] + product(p.astype(q.dtype), values(at))
        top = new_top
    top_ref[...], sum_ref[...], acc_ref[...] = top, total, acc
