"""The kernel that reads the cache, in Pallas Mosaic GPU for Hopper GPUs.

A program holds a tile of query rows of one head. One warpgroup, the producer, issues the copies of blocks of tokens
into a ring in shared memory; the others, the consumers, compute. With many rows, each consumer has 64 of its own; with
a value too wide for one, each has some of its columns, and the first makes the weights for all.

With few rows the blocks of all sequences, laid end to end, are cut into equal shares, so that ragged batches balance
too; a second kernel (`merge`) merges the partial results by their log-sum-exp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mlra_jax.ops import hopper
from mlra_jax.ops.columns import Columns
from mlra_jax.ops.decode.mosaic_gpu.config import Config, value_groups
from mlra_jax.ops.decode.mosaic_gpu.merge import merge
from mlra_jax.ops.decode.mosaic_gpu.schedule import Schedule, blocks_of, limit, make_table
from mlra_jax.ops.decode.reference import Parts, Rotary
from mlra_jax.ops.decode.shape import Shape
from mlra_jax.ops.hopper import LOG2E, MATRIX, ROW, ROWS, plgpu, spread
from mlra_jax.ops.hopper import matrix_smem as smem

Static = hopper.Static[Shape, Config]


class Inputs(NamedTuple):
    """What the kernel reads."""

    longest: Any  # int32 [B]: tokens that the longest query of a sequence sees
    table: Any  # see `make_table`; None: there is one share, or one sequence
    bounds: (
        Any  # int32 [2, B, tiles]: fewest and most tokens that a row of a tile sees; None: all see the same
    )
    row_len: Any  # int32 [B, rows]: tokens that each row sees; None: all see the same
    page_table: Any  # int32 [B, N]; None: the cache is contiguous
    queries: Any  # of each part [B, G, rows, J or 1, W or more]: head j*G + g reads (g, j)
    rotations: Any  # [B, R, R], see `rotation_matrices`; None: the queries need none
    keys: Any  # of each part [P, L or 1, S, W], or columns of [P, S, all columns]
    values: Any  # [P, L, S, V]; None: the keys of the first part


class Outputs(NamedTuple):
    """What the kernel writes."""

    out: Any  # [B, G, rows, J, V]; with several shares float32 [partial results, L, rows, V]
    lse: Any  # float32 [B, L, rows]; with several shares [partial results, L, rows]


class Scratch(NamedTuple):
    """Shared memory and barriers of a stream."""

    queries: Any  # of each part [row groups, 64, W]
    rotations: Any  # [row groups, R, R], or None
    keys: Any  # of each part [stages, block, W]
    values: Any  # [stages, block, V]; None: the keys of the first part
    out: Any  # [row groups, 64, V]; None: over the queries of the first part, or not staged
    weights: Any  # [64, block], for consumers that share weights, or None
    row_factor: Any  # float32 [64]: what the consumers of the other columns multiply their rows by
    full: Any  # of each stage: its block has arrived
    free: Any  # of each stage: its block has been used
    queries_full: Any  # of each row group: its queries have arrived
    weights_full: Any  # the weights and row factors are written
    weights_free: Any  # they have been used
    blanked: Any  # values past the last token are zeros


class Streams(NamedTuple):
    """Shared memory and barriers of a program."""

    streams: Any  # of each stream a `Scratch`


def rotation_matrices(cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Matrices [B, R, R] that rotate queries, multiplied from the right; for one query of each row."""
    diagonal = lambda x: jnp.eye(x.shape[-1]) * x  # [B, 1, R/2] to [B, R/2, R/2]
    cos, sin = diagonal(cos_BTR), diagonal(sin_BTR)
    halves = jnp.concatenate([cos, sin], axis=2), jnp.concatenate([-sin, cos], axis=2)
    return jnp.concatenate(halves, axis=1).astype(jnp.bfloat16)


def accumulate(acc: jax.Array, a: Any, b: Any, interpret: bool) -> jax.Array:
    """`acc + a @ b`, in place; the interpreter knows only products that start from zero."""

    def product(ref: Any) -> Any:
        plgpu.wgmma(ref, a, b)
        return ref[...] if interpret else None

    if interpret:
        return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))
    return pl.run_state(product)(plgpu.ACC.init(acc))


class Program:
    """What the warpgroups of a stream share: its references, its place in the grid, and the blocks that it has."""

    def __init__(self, static: Static, inputs: Inputs, outputs: Outputs, scratch: Scratch, stream: int):
        self.inputs, self.outputs, self.scratch = inputs, outputs, scratch
        self.shape, self.config, self.scale = static.shape, static.config, static.scale
        self.interpret, shape, config = static.interpret is not None, static.shape, static.config
        self.values = scratch.keys[0] if shape.latent else scratch.values
        self.staged_out = scratch.queries[0] if scratch.out is None else scratch.out
        self.whole = config.n_splits == 1
        self.seen_by_longest = limit(inputs.longest, shape)
        tiles = config.tiles(shape)
        g, self.share = lax.axis_index("tile"), lax.axis_index("share") * config.streams + stream
        # Later rows may see more: the longest programs come first.
        self.head, self.tile = lax.div(g, tiles), tiles - 1 - lax.rem(g, tiles)
        groups = shape.heads // shape.branches
        self.branch, self.group = lax.div(self.head, groups), lax.rem(self.head, groups)
        if self.whole:
            self.n_blocks = blocks_of(self.most(self.share), config.block)
        else:
            self.schedule = Schedule(self.seen_by_longest, inputs.table, config)
            self.first, self.last, self.start, self.n_blocks = self.schedule.share(self.share)

    def fewest(self, b: Any) -> jax.Array:
        """Fewest tokens of sequence b that a row of this tile sees."""
        bounds = self.inputs.bounds
        return self.seen_by_longest(b) if bounds is None else bounds[0, b, self.tile]

    def most(self, b: Any) -> jax.Array:
        """Most tokens of sequence b that a row of this tile sees."""
        bounds = self.inputs.bounds
        return self.seen_by_longest(b) if bounds is None else bounds[1, b, self.tile]

    def for_sequences(self, body: Callable[..., None]) -> None:
        """Calls `body(b, j0, j1, n0)` for each sequence b of this program, whose blocks j0 to j1 - 1 it has; n0 blocks
        come before. The producer and all consumers walk the same way."""
        if self.whole:
            body(self.share, jnp.int32(0), self.n_blocks, jnp.int32(0))
            return

        def one(b: jax.Array, n0: jax.Array) -> jax.Array:
            j0 = jnp.where(b == self.first, self.start, 0)
            j1 = jnp.minimum(j0 + self.n_blocks - n0, self.schedule.blocks(b))
            body(b, j0, j1, n0)
            return n0 + j1 - j0

        lax.fori_loop(self.first, self.last + 1, one, jnp.int32(0))


def tokens_of(cached: Any, *, page: Any, head: Any, tokens: Any) -> Any:
    """Those of a head in a page, [tokens, width]."""
    if not isinstance(cached, Columns):
        return cached.at[page, head, tokens]
    return cached.array.at[page, tokens, pl.ds(cached.start(head), cached.width)]


def produce(program: Program) -> None:
    """The producer: copies each block of this program into the ring."""
    inputs, scratch, shape, config = program.inputs, program.scratch, program.shape, program.config
    plgpu.set_max_registers(hopper.PRODUCER_REGISTERS, action="decrease")

    n_pages, run = config.pages(shape), min(config.block, shape.page_size)

    def copy_run(stage: jax.Array, i: int, page: jax.Array, at: Any) -> None:
        """The i-th run of a block: tokens of one page, from place `at` on."""

        def copy(cached: Any, target: Any, head: Any) -> None:
            source = tokens_of(cached, page=page, head=head, tokens=pl.ds(at, run))
            target = target.at[stage] if n_pages == 1 else target.at[stage, pl.ds(i * run, run)]
            plgpu.copy_gmem_to_smem(source, target, scratch.full.at[stage])

        for keys, target, shared in zip(inputs.keys, scratch.keys, shape.shared, strict=True):
            copy(keys, target, 0 if shared else program.head)
        if inputs.values is not None:
            copy(inputs.values, scratch.values, program.head)

    def sequence(b: jax.Array, j0: jax.Array, j1: jax.Array, n0: jax.Array) -> None:
        def one(j: jax.Array, _: None) -> None:
            stage = hopper.wait_until_free(n0 + j - j0, config.stages, scratch.free)
            at = j * config.block
            if inputs.page_table is None:
                copy_run(stage, 0, b, at)
                return
            first, last = lax.div(at, shape.page_size), inputs.page_table.shape[1] - 1
            for i in range(n_pages):
                index = first if n_pages == 1 else jnp.minimum(first + i, last)
                # What a table holds past a row's end may be no page at all.
                page = jnp.clip(inputs.page_table[b, index], 0, shape.pages - 1)
                copy_run(stage, i, page, at - first * shape.page_size if n_pages == 1 else 0)

        lax.fori_loop(j0, j1, one, None)

    program.for_sequences(sequence)
    hopper.drain(program.n_blocks, config.stages, scratch.free)


class Consumer:
    """A warpgroup that attends from its 64 query rows, or makes its columns of their output."""

    def __init__(self, program: Program, me: int):
        self.program, self.me = program, me
        shape, config = program.shape, program.config
        self.value_groups = value_groups(shape)
        self.row_group, value_group = (0, me) if self.value_groups > 1 else (me, 0)
        self.leads = value_group == 0
        """Whether it makes the weights."""
        self.width = shape.v_width // self.value_groups
        self.columns = pl.ds(value_group * self.width, self.width)
        self.row0 = (program.tile * config.row_groups + self.row_group) * ROWS
        self.rows = pl.ds(self.row0, ROWS)
        self.n_rows = min(ROWS, program.inputs.queries[0].shape[2])
        # A warpgroup multiplies weights of its own from registers. The interpreter knows shared memory alone.
        self.from_registers = self.value_groups == 1 and not program.interpret

    def run(self) -> None:
        """Attends to all sequences of the program."""
        config, scratch = self.program.config, self.program.scratch
        consumers = config.streams * config.row_groups * self.value_groups
        registers = hopper.consumer_registers(consumers, producers=config.streams)
        plgpu.set_max_registers(registers, action="increase")
        if not self.leads:
            plgpu.barrier_arrive(scratch.weights_free)
        self.program.for_sequences(self.sequence)
        if self.leads and self.value_groups > 1:
            plgpu.barrier_wait(scratch.weights_free)

    def sequence(self, b: jax.Array, j0: jax.Array, j1: jax.Array, n0: jax.Array) -> None:
        """Attends to blocks j0 to j1 - 1 of sequence b; n0 blocks of the program come before."""
        program, block = self.program, self.program.config.block
        longest = program.seen_by_longest(b)
        seen = self.load_queries(b, longest) if self.leads else None
        step = functools.partial(self.step, j0=j0, n0=n0, seen=seen, longest=longest)
        carry = hopper.zeros(ROWS, self.width), hopper.row_vector(hopper.LOWEST), hopper.row_vector(0.0)
        clear = jnp.clip(lax.div(program.fewest(b), block), j0, j1)  # up to here every row sees every token
        carry = lax.fori_loop(j0, clear, functools.partial(step, masked=False), carry)
        acc, m, norm = lax.fori_loop(clear, j1, functools.partial(step, masked=True), carry)
        self.write(b, acc, m, norm)

    def load_queries(self, b: jax.Array, longest: jax.Array) -> jax.Array:
        """Copies the queries of sequence b, rotates them if need be, and returns how many tokens they see."""
        program, scratch, shape = self.program, self.program.scratch, self.program.shape
        inputs, full = program.inputs, self.program.scratch.queries_full.at[self.row_group]
        for queries, target, width in zip(inputs.queries, scratch.queries, shape.widths, strict=True):
            own, last = lax.rem(program.branch, queries.shape[3]), pl.ds(queries.shape[4] - width, width)
            source = queries.at[b, program.group, pl.ds(self.row0, self.n_rows), own, last]
            plgpu.copy_gmem_to_smem(source, target.at[self.row_group, pl.ds(0, self.n_rows)], full)
        if inputs.rotations is not None:
            rotation = scratch.rotations.at[self.row_group]
            plgpu.copy_gmem_to_smem(inputs.rotations.at[b], rotation, full)
        plgpu.barrier_wait(full)
        if inputs.rotations is not None:
            q = scratch.queries[-1].at[self.row_group]

            def rotated(ref: Any) -> jax.Array:
                plgpu.wgmma(ref, q, rotation)
                return ref[...]

            q[...] = pl.run_scoped(rotated, plgpu.ACC(q.shape, jnp.float32)).astype(jnp.bfloat16)
            plgpu.commit_smem()
        if inputs.row_len is None:
            return longest
        seen = plgpu.load(inputs.row_len.at[b, self.rows], layout=ROW, optimized=False)
        return spread(seen, (ROWS, program.config.block))

    def step(
        self,
        j: jax.Array,
        carry: Any,
        *,
        j0: jax.Array,
        n0: jax.Array,
        seen: Any,
        longest: jax.Array,
        masked: bool,
    ) -> Any:
        """Adds block j to the accumulator, the running maximum and the running sum."""
        acc, m, norm = carry
        scratch = self.program.scratch
        stage = lax.rem(n0 + j - j0, self.program.config.stages)
        plgpu.barrier_wait(scratch.full.at[stage])
        if masked and self.leads:  # others wait for the weights, which come after
            self.blank_unseen(stage, j, longest)
        if self.leads:
            m, norm, alpha, weights = self.make_weights(stage, j, m, norm, seen if masked else None)
        else:
            plgpu.barrier_wait(scratch.weights_full)
            alpha, weights = self.load_row_factor(), scratch.weights[0]
        acc = acc * spread(alpha, acc.shape)
        acc = accumulate(acc, weights, self.program.values.at[stage, :, self.columns], self.program.interpret)
        if not self.leads:
            plgpu.barrier_arrive(scratch.weights_free)
        plgpu.barrier_arrive(scratch.free.at[stage])
        return acc, m, norm

    def make_weights(self, stage: jax.Array, j: jax.Array, m: jax.Array, norm: jax.Array, seen: Any) -> Any:
        """Running maximum and sum with block j, the factor of what was summed before, and the block's weights.

        Args:
          stage: of the ring.
          j: block of the sequence.
          m: running maximum of the scores, in base 2.
          norm: running sum of the weights.
          seen: how many tokens each row sees; None: all of the block.
        """
        program, scratch, size = self.program, self.program.scratch, (ROWS, self.program.config.block)

        def scores(ref: Any) -> jax.Array:
            for q, k in zip(scratch.queries, scratch.keys, strict=True):
                plgpu.wgmma(ref, q.at[self.row_group], k.at[stage].transpose((1, 0)))
            return ref[...]

        s = pl.run_scoped(scores, plgpu.ACC(size, jnp.float32))
        if seen is not None:
            token = plgpu.broadcasted_iota(jnp.int32, size, 1, layout=MATRIX)
            s = jnp.where(token + j * program.config.block < seen, s, -jnp.inf)
        scale = program.scale * LOG2E
        m_new = jnp.maximum(m, s.max(axis=1) * scale)
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(s * scale - spread(m_new, size))
        norm = norm * alpha + p.sum(axis=1)
        p = p.astype(jnp.bfloat16)
        if self.value_groups > 1:
            plgpu.barrier_wait(scratch.weights_free)
        if not self.from_registers:
            scratch.weights[self.row_group][...] = p
        self.publish(alpha)
        if self.value_groups == 1 and not self.from_registers:
            plgpu.commit_smem()
        return m_new, norm, alpha, p if self.from_registers else scratch.weights[self.row_group]

    def publish(self, row_factor: jax.Array) -> None:
        """Hands the weights, and a factor for each row, to the consumers of the other columns."""
        scratch = self.program.scratch
        if self.value_groups > 1:
            scratch.row_factor[...] = row_factor
            plgpu.commit_smem()
            plgpu.barrier_arrive(scratch.weights_full)

    def load_row_factor(self) -> jax.Array:
        """What the leading consumer has published."""
        return plgpu.load(self.program.scratch.row_factor, layout=ROW, optimized=False)

    def blank_unseen(self, stage: jax.Array, j: jax.Array, longest: jax.Array) -> None:
        """Zeroes values past the last token: a weight of zero times NaN would be NaN."""
        scratch, config = self.program.scratch, self.program.config

        @pl.when((j + 1) * config.block > longest)
        def _() -> None:
            if self.me > 0:
                plgpu.barrier_wait(scratch.blanked)
                return
            for r in range(0, config.block, ROWS):
                for c in range(0, self.program.shape.v_width, 64):
                    ref = self.program.values.at[stage, pl.ds(r, ROWS), pl.ds(c, 64)]
                    token = plgpu.broadcasted_iota(jnp.int32, (ROWS, 64), 0, layout=MATRIX)
                    v = plgpu.load(ref, layout=MATRIX, optimized=False)
                    ref[...] = jnp.where(token + (j * config.block + r) < longest, v, jnp.zeros_like(v))
            plgpu.commit_smem()
            if config.row_groups > 1:
                plgpu.barrier_arrive(scratch.blanked)

    def write(self, b: jax.Array, acc: jax.Array, m: jax.Array, norm: jax.Array) -> None:
        """The epilogue of a sequence: normalises the output and writes it, with the log-sum-exp."""
        program, scratch, (out, lse_ref) = self.program, self.program.scratch, self.program.outputs
        lse = None
        if self.leads:
            inverse = 1.0 / jnp.where(norm > 0, norm, 1.0)
            lse = jnp.where(norm > 0, (m + jnp.log2(norm)) * (1 / LOG2E), -jnp.inf)
            if self.value_groups > 1:
                plgpu.barrier_wait(scratch.weights_free)
                self.publish(inverse)
        else:
            plgpu.barrier_wait(scratch.weights_full)
            inverse = self.load_row_factor()
            plgpu.barrier_arrive(scratch.weights_free)
        acc = acc * spread(inverse, acc.shape)
        at = b if program.whole else program.share + b
        if self.leads:
            lse_ref[at, program.head, self.rows] = lse
        if not program.whole:
            out[at, program.head, self.rows, self.columns] = acc.astype(out.dtype)
        elif not program.config.stages_output(program.shape):
            out[b, program.group, self.rows, program.branch, self.columns] = acc.astype(out.dtype)
        else:
            staged = program.staged_out
            staged[self.row_group] = acc.astype(jnp.bfloat16)
            plgpu.commit_smem()
            target = out.at[b, program.group, pl.ds(self.row0, self.n_rows), program.branch]
            plgpu.copy_smem_to_gmem(staged.at[self.row_group, pl.ds(0, self.n_rows)], target)
            plgpu.wait_smem_to_gmem(0)


def _inputs(
    static: Static,
    q_rows: int,
    parts: Parts,
    v: jax.Array | None,
    kv_len: jax.Array,
    page_table: jax.Array | None,
    rotary: Rotary | None,
) -> Inputs:
    shape, config = static.shape, static.config
    b, t, m, r = shape.batch, shape.q_len, shape.heads_per_kv, shape.rows
    tiles, tile_rows = config.tiles(shape), ROWS * config.row_groups
    limited = lambda n: jnp.clip(n, 0, shape.capacity)
    longest = kv_len.max(axis=1) if t > 1 else kv_len.reshape(b)
    table = make_table(limited(longest), config) if b > 1 and config.n_splits > 1 else None
    bounds = row_len = None
    if t > 1:
        rows = ((0, 0), (0, tiles * tile_rows - r))
        row_len = jnp.pad(jnp.repeat(limited(kv_len), m, axis=1), rows, mode="edge")
        by_tile = row_len.reshape(b, tiles, tile_rows)
        bounds = jnp.stack([by_tile.min(axis=2), by_tile.max(axis=2)])

    def by_group(q_BTLMW: jax.Array) -> jax.Array:
        groups = shape.heads // shape.branches
        q_BTJGMW = q_BTLMW.reshape(b, t, -1, groups, m, q_BTLMW.shape[-1])
        q = q_BTJGMW.transpose(0, 3, 1, 4, 2, 5).reshape(b, groups, r, *q_BTJGMW.shape[2::3])
        return jnp.pad(q, ((0, 0), (0, 0), (0, q_rows - r), (0, 0), (0, 0)))

    return Inputs(
        longest=longest,
        table=table,
        bounds=bounds,
        row_len=row_len,
        page_table=page_table,
        queries=tuple(by_group(q) for q, _ in parts),
        rotations=None if rotary is None else rotation_matrices(*rotary),
        keys=tuple(k.of(k.flat) if isinstance(k, Columns) else k for _, k in parts),
        values=v,
    )


@functools.partial(jax.jit, static_argnums=0)  # compiled once for all layers
def attend(static: Static, parts: Parts, *arrays: Any) -> tuple[jax.Array, jax.Array]:
    """Runs the kernels.

    Args:
      static: what they are compiled for.
      parts: see `mlra_jax.ops.decode.reference.Arguments`.
      *arrays: v, kv_len, page_table and rotary, see there.
    """
    shape, config, interpret = static.shape, static.config, static.interpret
    b, t, heads, m, r = shape.batch, shape.q_len, shape.heads, shape.heads_per_kv, shape.rows
    whole, staged = config.n_splits == 1, config.stages_output(shape)
    all_rows = config.tiles(shape) * ROWS * config.row_groups
    q_rows = -(-r // 8) * 8 if r < ROWS else all_rows  # what a copy of a tile of queries needs
    groups, branches = heads // shape.branches, shape.branches
    inputs = _inputs(static, q_rows, parts, *arrays)
    part_width = max(shape.v_width, 128)  # a merging warpgroup has an element for each of its threads
    results = b if whole else config.n_splits + b  # shares leave partial ones, see `make_table`
    out_shape: tuple[int, ...] = (b, groups, q_rows if staged else all_rows, branches, shape.v_width)
    if not whole:
        out_shape = (results, heads, all_rows, part_width)
    stages, block, row_groups = config.stages, config.block, config.row_groups
    consumers = row_groups * value_groups(shape)
    shares_weights = value_groups(shape) > 1 or interpret is not None
    own_out = staged and shape.v_width != shape.widths[0]

    def kernel(inputs: Inputs, outputs: Outputs, scratch: Streams) -> None:
        def run(stream: int, own: Scratch) -> None:
            program = Program(static, inputs, outputs, own, stream)
            first = stream * (consumers + 1)
            hopper.run_roles(
                lambda: produce(program), lambda me: Consumer(program, me).run(), consumers, first
            )

        for stream, own in enumerate(scratch.streams):
            run(stream, own)

    stream = Scratch(
        queries=[smem(row_groups, ROWS, w) for w in shape.widths],
        rotations=smem(row_groups, *shape.widths[-1:] * 2) if shape.rotary else None,
        keys=[smem(stages, block, w) for w in shape.widths],
        values=None if shape.latent else smem(stages, block, shape.v_width),
        out=smem(row_groups, ROWS, shape.v_width) if own_out else None,
        weights=[smem(ROWS, block)] * row_groups if shares_weights else None,
        row_factor=plgpu.SMEM((ROWS,), jnp.float32),
        full=plgpu.Barrier(num_arrivals=len(shape.cached) * config.pages(shape), num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        queries_full=plgpu.Barrier(num_arrivals=len(parts) + shape.rotary, num_barriers=row_groups),
        weights_full=plgpu.Barrier(num_arrivals=1),
        weights_free=plgpu.Barrier(num_arrivals=max(1, value_groups(shape) - 1)),
        blanked=plgpu.Barrier(num_arrivals=1),
    )

    out, lse = hopper.run_kernel(
        kernel,
        inputs,
        Outputs(
            out=jax.ShapeDtypeStruct(out_shape, jnp.bfloat16 if whole else jnp.float32),
            lse=jax.ShapeDtypeStruct((results, heads, all_rows), jnp.float32),
        ),
        Streams([stream] * config.streams),
        grid=(heads * config.tiles(shape), config.shares(shape) // config.streams),
        grid_names=("tile", "share"),
        num_threads=config.streams * (consumers + 1),
        compiler_params=hopper.PARAMS,
        interpret=interpret,
        kernel_name="decode_attention",
    )
    if not whole:
        out, lse = merge(static, q_rows, inputs.longest, inputs.table, out, lse)
    out_BGTMJV = out[:, :, :r, :, : shape.v_width].reshape(b, groups, t, m, branches, -1)
    out = out_BGTMJV.transpose(0, 2, 4, 1, 3, 5).reshape(b, t, heads, m, -1)
    return out, lse[:, :, :r].reshape(b, heads, t, m).transpose(0, 2, 1, 3)
