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
from typing import Any, NamedTuple

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


class Refs(NamedTuple):
    """What the kernel reads and writes, and its scratch memory."""

    longest: Ref  # SMEM int32 [B]: tokens that some query of the row sees
    shortest: Ref  # SMEM int32 [B]: tokens that all of them see
    table: Ref  # SMEM int32 [B * N]: pages
    seen: Ref  # VMEM int32 [1, tiles, 1, rows]: tokens that each query row sees
    queries: Ref  # VMEM bf16 [1, heads * tiles, rows, key width]
    cached: Sequence[Ref]  # HBM bf16 [P, heads, width, page_size] of each cached array, or a pool, see `Pool`
    out: Ref  # VMEM [1, 1, heads * tiles, rows, V]
    lse: Ref  # VMEM float32 [1, 1, heads * tiles, 1, rows]
    buffers: Sequence[
        Ref
    ]  # VMEM bf16 [2, heads, width, block] of each, [2, block, pairs, 2, width] of a pool
    copied: Ref  # semaphores of the two buffers
    state: Ref  # SMEM int32 [2]: the next unit's buffer, and whether its copies have begun
    top: Ref  # VMEM float32 [heads * tiles, rows, 128]: the largest score, the same in each lane
    total: Ref  # VMEM float32 [heads * tiles, rows, 128]: sums of weights, one for each lane
    acc: Ref  # VMEM float32 [heads * tiles, rows, V]: weighted sums of values

    @classmethod
    def of(cls, n_cached: int, refs: Sequence[Ref]) -> Refs:
        """The references in the order in which Pallas gives them."""
        n, first_scratch = n_cached, 7 + n_cached
        buffers, others = refs[first_scratch : first_scratch + n], refs[first_scratch + n :]
        fields: list[Any] = [*refs[:5], refs[5 : 5 + n], *refs[5 + n : first_scratch], buffers, *others]
        return cls._make(fields)


NEXT_BUFFER, HAS_BEGUN = 0, 1
"""Places in `Refs.state`."""


class Row:
    """The row of the batch that a core attends to as its `item`-th, or its share of that row's tokens.

    Its units are whole blocks, then tail blocks.
    """

    def __init__(self, program: Program, refs: Refs, core: Index, item: Index):
        self.program, self.refs, config = program, refs, program.config
        shared = config.shares > 1
        self.row, self.share = (item, core) if shared else (core * program.items + item, 0)

    def units(self) -> tuple[Index, Index]:
        """How many whole blocks and tail blocks are this share's."""
        shape, config = self.program.shape, self.program.config
        if self.program.static:
            return shape.capacity // config.block // config.shares, 0
        whole = self.refs.shortest[self.row] // config.block
        tail = pl.cdiv(self.refs.longest[self.row] - whole * config.block, config.tail)
        mine = lambda n: (n - self.share + config.shares - 1) // config.shares
        return mine(whole), mine(tail)

    def tail_start(self, i: Index) -> Index:
        """First token of this share's i-th tail block."""
        config = self.program.config
        first = self.refs.shortest[self.row] // config.block * config.block
        return first + (self.share + i * config.shares) * config.tail

    def copies(self, do: Callable[..., None], unit: Index, buffer: Index) -> None:
        """`do` to each copy of a unit to a buffer."""
        program, refs, shape, config = self.program, self.refs, self.program.shape, self.program.config
        if program.static:
            return
        whole, _ = self.units()

        def chunks(start: Index, size: int, count: Index) -> None:
            @pl.loop(0, count)
            def chunk(i: jax.Array) -> None:
                at = start + i * size
                page = refs.table[self.row * program.row_pages + at // shape.page_size]
                if program.pool is not None:
                    source, target = pl.ds(at % shape.page_size, size), pl.ds(i * size, size)
                    [pool], [vmem] = refs.cached, refs.buffers
                    do(pool.at[page, source], vmem.at[buffer, target], refs.copied.at[buffer])
                    return
                source = pl.ds(pl.multiple_of(at % shape.page_size, LANES), size)
                target = pl.ds(pl.multiple_of(i * size, LANES), size)
                for array, vmem in zip(refs.cached, refs.buffers, strict=True):
                    do(array.at[page, :, :, source], vmem.at[buffer, :, :, target], refs.copied.at[buffer])

        @pl.when(unit < whole)
        def copy_whole() -> None:
            size = math.gcd(config.block, shape.page_size)
            chunks((self.share + unit * config.shares) * config.block, size, config.block // size)

        @pl.when(unit >= whole)
        def copy_tail() -> None:
            size = math.gcd(config.tail, shape.page_size)
            start = self.tail_start(unit - whole)
            left = jnp.minimum(refs.longest[self.row] - start, config.tail)
            chunks(start, size, pl.cdiv(left, size))


def kernel(program: Program, *all_refs: Ref) -> None:
    """Attends to one row of the batch, or to a share of its tokens; grid: cores, rows of each core."""
    refs = Refs.of(1 if program.pool else len(program.shape.cached), all_refs)
    core, item = pl.program_id(0), pl.program_id(1)
    row = Row(program, refs, core, item)

    @pl.when(item == 0)
    def reset() -> None:
        refs.state[NEXT_BUFFER] = 0
        refs.state[HAS_BEGUN] = 0

    for ref, value in ((refs.top, _UNSEEN), (refs.total, 0.0), (refs.acc, 0.0)):
        ref[...] = jnp.full_like(ref, value)

    whole, tail = row.units()
    total = whole + tail

    @pl.when((total > 0) & (refs.state[HAS_BEGUN] == 0))
    def begin() -> None:
        row.copies(_start, 0, refs.state[NEXT_BUFFER])

    def attend_unit(i: jax.Array, is_tail: bool) -> None:
        buffer = refs.state[NEXT_BUFFER]
        if not program.static:
            _fetch_next(row, core, item, i + 1, total, 1 - buffer)
            refs.state[NEXT_BUFFER] = 1 - buffer
            row.copies(_wait, i, buffer)
        start = row.tail_start(i - whole) if is_tail else None
        _loop(program.shape.heads * program.tiles)(lambda h: _attend_tile(row, h, buffer, start))

    pl.loop(0, whole)(functools.partial(attend_unit, is_tail=False))
    if not program.static:
        pl.loop(whole, total)(functools.partial(attend_unit, is_tail=True))
    _loop(program.shape.heads * program.tiles)(lambda h: _write(program, refs, h))


def _fetch_next(row: Row, core: Index, item: Index, unit: Index, total: Index, buffer: Index) -> None:
    """The producer: begins the copies of the unit after this one, of the row or of the core's next row."""
    program, refs = row.program, row.refs

    @pl.when(unit < total)
    def fetch_next_of_row() -> None:
        row.copies(_start, unit, buffer)

    @pl.when(unit == total)
    def fetch_first_of_next_row() -> None:
        next_row = Row(program, refs, core, jnp.minimum(item + 1, program.items - 1))
        begins: Any = (item + 1 < program.items) & (sum(next_row.units()) > 0)
        refs.state[HAS_BEGUN] = begins.astype(jnp.int32)

        @pl.when(begins)
        def fetch() -> None:
            next_row.copies(_start, 0, buffer)


def _attend_tile(row: Row, h: Index, buffer: Index, tail_start: Index | None) -> None:
    """The consumer: attends from tile h of the query rows to the unit in a buffer; None: a whole block."""
    program, refs, config = row.program, row.refs, row.program.config
    limits, tokens, step = None, config.block, config.step
    if tail_start is not None:
        seen = jnp.broadcast_to(refs.seen[0, h % program.tiles], (LANES, program.rows)).T[:, :1]
        limits = seen - tail_start, refs.longest[row.row] - tail_start
        tokens, step = config.tail, max(config.tail // 2, LANES)
    kind = Features if program.pool is None else Slots
    block = kind(program, refs, h // program.tiles, buffer, limits and limits[1])
    running = (refs.top.at[h], refs.total.at[h], refs.acc.at[h])
    _attend(program, refs.queries[0, h], block, limits and limits[0], tokens, step, *running)


def _write(program: Program, refs: Refs, h: Index) -> None:
    """The epilogue: writes output and log-sum-exp of tile h of the query rows."""
    weight = refs.total[h].sum(axis=-1, keepdims=True)
    some = weight > 0
    weight = jnp.where(some, weight, 1.0)
    refs.out[0, 0, h] = jnp.where(some, refs.acc[h] / weight, 0.0).astype(refs.out.dtype)
    lse = jnp.where(some, refs.top[h] * program.scale + jnp.log(weight), -jnp.inf)
    refs.lse[0, 0, h] = lse.T[:1]


def _start(*copy: Ref) -> None:
    pltpu.make_async_copy(*copy).start()


def _wait(*copy: Ref) -> None:
    pltpu.make_async_copy(*copy).wait()


def _loop(n: int) -> Callable[[Callable[[Index], None]], None]:
    """`pl.loop(0, n)`, without a loop where n is 1."""
    return (lambda body: body(0)) if n == 1 else pl.loop(0, n)


# Whatever `jax_default_matmul_precision` says: bfloat16 has only one.
_product = functools.partial(
    jax.lax.dot_general, precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32
)
_ROWS_BY_COLUMNS = (((1,), (0,)), ((), ()))
_ROWS_BY_ROWS = (((1,), (1,)), ((), ()))


class Features:
    """A block of one head in feature-major buffers, [width, tokens] each."""

    def __init__(self, program: Program, refs: Refs, head: Index, buffer: Index, limit: Index | None):
        self.limit = limit  # how many tokens were copied; None: all
        arrays = [
            vmem.at[buffer, head if heads > 1 else 0]
            for vmem, (heads, _) in zip(refs.buffers, program.shape.cached, strict=True)
        ]
        n = len(program.shape.widths)
        self.keys, self.values_ref = arrays[:n], arrays[n % len(arrays)]

    def scores(self, q: jax.Array, at: int, step: int) -> tuple[jax.Array, Callable[[], jax.Array]]:
        """Products of the queries with `step` keys from `at` on, and the function that gives their values."""
        k = jnp.concatenate([key[:, at : at + step] for key in self.keys], axis=0)
        return _product(q, k, _ROWS_BY_COLUMNS), lambda: self.values(at, step)

    def values(self, at: int, step: int) -> jax.Array:
        """[step, V]."""
        transposed = []
        for i in range(at, at + step, _TRANSPOSED):
            v = self.values_ref[:, i : min(i + _TRANSPOSED, at + step)]
            if self.limit is not None:  # 0 * NaN is NaN: what was never written must not be multiplied
                token = i + jax.lax.broadcasted_iota(jnp.int32, v.shape, 1)
                v = jnp.where(token < self.limit, v.astype(jnp.float32), 0.0).astype(v.dtype)
            transposed.append(v.T)
        return jnp.concatenate(transposed, axis=0)


class Slots:
    """A block of one head in the buffer of a pool, [tokens, pairs, 2, width]."""

    def __init__(self, program: Program, refs: Refs, head: Index, buffer: Index, limit: Index | None):
        assert program.pool is not None
        self.limit, self.pool, self.widths = limit, program.pool, program.shape.widths
        [vmem] = refs.buffers
        tokens = vmem.shape[1]
        self.words = vmem.bitcast(jnp.uint32).at[buffer].reshape(tokens * self.pool.pairs, self.pool.width)
        self.pairs = [first // 2 + (head * (step // 2) if step else 0) for first, step in self.pool.parts]

    def scores(self, q: jax.Array, at: int, step: int) -> tuple[jax.Array, Callable[[], jax.Array]]:
        """See `Features.scores`."""
        n, loaded = self.pool.pairs, {}
        parts = []
        for pair, (first, stride), width in zip(self.pairs, self.pool.parts, self.widths, strict=True):
            if (place := (first // 2, stride)) not in loaded:
                rows = pl.ds(at * n + pair, step, stride=n) if n > 1 else pl.ds(at, step)
                words = self.words[rows, :]
                if self.limit is not None:  # as above
                    token = at + jax.lax.broadcasted_iota(jnp.int32, words.shape, 0)
                    words = jnp.where(token < self.limit, words, jnp.zeros_like(words))
                loaded[place] = words
            # The upper half of a float32 is a bfloat16.
            upper = loaded[place] & jnp.uint32(0xFFFF0000) if first % 2 else loaded[place] << 16
            parts.append(jax.lax.bitcast_convert_type(upper, jnp.float32).astype(q.dtype)[:, :width])
        return _product(q, jnp.concatenate(parts, axis=1), _ROWS_BY_ROWS), lambda: parts[0]


def _attend(
    program: Program,
    q: jax.Array,  # [rows, key width]
    block: Features | Slots,
    seen: jax.Array | None,
    tokens: int,
    step: int,
    top_ref: Ref,  # [rows, 128]: the largest score, the same in each lane
    sum_ref: Ref,  # [rows, 128]: sums of weights, one for each lane
    acc_ref: Ref,  # [rows, V]: weighted sum of values
) -> None:
    """Adds a block of tokens, `step` at a time, to the running softmax of one tile of query rows.

    The next step's scores are computed before this step's weighted sum: the compiler, which does not look across the
    end of a loop, then finds products, exponentials and transposes to run side by side.

    `seen`: how many tokens of the block each row sees, [rows, 1]; None: all.
    """
    factor = program.scale * math.log2(math.e)
    lanes = lambda x: [x[:, i : i + LANES] for i in range(0, step, LANES)]

    def scores(at: int) -> tuple[jax.Array, jax.Array, Callable[[], jax.Array]]:
        s, values = block.scores(q, at, step)
        if seen is not None:
            token = at + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
            s = jnp.where(token < seen, s, -jnp.inf)
        return s, functools.reduce(jnp.maximum, lanes(s)).max(axis=-1, keepdims=True), values

    top, total, acc = top_ref[...], sum_ref[...], acc_ref[...]
    ahead = scores(0)
    for at in range(0, tokens, step):
        s, top_of_step, values = ahead
        if at + step < tokens:
            ahead = scores(at + step)
        new_top = jnp.maximum(top, top_of_step)
        shrink = jnp.exp2((top - new_top) * factor)
        p = jnp.exp2((s - new_top[:, :1]) * factor)
        total = total * shrink + functools.reduce(jnp.add, lanes(p))
        acc = acc * shrink[:, :1] + _product(p.astype(q.dtype), values(), _ROWS_BY_COLUMNS)
        top = new_top
    top_ref[...], sum_ref[...], acc_ref[...] = top, total, acc
