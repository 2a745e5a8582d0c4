"""Attention over a KV cache for Hopper GPUs: a Pallas Mosaic GPU kernel that reads the cache once.

A program holds a tile of query rows of one head. One warpgroup issues the copies of blocks of tokens into a ring in
shared memory; the others compute. Where there are many rows, each computing warpgroup has 64 of its own; where the
value is too wide for one, each owns some of its columns, and the first makes the weights for all.

With few rows the blocks of all sequences, laid end to end, are cut into equal shares, so that ragged batches balance
too; a second kernel merges the parts by their log-sum-exp, in a fixed order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mlra_jax.ops.decode.mosaic_gpu import Config, Shape
from mlra_jax.ops.decode.reference import Parts, Rotary
from mlra_jax.ops.hopper import LOG2E, LOWEST, MATRIX, PARAMS, ROW, ROWS, plgpu, transforms


def _accumulate(acc: jax.Array, a: Any, b: Any, interpret: bool) -> jax.Array:
    """`acc + a @ b`, in place; the interpreter knows only products that start from zero."""

    def product(ref: Any) -> Any:
        plgpu.wgmma(ref, a, b)
        return ref[...] if interpret else None

    if interpret:
        return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))
    return pl.run_state(product)(plgpu.ACC.init(acc))


def _blocks(tokens: jax.Array, block: int) -> jax.Array:
    """Blocks of so many tokens; one at least, so that every row has an output."""
    return jnp.maximum(1, lax.div(tokens + (block - 1), block))


def make_table(longest: jax.Array, config: Config) -> jax.Array:
    """Which blocks each share has, worked out once for all layers with the same lengths.

    Laid end to end, the blocks of all sequences are cut into equal shares. Where so many shares of that size do for
    cutting each sequence on its own, each is: then no share holds parts of two.

    Args:
      longest: tokens of each sequence that its longest query sees, [B].
      config: of the kernel.

    Returns:
      int32 [4 * n_splits + 2 * B]. Of each share: the first sequence, the last one (less than the first where the share
      is empty), the first block in the first sequence, and the number of blocks. Of each sequence: the slots [first,
      end) of its parts; share i leaves that of sequence b in slot i + b.
    """
    n_splits = config.n_splits
    blocks = _blocks(longest, config.block)
    per = -(-jnp.sum(blocks) // n_splits)
    cuts = -(-blocks // per)
    # On the line that is cut every `per` blocks.
    room = jnp.where(jnp.sum(cuts) <= n_splits, cuts * per, blocks)
    ends = jnp.cumsum(room)
    begin = ends - room
    low = jnp.arange(n_splits) * per
    high = jnp.minimum(low + per, ends[-1])
    first = jnp.sum(ends <= low[:, None], axis=1)
    last = jnp.where(low < high, jnp.sum(ends < high[:, None], axis=1), first - 1)
    inside = lambda x: jnp.clip(x - begin, 0, blocks)  # blocks of each sequence before a place on the line
    start = jnp.max(
        jnp.where((begin <= low[:, None]) & (low[:, None] < ends), inside(low[:, None]), 0), axis=1
    )
    count = jnp.sum(inside(high[:, None]) - inside(low[:, None]), axis=1)
    b = jnp.arange(len(longest))
    parts = begin // per + b, (begin + blocks - 1) // per + b + 1
    return jnp.concatenate([first, last, start, jnp.maximum(count, 0), *parts]).astype(jnp.int32)


def _rotations(cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Matrices [B, R, R] that turn queries, multiplied from the right, as `turn` does; of one query for each row."""
    diagonal = lambda x: jnp.eye(x.shape[-1]) * x  # [B, 1, R/2] to [B, R/2, R/2]
    cos, sin = diagonal(cos_BTR), diagonal(sin_BTR)
    halves = jnp.concatenate([cos, sin], axis=2), jnp.concatenate([-sin, cos], axis=2)
    return jnp.concatenate(halves, axis=1).astype(jnp.bfloat16)


def _seen(longest_ref: Any, shape: Shape) -> Callable[[Any], jax.Array]:
    """Tokens of sequence b that its longest query sees, no more than there are; limiting them here costs nothing."""
    return lambda b: jnp.clip(longest_ref[b], 0, shape.capacity)


class Schedule:
    """What a program reads off the table of `make_table`; a single sequence needs none."""

    def __init__(self, longest: Callable[[Any], jax.Array], table_ref: Any, config: Config):
        self.longest, self.table_ref, self.config = longest, table_ref, config

    def blocks(self, b: Any) -> jax.Array:
        """Blocks of sequence b."""
        return _blocks(self.longest(b), self.config.block)

    def share(self, i: jax.Array) -> list[jax.Array]:
        """Of share i: the first and the last sequence, the first block in the first one, and the number of blocks."""
        n_splits = self.config.n_splits
        if self.table_ref is not None:
            return [self.table_ref[i + k * n_splits] for k in range(4)]
        total = self.blocks(0)
        per = lax.div(total + (n_splits - 1), n_splits)
        count = jnp.clip(total - i * per, 0, per)
        return [jnp.int32(0), jnp.minimum(count, 1) - 1, i * per, count]

    def parts(self, b: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
        """The slots [first, end) of the parts of sequence b."""
        n_splits = self.config.n_splits
        if self.table_ref is not None:
            at = 4 * n_splits + b
            return self.table_ref[at], self.table_ref[at + batch]
        total = self.blocks(0)
        per = lax.div(total + (n_splits - 1), n_splits)
        return jnp.int32(0), lax.div(total + (per - 1), per)


def _split_kernel(*refs: Any, shape: Shape, config: Config, scale: float, interpret: bool) -> None:
    args = list(refs)

    def take(present: bool = True) -> Any:
        return args.pop(0) if present else None

    whole, staged = config.n_splits == 1, config.stages_output(shape)
    seen_by_longest = _seen(take(), shape)  # int32 [B]
    table_ref = take(not whole and shape.batch > 1)  # see `make_table`
    # int32 [2, B, program's tiles]: fewest and most tokens that a row of it sees
    bounds_ref = take(shape.q_len > 1)
    row_len_ref = take(shape.q_len > 1)  # int32 [B, rows]
    pages_ref = take(shape.row_pages is not None)  # int32 [B, N]
    q_refs = [take() for _ in shape.widths]  # [B, G, rows, J or 1, W or more]: head j*G + g reads (g, j)
    rotation_ref = take(shape.rotary)  # [B, R, R], see `_rotations`
    k_refs = [take() for _ in shape.widths]  # [P, L or 1, S, W]
    v_ref = take(not shape.latent)  # [P, L, S, V]
    out_ref, lse_ref = (
        take(),
        take(),
    )  # whole: [B, G, rows, J, V], [B, L, rows]; else [slots, L, rows, V], [slots, L, rows]
    q_smem, rotation_smem, k_smem, v_smem, o_smem, p_smem, row_smem = args[:7]
    full, free, q_full, p_full, p_free, blanked = args[7:]
    v_smem = k_smem[0] if shape.latent else v_smem
    o_smem = q_smem[0] if o_smem is None else o_smem

    block, stages, row_groups, value_groups = (
        config.block,
        config.stages,
        config.row_groups,
        shape.value_groups,
    )
    tiles = config.tiles(shape)
    g, i, wg = lax.axis_index("tile"), lax.axis_index("share"), lax.axis_index("wg")
    # Later rows may see more: the longest programs come first.
    head, tile = lax.div(g, tiles), tiles - 1 - lax.rem(g, tiles)
    groups = shape.heads // shape.branches
    branch, group = lax.div(head, groups), lax.rem(head, groups)
    columns = shape.v_width // value_groups
    # A warpgroup multiplies weights of its own from registers. The interpreter knows shared memory alone.
    from_registers = value_groups == 1 and not interpret
    fewest = lambda b: seen_by_longest(b) if bounds_ref is None else bounds_ref[0, b, tile]
    most = lambda b: seen_by_longest(b) if bounds_ref is None else bounds_ref[1, b, tile]

    if whole:
        n_blocks = _blocks(most(i), block)
        segments = lambda body: body(i, jnp.int32(0), n_blocks, jnp.int32(0))
    else:
        schedule = Schedule(seen_by_longest, table_ref, config)
        first, last, start, n_blocks = schedule.share(i)

        def segments(body: Any) -> None:
            def one(b: jax.Array, n0: jax.Array) -> jax.Array:
                j0 = jnp.where(b == first, start, 0)
                j1 = jnp.minimum(j0 + n_blocks - n0, schedule.blocks(b))
                body(b, j0, j1, n0)
                return n0 + j1 - j0

            lax.fori_loop(first, last + 1, one, jnp.int32(0))

    # `segments(body)` calls `body(b, j0, j1, n0)` for each sequence b of this program, whose blocks j0 to j1 - 1 it
    # has; n0 blocks come before. Each warpgroup walks the same way.

    @pl.when(wg == row_groups * value_groups)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def sequence(b: jax.Array, j0: jax.Array, j1: jax.Array, n0: jax.Array) -> None:
            def one(j: jax.Array, _: None) -> None:
                n = n0 + j - j0
                slot = lax.rem(n, stages)
                pl.when(n >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                page, at = b, j * block
                if pages_ref is not None:
                    index = lax.div(at, shape.page)
                    # What a table holds past a row's end may be no page at all.
                    page = jnp.clip(pages_ref[b, index], 0, shape.pages - 1)
                    at = at - index * shape.page
                tokens = pl.ds(at, block)
                for k_ref, smem, shared in zip(k_refs, k_smem, shape.shared, strict=True):
                    source = k_ref.at[page, 0 if shared else head, tokens]
                    plgpu.copy_gmem_to_smem(source, smem.at[slot], full.at[slot])
                if v_ref is not None:
                    plgpu.copy_gmem_to_smem(v_ref.at[page, head, tokens], v_smem.at[slot], full.at[slot])

            lax.fori_loop(j0, j1, one, None)

        segments(sequence)
        # A barrier must not be left before all its phases were seen.
        drain = lambda n, _: plgpu.barrier_wait(free.at[lax.rem(n, stages)])
        lax.fori_loop(jnp.maximum(n_blocks - stages, 0), n_blocks, drain, None)

    def compute(me: int) -> None:
        # Of the 512 that a program's lanes have between them; more than 232 a thread would not help. Of two resident
        # programs each has half of the registers: 128 a thread for its two warpgroups.
        share = (512 - 40) // (row_groups * value_groups) // 8 * 8
        share = min(232, share) if config.resident == 1 else 512 // 2 // config.resident
        plgpu.set_max_registers(share, action="increase")
        row_group, value_group = (0, me) if value_groups > 1 else (me, 0)
        leads = value_group == 0
        mine = pl.ds(value_group * columns, columns)
        row0 = (tile * row_groups + row_group) * ROWS
        rows = min(ROWS, q_refs[0].shape[2])
        vector = lambda x: plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), ROW)
        if not leads:
            plgpu.barrier_arrive(p_free)

        def publish(row: jax.Array) -> None:
            """Hands the weights, and a factor for each row, to the warpgroups of the other columns."""
            if value_groups > 1:
                row_smem[...] = row
                plgpu.commit_smem()
                plgpu.barrier_arrive(p_full)

        def blank(slot: jax.Array, j: jax.Array, longest: jax.Array) -> None:
            """Zeroes values past the last token: a weight of zero times NaN would be NaN."""
            if not leads:
                return  # it waits for the weights, which come after

            @pl.when((j + 1) * block > longest)
            def _() -> None:
                if me > 0:
                    plgpu.barrier_wait(blanked)
                    return
                for r in range(0, block, ROWS):
                    for c in range(0, shape.v_width, 64):
                        ref = v_smem.at[slot, pl.ds(r, ROWS), pl.ds(c, 64)]
                        token = plgpu.broadcasted_iota(jnp.int32, (ROWS, 64), 0, layout=MATRIX)
                        v = plgpu.load(ref, layout=MATRIX, optimized=False)
                        ref[...] = jnp.where(token + (j * block + r) < longest, v, jnp.zeros_like(v))
                plgpu.commit_smem()
                if row_groups > 1:
                    plgpu.barrier_arrive(blanked)

        def sequence(b: jax.Array, j0: jax.Array, j1: jax.Array, n0: jax.Array) -> None:
            seen: Any = None
            longest = seen_by_longest(b)
            if leads:
                for q_ref, smem, width in zip(q_refs, q_smem, shape.widths, strict=True):
                    own, last = lax.rem(branch, q_ref.shape[3]), pl.ds(q_ref.shape[4] - width, width)
                    source = q_ref.at[b, group, pl.ds(row0, rows), own, last]
                    plgpu.copy_gmem_to_smem(source, smem.at[row_group, pl.ds(0, rows)], q_full.at[row_group])
                if rotation_ref is not None:
                    target = rotation_smem.at[row_group]
                    plgpu.copy_gmem_to_smem(rotation_ref.at[b], target, q_full.at[row_group])
                plgpu.barrier_wait(q_full.at[row_group])
                if rotation_ref is not None:
                    q = q_smem[-1].at[row_group]

                    def turned(ref: Any) -> jax.Array:
                        plgpu.wgmma(ref, q, target)
                        return ref[...]

                    q[...] = pl.run_scoped(turned, plgpu.ACC(q.shape, jnp.float32)).astype(jnp.bfloat16)
                    plgpu.commit_smem()
                seen = longest
                if row_len_ref is not None:
                    seen = plgpu.load(row_len_ref.at[b, pl.ds(row0, ROWS)], layout=ROW, optimized=False)
                    seen = lax.broadcast_in_dim(seen, (ROWS, block), (0,))

            def weights(slot: jax.Array, j: jax.Array, m: jax.Array, norm: jax.Array, masked: bool) -> Any:
                def scores(ref: Any) -> jax.Array:
                    for q, k in zip(q_smem, k_smem, strict=True):
                        plgpu.wgmma(ref, q.at[row_group], k.at[slot].transpose((1, 0)))
                    return ref[...]

                s = pl.run_scoped(scores, plgpu.ACC((ROWS, block), jnp.float32))
                if masked:
                    token = plgpu.broadcasted_iota(jnp.int32, (ROWS, block), 1, layout=MATRIX)
                    s = jnp.where(token + j * block < seen, s, -jnp.inf)
                m_new = jnp.maximum(m, s.max(axis=1) * (scale * LOG2E))
                alpha = jnp.exp2(m - m_new)
                p = jnp.exp2(s * (scale * LOG2E) - lax.broadcast_in_dim(m_new, s.shape, (0,)))
                norm = norm * alpha + p.sum(axis=1)
                p = p.astype(jnp.bfloat16)
                if value_groups > 1:
                    plgpu.barrier_wait(p_free)
                if not from_registers:
                    p_smem[row_group][...] = p
                publish(alpha)
                if value_groups == 1 and not from_registers:
                    plgpu.commit_smem()
                return m_new, norm, alpha, p if from_registers else p_smem[row_group]

            def step(j: jax.Array, carry: Any, masked: bool) -> Any:
                acc, m, norm = carry
                slot = lax.rem(n0 + j - j0, stages)
                plgpu.barrier_wait(full.at[slot])
                if masked:
                    blank(slot, j, longest)
                if leads:
                    m, norm, alpha, p = weights(slot, j, m, norm, masked)
                else:
                    plgpu.barrier_wait(p_full)
                    alpha, p = plgpu.load(row_smem, layout=ROW, optimized=False), p_smem[0]
                acc = acc * lax.broadcast_in_dim(alpha, acc.shape, (0,))
                acc = _accumulate(acc, p, v_smem.at[slot, :, mine], interpret)
                if not leads:
                    plgpu.barrier_arrive(p_free)
                plgpu.barrier_arrive(free.at[slot])
                return acc, m, norm

            acc = plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), MATRIX)
            carry = acc, vector(LOWEST), vector(0.0)
            clear = jnp.clip(lax.div(fewest(b), block), j0, j1)  # up to here every row sees every token
            carry = lax.fori_loop(j0, clear, functools.partial(step, masked=False), carry)
            acc, m, norm = lax.fori_loop(clear, j1, functools.partial(step, masked=True), carry)

            lse = None
            if leads:
                inverse = 1.0 / jnp.where(norm > 0, norm, 1.0)
                lse = jnp.where(norm > 0, (m + jnp.log2(norm)) * (1 / LOG2E), -jnp.inf)
                if value_groups > 1:
                    plgpu.barrier_wait(p_free)
                    publish(inverse)
            else:
                plgpu.barrier_wait(p_full)
                inverse = plgpu.load(row_smem, layout=ROW, optimized=False)
                plgpu.barrier_arrive(p_free)
            acc = acc * lax.broadcast_in_dim(inverse, acc.shape, (0,))
            at = b if whole else i + b
            if leads:
                lse_ref[at, head, pl.ds(row0, ROWS)] = lse
            if not whole:
                out_ref[at, head, pl.ds(row0, ROWS), mine] = acc.astype(out_ref.dtype)
                return
            if not staged:
                out_ref[b, group, pl.ds(row0, ROWS), branch, mine] = acc.astype(out_ref.dtype)
                return
            o_smem[row_group] = acc.astype(jnp.bfloat16)
            plgpu.commit_smem()
            target = out_ref.at[b, group, pl.ds(row0, rows), branch]
            plgpu.copy_smem_to_gmem(o_smem.at[row_group, pl.ds(0, rows)], target)
            plgpu.wait_smem_to_gmem(0)

        segments(sequence)
        if leads and value_groups > 1:
            plgpu.barrier_wait(p_free)

    for me in range(row_groups * value_groups):
        pl.when(wg == me)(functools.partial(compute, me))


MANY_ROWS = 8 * 132
"""To merge: more rows than an H100's processors hold programs of the merge at a time."""


@dataclasses.dataclass(frozen=True)
class MergePlan:
    """How parts are merged.

    Attributes:
      warpgroups: of a program; they take equal shares of a row's parts.
      at_once: parts of a row that a warpgroup has in flight.
      rows: rows of a program, whose parts are in flight together; one if there are several warpgroups.
    """

    warpgroups: int
    at_once: int
    rows: int

    @classmethod
    def of(cls, shape: Shape, rows: int, n_splits: int) -> MergePlan:
        """Enough programs to fill the GPU, and all parts of a row of an even batch in flight together."""
        parts = n_splits if shape.batch == 1 else n_splits // shape.batch + 2
        warpgroups = min(4, -(-parts // 33))
        at_once = min(33, -(-parts // warpgroups))
        several = 4 if at_once <= 8 and rows * shape.heads * shape.batch > MANY_ROWS else 1
        return cls(warpgroups, at_once, several)


def _merge_kernel(
    longest_ref: Any,  # int32 [B]
    table_ref: Any,  # see `make_table`; anything for a single sequence
    part_ref: Any,  # [slots, L, rows, V]
    part_lse_ref: Any,  # [slots, L, rows]
    out_ref: Any,  # [B, G, rows, J, V]
    lse_ref: Any,  # [B, L, rows]
    acc_smem: Any,  # [warpgroups, V]
    stat_smem: Any,  # [2, warpgroups]
    done: Any,
    *,
    shape: Shape,
    config: Config,
    plan: MergePlan,
) -> None:
    """Merges the parts of some rows."""
    program, head, b, wg = (lax.axis_index(name) for name in ("rows", "head", "batch", "wg"))
    schedule = Schedule(_seen(longest_ref, shape), table_ref if shape.batch > 1 else None, config)
    first, end = schedule.parts(b, shape.batch)
    share = lax.div(end - first + (plan.warpgroups - 1), plan.warpgroups)
    start = jnp.minimum(first + wg * share, end)
    stop = jnp.minimum(start + share, end)
    width = part_ref.shape[-1]
    groups = shape.heads // shape.branches
    strided = plgpu.Layout.WG_STRIDED((width,), width // 128)
    spread = lambda x: plgpu.layout_cast(jnp.full((width,), x, jnp.float32), strided)

    rows = [program * plan.rows + k for k in range(plan.rows)]

    def add(n: jax.Array, carry: Any) -> Any:
        slots = [start + n * plan.at_once + k for k in range(plan.at_once)]
        there = [jnp.minimum(slot, end - 1) for slot in slots]
        loaded = [
            (
                [plgpu.load(part_ref.at[slot, head, r], layout=strided) for slot in there],
                [part_lse_ref[slot, head, r] for slot in there],
            )
            for r in rows
        ]
        added = []
        for (acc, top, total), (parts, lses) in zip(carry, loaded, strict=True):
            lses = [jnp.where(slot < stop, lse, -jnp.inf) for slot, lse in zip(slots, lses, strict=True)]
            new = functools.reduce(jnp.maximum, lses, top)
            alpha = jnp.exp2((top - new) * LOG2E)
            acc, total = acc * spread(alpha), total * alpha
            for part, lse in zip(parts, lses, strict=True):
                weight = jnp.exp2((lse - new) * LOG2E)
                acc, total = acc + part * spread(weight), total + weight
            added.append((acc, new, total))
        return added

    rounds = lax.div(stop - start + (plan.at_once - 1), plan.at_once)
    nothing = spread(0.0), jnp.float32(LOWEST), jnp.float32(0)
    merged = lax.fori_loop(0, rounds, add, [nothing for _ in rows])

    def finish(r: jax.Array, acc: jax.Array, top: jax.Array, total: jax.Array) -> None:
        out = acc * spread(1.0 / jnp.where(total > 0, total, 1.0))
        out_ref[b, lax.rem(head, groups), r, lax.div(head, groups), :] = out.astype(out_ref.dtype)
        lse_ref[b, head, r] = jnp.where(total > 0, top + jnp.log2(total) * (1 / LOG2E), -jnp.inf)

    if plan.warpgroups == 1:
        for r, row in zip(rows, merged, strict=True):
            finish(r, *row)
        return
    [(acc, top, total)] = merged
    acc_smem[wg, :] = acc
    stat_smem[0, wg] = top
    stat_smem[1, wg] = total
    plgpu.barrier_arrive(done)
    plgpu.barrier_wait(done)

    @pl.when(wg == 0)
    def _() -> None:
        tops = [stat_smem[0, k] for k in range(plan.warpgroups)]
        top = functools.reduce(jnp.maximum, tops)
        scales = [jnp.exp2((t - top) * LOG2E) for t in tops]
        total = functools.reduce(jnp.add, [stat_smem[1, k] * s for k, s in enumerate(scales)])
        accs = [plgpu.load(acc_smem.at[k], layout=strided) * spread(s) for k, s in enumerate(scales)]
        finish(rows[0], functools.reduce(jnp.add, accs), top, total)


@functools.partial(
    jax.jit, static_argnames=("shape", "scale", "config", "interpret")
)  # compiled once for all layers
def attend(
    parts: Parts,
    v: jax.Array | None,
    kv_len: jax.Array,
    page_table: jax.Array | None,
    rotary: Rotary | None,
    *,
    shape: Shape,
    scale: float,
    config: Config,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernels: see `mosaic_gpu.decode_attention`."""
    b, t, heads, m = shape.batch, shape.q_len, shape.heads, shape.rows_per_query
    r, tile_rows, whole = shape.rows, ROWS * config.row_groups, config.n_splits == 1
    tiles, staged = config.tiles(shape), config.stages_output(shape)
    all_rows = tiles * tile_rows
    q_rows = -(-r // 8) * 8 if r < ROWS else all_rows  # what a copy of a tile of queries needs
    kernel = functools.partial(plgpu.kernel, thread_name="wg", compiler_params=PARAMS, interpret=interpret)

    groups, branches = heads // shape.branches, shape.branches

    def by_group(q_BTLMW: jax.Array) -> jax.Array:
        q_BTJGMW = q_BTLMW.reshape(b, t, -1, groups, m, q_BTLMW.shape[-1])
        q = q_BTJGMW.transpose(0, 3, 1, 4, 2, 5).reshape(b, groups, r, *q_BTJGMW.shape[2::3])
        return jnp.pad(q, ((0, 0), (0, 0), (0, q_rows - r), (0, 0), (0, 0)))

    longest = kv_len.max(axis=1) if t > 1 else kv_len.reshape(b)
    limited = lambda n: jnp.clip(n, 0, shape.capacity)
    table = make_table(limited(longest), config) if b > 1 and not whole else longest
    scalars = [longest]
    if b > 1 and not whole:
        scalars.append(table)
    if t > 1:
        row_len = jnp.pad(jnp.repeat(limited(kv_len), m, axis=1), ((0, 0), (0, all_rows - r)), mode="edge")
        by_tile = row_len.reshape(b, tiles, tile_rows)
        scalars += [jnp.stack([by_tile.min(axis=2), by_tile.max(axis=2)]), row_len]
    if page_table is not None:
        scalars.append(page_table)

    bf16 = lambda *s: plgpu.SMEM(s, jnp.bfloat16, transforms=transforms(s[-1]))
    warpgroups, block, stages = config.row_groups * shape.value_groups, config.block, config.stages
    interpreted = interpret is not None
    copies = len(parts) + (not shape.latent)
    part_width = max(shape.v_width, 128)  # a merging warpgroup has an element for each of its threads
    slots = config.n_splits + b
    split = kernel(
        functools.partial(_split_kernel, shape=shape, config=config, scale=scale, interpret=interpreted),
        out_type=[
            jax.ShapeDtypeStruct(
                (b, groups, q_rows if staged else all_rows, branches, shape.v_width), jnp.bfloat16
            )
            if whole
            else jax.ShapeDtypeStruct((slots, heads, all_rows, part_width), jnp.float32),
            jax.ShapeDtypeStruct((b if whole else slots, heads, all_rows), jnp.float32),
        ],
        scratch_types=[
            [bf16(config.row_groups, ROWS, w) for w in shape.widths],
            bf16(config.row_groups, shape.widths[-1], shape.widths[-1]) if shape.rotary else None,
            [bf16(stages, block, w) for w in shape.widths],
            None if shape.latent else bf16(stages, block, shape.v_width),
            None
            if not staged or shape.v_width == shape.widths[0]
            else bf16(config.row_groups, ROWS, shape.v_width),
            [bf16(ROWS, block)] * config.row_groups if shape.value_groups > 1 or interpreted else None,
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=len(parts) + shape.rotary, num_barriers=config.row_groups),
            plgpu.Barrier(num_arrivals=1),
            plgpu.Barrier(num_arrivals=max(1, shape.value_groups - 1)),
            plgpu.Barrier(num_arrivals=1),
        ],
        grid=(heads * tiles, b if whole else config.n_splits),
        grid_names=("tile", "share"),
        num_threads=warpgroups + 1,
        kernel_name="decode_attention",
    )
    keys = [k for _, k in parts] + ([] if v is None else [v])
    rotations = [] if rotary is None else [_rotations(*rotary)]
    out, lse = split(*scalars, *(by_group(q) for q, _ in parts), *rotations, *keys)
    if not whole:
        plan = MergePlan.of(shape, q_rows, config.n_splits)
        out, lse = kernel(
            functools.partial(_merge_kernel, shape=shape, config=config, plan=plan),
            out_type=[
                jax.ShapeDtypeStruct((b, groups, q_rows, branches, part_width), jnp.bfloat16),
                jax.ShapeDtypeStruct((b, heads, q_rows), jnp.float32),
            ],
            scratch_types=[
                plgpu.SMEM((plan.warpgroups, part_width), jnp.float32),
                plgpu.SMEM((2, plan.warpgroups), jnp.float32),
                plgpu.Barrier(num_arrivals=plan.warpgroups),
            ],
            grid=(q_rows // plan.rows, heads, b),
            grid_names=("rows", "head", "batch"),
            num_threads=plan.warpgroups,
            kernel_name="merge_attention",
        )(longest, table, out, lse)
    out_BGTMJV = out[:, :, :r, :, : shape.v_width].reshape(b, groups, t, m, branches, -1)
    out = out_BGTMJV.transpose(0, 2, 4, 1, 3, 5).reshape(b, t, heads, m, -1)
    return out, lse[:, :, :r].reshape(b, heads, t, m).transpose(0, 2, 1, 3)
