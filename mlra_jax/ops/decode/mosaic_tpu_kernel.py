"""The TPU kernel of decode attention (Pallas Mosaic): what runs on a core, and nothing around it.

The cache stays in HBM. Blocks of tokens, [width, tokens], are copied to one of two buffers in VMEM while the block in
the other is attended, across the ends of rows too, so that the copies never stop. Each token is copied once and serves
all heads, all queries, and as key and as value.

A row's tokens are whole blocks that every query sees, without a mask, and then short masked blocks, the tail.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
LOG2_E = math.log2(math.e)
_UNSEEN = -1e38  # below every score; finite, so that differences are
_TRANSPOSED = 256  # tokens of values turned at a time: a matrix unit's depth


@dataclasses.dataclass(frozen=True)
class Shape:
    """All that is known when the kernel is compiled."""

    widths: tuple[tuple[int, int], ...]
    """Heads and width of each cached array: the parts of the key, then the values if they are not the first part."""
    parts: int
    """How many of the arrays are parts of the key."""
    heads: int
    """L."""
    tiles: int
    """Tiles of query rows of each head."""
    rows: int
    """Query rows of a tile."""
    page_slots: int
    """Tokens of a page."""
    row_pages: int
    """Pages of a row."""
    block: int
    """Tokens of a whole block."""
    step: int
    """Tokens of one softmax; divides `block`."""
    tail: int
    """Tokens of a masked block; divides `block`."""
    items: int
    """Rows of the batch that one core attends."""
    shares: int
    """Cores that share the tokens of each row."""
    scale: float
    static: bool
    """For the compiler's estimate: every row is full, which is known when compiling, and no block is copied."""

    @property
    def value_width(self) -> int:
        """V."""
        return self.widths[self.parts % len(self.widths)][1]


def kernel(
    shape: Shape,
    longest_ref: jax.Ref,  # SMEM int32 [B]: tokens that some query of the row sees
    shortest_ref: jax.Ref,  # SMEM int32 [B]: tokens that all of them see
    table_ref: jax.Ref,  # SMEM int32 [B * N]: pages
    seen_ref: jax.Ref,  # VMEM int32 [1, tiles, 1, rows]: tokens that each query row sees
    q_ref: jax.Ref,  # VMEM bf16 [1, heads * tiles, rows, key width]
    *refs: jax.Ref,
) -> None:
    """Attends the rows of the batch `core * items` on; `refs` are the cache, the two outputs and the scratch."""
    n = len(shape.widths)
    cache, (out_ref, lse_ref) = refs[:n], refs[n : n + 2]
    *buffers, copied, state_ref, m_ref, l_ref, acc_ref = refs[n + 2 :]
    core, item = pl.program_id(0), pl.program_id(1)
    row, share = _row(shape, core, item)

    def units(row: jax.Array) -> tuple[jax.Array, jax.Array]:
        """This share's whole blocks and tail blocks of a row."""
        if shape.static:
            return shape.page_slots * shape.row_pages // shape.block // shape.shares, 0
        whole = shortest_ref[row] // shape.block
        tail = pl.cdiv(longest_ref[row] - whole * shape.block, shape.tail)
        mine = lambda n: (n - share + shape.shares - 1) // shape.shares
        return mine(whole), mine(tail)

    def copies(row: jax.Array, unit: jax.Array, slot: jax.Array, do: Callable) -> None:
        """`do` to each copy of a unit of a row to a slot: whole blocks come first, then the tail."""
        if shape.static:
            return
        whole, _ = units(row)
        all_whole = shortest_ref[row] // shape.block

        def chunks(start: jax.Array, size: int, count: jax.Array | int) -> None:
            def one(i: jax.Array, _: None) -> None:
                at = start + i * size
                page = table_ref[row * shape.row_pages + at // shape.page_slots]
                source = pl.ds(pl.multiple_of(at % shape.page_slots, LANES), size)
                target = pl.ds(pl.multiple_of(i * size, LANES), size)
                for array, buffer in zip(cache, buffers, strict=True):
                    do(
                        pltpu.make_async_copy(
                            array.at[page, :, :, source], buffer.at[slot, :, :, target], copied.at[slot]
                        )
                    )

            jax.lax.fori_loop(0, count, one, None)

        @pl.when(unit < whole)
        def _() -> None:
            size = math.gcd(shape.block, shape.page_slots)
            chunks((share + unit * shape.shares) * shape.block, size, shape.block // size)

        @pl.when(unit >= whole)
        def _() -> None:
            size = math.gcd(shape.tail, shape.page_slots)
            start = all_whole * shape.block + (share + (unit - whole) * shape.shares) * shape.tail
            chunks(start, size, pl.cdiv(jnp.minimum(longest_ref[row] - start, shape.tail), size))

    start = functools.partial(copies, do=lambda copy: copy.start())
    wait = functools.partial(copies, do=lambda copy: copy.wait())

    @pl.when(item == 0)
    def _() -> None:
        state_ref[0] = 0  # the slot of the next unit
        state_ref[1] = 0  # whether its copy has begun

    for ref, value in ((m_ref, _UNSEEN), (l_ref, 0.0), (acc_ref, 0.0)):
        ref[...] = jnp.full_like(ref, value)

    whole, tail = units(row)
    total = whole + tail

    @pl.when((total > 0) & (state_ref[1] == 0))
    def _() -> None:
        start(row, 0, state_ref[0])

    def unit(i: jax.Array, _: None, *, is_tail: bool) -> None:
        slot = state_ref[0]
        if not shape.static:
            next_row, _ = _row(shape, core, jnp.minimum(item + 1, shape.items - 1))
            more = i + 1 < total

            @pl.when(more)
            def _() -> None:
                start(row, i + 1, 1 - slot)

            @pl.when(jnp.logical_not(more))
            def _() -> None:
                begins = (item + 1 < shape.items) & (sum(units(next_row)) > 0)
                state_ref[1] = begins.astype(jnp.int32)

                @pl.when(begins)
                def _() -> None:
                    start(next_row, 0, 1 - slot)

            state_ref[0] = 1 - slot
            wait(row, i, slot)

        def tile(h: jax.Array, _: None) -> None:
            head = h // shape.tiles
            read = lambda buffer, heads, tokens: buffer[slot, head if heads > 1 else 0, :, tokens]
            if is_tail:
                at = (shortest_ref[row] // shape.block) * shape.block
                at = at + (share + (i - whole) * shape.shares) * shape.tail
                seen = jnp.broadcast_to(seen_ref[0, h % shape.tiles], (LANES, shape.rows)).T[:, :1] - at
                longest = longest_ref[row] - at
                tokens, step = shape.tail, min(shape.step, shape.tail)
            else:
                seen, longest, tokens, step = None, None, shape.block, shape.step
            _attend(shape, read, buffers, q_ref[0, h], seen, longest, tokens, step, m_ref.at[h], l_ref.at[h], acc_ref.at[h])

        if shape.heads * shape.tiles == 1:
            tile(jnp.int32(0), None)
        else:
            jax.lax.fori_loop(0, shape.heads * shape.tiles, tile, None)

    jax.lax.fori_loop(0, whole, functools.partial(unit, is_tail=False), None)
    if not shape.static:
        jax.lax.fori_loop(whole, total, functools.partial(unit, is_tail=True), None)

    def write(h: jax.Array, _: None) -> None:
        l = l_ref[h].sum(axis=-1, keepdims=True)
        some = l > 0
        out_ref[0, 0, h] = jnp.where(some, acc_ref[h] / jnp.where(some, l, 1.0), 0.0).astype(out_ref.dtype)
        lse = jnp.where(some, m_ref[h] * shape.scale + jnp.log(jnp.where(some, l, 1.0)), -jnp.inf)
        lse_ref[0, 0, h] = lse.T[:1]

    jax.lax.fori_loop(0, shape.heads * shape.tiles, write, None)


def _row(shape: Shape, core: jax.Array, item: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The row of the batch that a core attends as its `item`-th, and which share of its tokens."""
    if shape.shares > 1:
        return item, core
    return core * shape.items + item, jnp.int32(0)


def _attend(
    shape: Shape,
    read: Callable,
    buffers: Sequence[jax.Ref],
    q: jax.Array,  # [rows, key width]
    seen: jax.Array | None,  # [rows, 1]; None: every query sees every token
    longest: jax.Array | None,  # tokens of the block that have been copied
    tokens: int,
    step: int,
    m_ref: jax.Ref,  # [rows, 128], the same in each lane
    l_ref: jax.Ref,  # [rows, 128], a sum for each lane
    acc_ref: jax.Ref,  # [rows, V]
) -> None:
    """One block of tokens into the running softmax of one tile of query rows.

    Scores of a step are computed before the weighted sum of the step before it is: the compiler, which does not look
    across a loop's end, then has products, exponentials and transposes to run side by side.
    """
    keys = list(zip(buffers, shape.widths, strict=True))[: shape.parts]
    value, (value_heads, _) = list(zip(buffers, shape.widths, strict=True))[shape.parts % len(buffers)]
    factor = shape.scale * LOG2_E

    def scores(at: int) -> tuple[jax.Array, jax.Array]:
        k = jnp.concatenate([read(buffer, heads, pl.ds(at, step)) for buffer, (heads, _) in keys], axis=0)
        s = jnp.dot(q, k, preferred_element_type=jnp.float32)
        if seen is not None:
            token = at + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
            s = jnp.where(token < seen, s, -jnp.inf)
        by_lane = functools.reduce(jnp.maximum, [s[:, i : i + LANES] for i in range(0, step, LANES)])
        return s, by_lane.max(axis=-1, keepdims=True)

    def values(at: int) -> jax.Array:
        """[step, V]."""
        turned = []
        for i in range(at, at + step, _TRANSPOSED):
            size = min(_TRANSPOSED, at + step - i)
            v = read(value, value_heads, pl.ds(i, size))
            if longest is not None:  # 0 * NaN is NaN: what was never written must not be multiplied
                token = i + jax.lax.broadcasted_iota(jnp.int32, v.shape, 1)
                v = jnp.where(token < longest, v.astype(jnp.float32), 0.0).astype(v.dtype)
            turned.append(v.T)
        return jnp.concatenate(turned, axis=0)

    m, l, acc = m_ref[...], l_ref[...], acc_ref[...]
    ahead = scores(0)
    for at in range(0, tokens, step):
        s, top = ahead
        if at + step < tokens:
            ahead = scores(at + step)
        new_m = jnp.maximum(m, top)
        shrink = jnp.exp2((m - new_m) * factor)
        p = jnp.exp2((s - new_m[:, :1]) * factor)
        l = l * shrink + functools.reduce(jnp.add, [p[:, i : i + LANES] for i in range(0, step, LANES)])
        pv = jnp.dot(p.astype(q.dtype), values(at), preferred_element_type=jnp.float32)
        acc = acc * shrink[:, :1] + pv
        m = new_m
    m_ref[...], l_ref[...], acc_ref[...] = m, l, acc
