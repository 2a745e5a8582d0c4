"""Causal attention for Hopper GPUs, in Pallas Mosaic GPU: a kernel for the output, and one each for the gradients of
the queries and of the keys and values.

A consumer warpgroup has a tile of 64 tokens of one query head, or 64 keys; those of a program share the blocks that a
producer streams through a ring in shared memory. The gradients' kernels compute the weights again from the log-sum-exp,
and neither adds to memory that others write, so gradients are the same from run to run. Arrays are laid out as products
with weights leave them: nothing is transposed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mlra_jax.ops.attention.mosaic_gpu.config import Config, Shape
from mlra_jax.ops.hopper import (
    LOG2E,
    LOWEST,
    MATRIX,
    MAX_REGISTERS,
    PARAMS,
    PRODUCER_REGISTERS,
    ROW,
    ROWS,
    consumer_registers,
    matrix_smem,
    plgpu,
    row_vector,
    run_kernel,
    run_roles,
    spread,
    stream,
    zeros,
)

_COLUMN = plgpu.Layout.WGMMA.reduce(0)
KEY_GROUPS = 2
"""Consumers of a program for the gradients of keys, each with 64 keys."""


class Tensors(NamedTuple):
    """What attention is computed of."""

    start: Any  # int32 [1]: position of the first query
    queries: Any  # of each part [M, B, T, heads of the part, W]
    keys: Any  # of each part [B, S, heads of the part, W]
    values: Any  # [B, S, L, V]; None: the first part of the keys


class Inputs(NamedTuple):
    """What the kernels read; the gradients' kernels all of it."""

    tensors: Tensors
    d_out: Any = None  # gradient of the output [M, B, T, L, V]
    lse: Any = None  # log-sum-exp in base 2 [M, B, L, T]
    delta: Any = None  # sums of gradient times output, times the scale [M, B, L, T]


class Forward(NamedTuple):
    """What the forward kernel writes."""

    out: Any  # [M, B, T, L, V]
    lse: Any  # float32 [M, B, L, T]


class Gradients(NamedTuple):
    """What a gradients' kernel writes."""

    parts: Any  # of each part: queries [M, B, T, L, W], or keys [shares, B, S, L, W] with those of the values last


class RowScratch(NamedTuple):
    """Shared memory and barriers of a program for tiles of query rows."""

    queries: Any  # of each part [consumers, 64, W]
    d_out: Any  # [consumers, 64, V], for gradients
    keys: Any  # of each part [stages, block, W]
    values: Any  # [stages, block, V]; None: the keys of the first part
    out: Any  # [consumers, 64, V]; None: over the queries
    weights: Any  # of each consumer [64, block], for the interpreter
    full: Any  # of each stage: its block has arrived
    free: Any  # of each stage: its block has been used
    own_full: Any  # of each consumer: its queries have arrived


class KeyScratch(NamedTuple):
    """Shared memory and barriers of a program for tiles of keys."""

    keys: Any  # of each part [consumers, 64, W]
    values: Any  # [consumers, 64, V]; None: the keys of the first part
    queries: Any  # of each part [stages, 64, W]
    d_out: Any  # [stages, 64, V]
    lse: Any  # float32 [stages, 64]
    delta: Any  # float32 [stages, 64]
    weights: Any  # of each consumer [2, 64, 64], for the interpreter
    full: Any  # of each stage: its block has arrived
    free: Any  # of each stage: its block has been used
    own_full: Any  # of each consumer: its keys have arrived


def multiply(interpret: bool, *pairs: tuple[tuple[int, ...], list[tuple[Any, Any]]]) -> list[jax.Array]:
    """For each shape and its pairs of operands, the sum of their products; all are under way together."""

    def run(*refs: Any) -> list[jax.Array]:
        for ref, (_, operands) in zip(refs, pairs, strict=True):
            for a, b in operands:
                plgpu.wgmma(ref, a, b)
        return [ref[...] for ref in refs]

    if interpret:  # it knows one product at a time
        one = lambda a, b: pl.run_scoped(
            lambda ref: (plgpu.wgmma(ref, a, b), ref[...])[1],
            plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32),
        )
        return [sum(one(a, b) for a, b in operands) for _, operands in pairs]
    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape, _ in pairs))


def add_products(
    interpret: bool, accs: list[jax.Array], pairs: list[tuple[int, Any, Any]]
) -> list[jax.Array]:
    """Adds a @ b to accumulator i, for each (i, a, b), in place."""
    if interpret:
        accs = list(accs)
        for i, a, b in pairs:
            accs[i] = accs[i] + multiply(True, (accs[i].shape, [(a, b)]))[0]
        return accs

    def run(refs: Any) -> None:
        for i, a, b in pairs:
            plgpu.wgmma(refs[i], a, b)

    return list(pl.run_state(run)(tuple(plgpu.ACC.init(acc) for acc in accs)))


class Program:
    """What the warpgroups of a program share: its references, and the head and row of the batch that it has."""

    def __init__(
        self, inputs: Inputs, outputs: Any, scratch: Any, *, shape: Shape, scale: float, interpret: bool
    ):
        self.inputs, self.outputs, self.scratch = inputs, outputs, scratch
        self.shape, self.scale, self.interpret = shape, scale, interpret
        self.head, self.b = lax.axis_index("head"), lax.axis_index("batch")
        self.start = inputs.tensors.start[0]
        self.values = scratch.keys[0] if shape.latent else scratch.values

    def row_tile(self, r: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Query head and first token of tile r: the heads' tiles of the same tokens follow each other."""
        m = self.shape.heads_per_kv
        return lax.rem(r, m), lax.div(r, m) * ROWS

    def queries(self, r: jax.Array) -> list[Any]:
        """The parts of tile r's queries."""
        m, t = self.row_tile(r)
        heads = [lax.rem(self.head, n) for n in self.shape.q_heads]
        refs = self.inputs.tensors.queries
        return [q.at[m, self.b, pl.ds(t, ROWS), n] for q, n in zip(refs, heads, strict=True)]

    def keys(self, first: jax.Array, n: int) -> list[Any]:
        """The parts of n keys, and their values where those are not part of the keys."""
        tensors, tokens = self.inputs.tensors, pl.ds(first, n)
        heads = [lax.rem(self.head, n) for n in self.shape.k_heads]
        keys = [k.at[self.b, tokens, h] for k, h in zip(tensors.keys, heads, strict=True)]
        return keys if tensors.values is None else [*keys, tensors.values.at[self.b, tokens, self.head]]

    def key_smem(self) -> list[Any]:
        """Where `keys` go."""
        return [*self.scratch.keys, *([] if self.shape.latent else [self.scratch.values])]

    def like_out(self, ref: Any, r: jax.Array) -> Any:
        """Tile r of an array like the output."""
        m, t = self.row_tile(r)
        return ref.at[m, self.b, pl.ds(t, ROWS), self.head]

    def like_lse(self, ref: Any, r: jax.Array) -> Any:
        """Tile r of an array like the log-sum-exp."""
        m, t = self.row_tile(r)
        return ref.at[m, self.b, self.head, pl.ds(t, ROWS)]

    def load_own(self, me: int, copies: Iterator[tuple[Any, Any]] | list[tuple[Any, Any]]) -> None:
        """Begins the copies of what a consumer keeps."""
        for source, target in copies:
            plgpu.copy_gmem_to_smem(source, target, self.scratch.own_full.at[me])


class RowProgram(Program):
    """A program with a tile of query rows for each consumer, past which blocks of keys stream."""

    def __init__(self, *args: Any, consumers: int, block: int, stages: int, **options: Any):
        super().__init__(*args, **options)
        self.consumers, self.block, self.stages = consumers, block, stages
        self.tile = lax.axis_size("tile") - 1 - lax.axis_index("tile")  # long ones first
        last_token = self.row_tile(self.tile * consumers + (consumers - 1))[1] + (ROWS - 1)
        seen = jnp.minimum(self.start + last_token + 1, self.shape.keys)
        self.n_blocks = lax.div(seen + (block - 1), block)

    def produce(self) -> None:
        """The producer: streams the blocks of keys, and of values."""
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

        def copies(j: jax.Array, stage: jax.Array) -> Any:
            targets = [smem.at[stage] for smem in self.key_smem()]
            return zip(self.keys(j * self.block, self.block), targets, strict=True)

        stream(self.n_blocks, self.stages, self.scratch.full, self.scratch.free, copies)


class RowConsumer:
    """A warpgroup with a tile of 64 query rows."""

    def __init__(self, program: RowProgram, me: int):
        self.program, self.me, self.size = program, me, (ROWS, program.block)
        plgpu.set_max_registers(consumer_registers(program.consumers), action="increase")
        self.r = program.tile * program.consumers + me
        self.t0 = program.row_tile(self.r)[1] + program.start
        own = [smem.at[me] for smem in program.scratch.queries]
        program.load_own(me, zip(program.queries(self.r), own, strict=True))

    def run(self) -> None:
        """Attends to all blocks of keys that a row sees."""
        program, carry = self.program, self.start()
        clear = lax.div(
            jnp.minimum(self.t0 + 1, program.shape.keys), program.block
        )  # seen by every row, whole
        carry = lax.fori_loop(0, clear, functools.partial(self.step, masked=False), carry)
        carry = lax.fori_loop(clear, program.n_blocks, functools.partial(self.step, masked=True), carry)
        self.write(carry)

    def start(self) -> Any:
        """The first carry, when the tile's own arrays have arrived."""
        raise NotImplementedError

    def add_block(self, j: jax.Array, stage: jax.Array, carry: Any, masked: bool) -> Any:
        """The carry with block j of the keys."""
        raise NotImplementedError

    def write(self, carry: Any) -> None:
        """The epilogue."""
        raise NotImplementedError

    def step(self, j: jax.Array, carry: Any, masked: bool) -> Any:
        """`add_block`, when the block has arrived."""
        scratch, stage = self.program.scratch, lax.rem(j, self.program.stages)
        plgpu.barrier_wait(scratch.full.at[stage])
        carry = self.add_block(j, stage, carry, masked)
        plgpu.barrier_arrive(scratch.free.at[stage])
        return carry

    def scores(self, stage: jax.Array) -> Any:
        """What to multiply for the scores of a block."""
        scratch = self.program.scratch
        operands = zip(scratch.queries, scratch.keys, strict=True)
        return self.size, [(q.at[self.me], k.at[stage].transpose((1, 0))) for q, k in operands]

    def visible(self, j: jax.Array) -> jax.Array:
        """Which keys of block j each row sees."""
        shape = self.program.shape
        row = plgpu.broadcasted_iota(jnp.int32, self.size, 0, layout=MATRIX) + self.t0
        token = plgpu.broadcasted_iota(jnp.int32, self.size, 1, layout=MATRIX) + j * self.program.block
        if shape.keys < shape.tokens:  # the last rows may see all keys, but not what pads them
            row = jnp.minimum(row, shape.keys - 1)
        return token <= row

    def operand(self, x: jax.Array) -> Any:
        """For products from registers; the interpreter knows shared memory alone."""
        x = x.astype(jnp.bfloat16)
        if not self.program.interpret:
            return x
        smem = self.program.scratch.weights[self.me]
        smem[...] = x
        plgpu.commit_smem()
        return smem

    def write_staged(self, results: list[tuple[jax.Array, Any, Any]]) -> None:
        """Writes each array through shared memory to its place in global memory."""
        for x, smem, _ in results:
            smem[self.me] = x.astype(jnp.bfloat16)
        plgpu.commit_smem()
        for _, smem, ref in results:
            plgpu.copy_smem_to_gmem(smem.at[self.me], self.program.like_out(ref, self.r))
        plgpu.wait_smem_to_gmem(0)


class ForwardConsumer(RowConsumer):
    """Makes the output of its rows; carries it with the running maximum and sum."""

    def start(self) -> Any:
        """See `RowConsumer.start`."""
        plgpu.barrier_wait(self.program.scratch.own_full.at[self.me])
        return zeros(ROWS, self.program.shape.v_width), row_vector(LOWEST), row_vector(0.0)

    def add_block(self, j: jax.Array, stage: jax.Array, carry: Any, masked: bool) -> Any:
        """See `RowConsumer.add_block`."""
        (acc, m, norm), program = carry, self.program
        scale = program.scale * LOG2E
        (s,) = multiply(program.interpret, self.scores(stage))
        s = jnp.where(self.visible(j), s, -jnp.inf) if masked else s
        m_new = jnp.maximum(m, s.max(axis=1) * scale)
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(s * scale - spread(m_new, self.size))
        norm = norm * alpha + p.sum(axis=1)
        acc = acc * spread(alpha, acc.shape)
        (acc,) = add_products(program.interpret, [acc], [(0, self.operand(p), program.values.at[stage])])
        return acc, m_new, norm

    def write(self, carry: Any) -> None:
        """See `RowConsumer.write`."""
        (acc, m, norm), program = carry, self.program
        out, lse = program.outputs
        program.like_lse(lse, self.r)[...] = (m + jnp.log2(norm)) * (1 / LOG2E)
        staged = program.scratch.queries[0] if program.scratch.out is None else program.scratch.out
        self.write_staged([(acc * spread(1.0 / norm, acc.shape), staged, out)])


class QueryGradientConsumer(RowConsumer):
    """Makes the gradients of its rows' queries; carries those of each part."""

    def start(self) -> Any:
        """See `RowConsumer.start`."""
        program, scratch, inputs = self.program, self.program.scratch, self.program.inputs
        program.load_own(self.me, [(program.like_out(inputs.d_out, self.r), scratch.d_out.at[self.me])])
        self.lse, self.delta = (
            plgpu.load(program.like_lse(ref, self.r), layout=ROW, optimized=False)
            for ref in (inputs.lse, inputs.delta)
        )
        plgpu.barrier_wait(scratch.own_full.at[self.me])
        return [zeros(ROWS, w) for w in program.shape.widths]

    def add_block(self, j: jax.Array, stage: jax.Array, carry: Any, masked: bool) -> Any:
        """See `RowConsumer.add_block`."""
        program, scratch = self.program, self.program.scratch
        d_weights = self.size, [(scratch.d_out.at[self.me], program.values.at[stage].transpose((1, 0)))]
        s, dp = multiply(program.interpret, self.scores(stage), d_weights)
        p = jnp.exp2(s * (program.scale * LOG2E) - spread(self.lse, self.size))
        p = jnp.where(self.visible(j), p, 0.0) if masked else p
        ds = self.operand(p * (dp * program.scale - spread(self.delta, self.size)))
        return add_products(
            program.interpret, carry, [(n, ds, k.at[stage]) for n, k in enumerate(scratch.keys)]
        )

    def write(self, carry: Any) -> None:
        """See `RowConsumer.write`."""
        program = self.program
        self.write_staged(list(zip(carry, program.scratch.queries, program.outputs.parts, strict=True)))


def _row_kernel(*refs: Any, consumer: Callable[..., RowConsumer], consumers: int, **options: Any) -> None:
    program = RowProgram(*refs, consumers=consumers, **options)
    run_roles(program.produce, lambda me: consumer(program, me).run(), consumers)


class KeyProgram(Program):
    """A program with 64 keys for each consumer, past which a share of the query rows that see them streams."""

    def __init__(self, *args: Any, config: Config, **options: Any):
        super().__init__(*args, **options)
        block, self.share = lax.axis_index("block"), lax.axis_index("share")
        self.stages, m = config.dk_stages, self.shape.heads_per_kv
        self.first_token = block * (ROWS * KEY_GROUPS)
        n_tiles = self.shape.queries // ROWS * m
        # The first tile with a token that sees the first key, and with only tokens that see the last.
        first = lax.div(jnp.maximum(self.first_token - self.start, 0), ROWS) * m
        whole = self.first_token + (ROWS * KEY_GROUPS - 1) - self.start
        whole = lax.div(jnp.maximum(whole, 0) + (ROWS - 1), ROWS) * m
        first = jnp.minimum(first, n_tiles)
        per = lax.div(n_tiles - first + (config.dk_shares - 1), config.dk_shares)
        self.low = jnp.minimum(first + self.share * per, n_tiles)
        self.high = jnp.minimum(self.low + per, n_tiles)
        self.clear = jnp.clip(whole, self.low, self.high)

    def produce(self) -> None:
        """The producer: streams tiles of queries and what belongs to them."""
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        inputs, scratch = self.inputs, self.scratch

        def copies(i: jax.Array, stage: jax.Array) -> Any:
            r = self.low + i
            yield from zip(self.queries(r), [smem.at[stage] for smem in scratch.queries], strict=True)
            yield self.like_out(inputs.d_out, r), scratch.d_out.at[stage]
            yield self.like_lse(inputs.lse, r), scratch.lse.at[stage]
            yield self.like_lse(inputs.delta, r), scratch.delta.at[stage]

        stream(self.high - self.low, self.stages, scratch.full, scratch.free, copies)

    def consume(self, me: int) -> None:
        """A consumer: the gradients of 64 keys and of their values."""
        plgpu.set_max_registers(MAX_REGISTERS, action="increase")
        token0 = self.first_token + me * ROWS
        self.load_own(me, zip(self.keys(token0, ROWS), [s.at[me] for s in self.key_smem()], strict=True))
        plgpu.barrier_wait(self.scratch.own_full.at[me])
        step = functools.partial(self.add_tile, me=me, token0=token0)
        dk = [zeros(ROWS, w) for w in self.shape.key_widths]
        dk = lax.fori_loop(self.low, self.clear, functools.partial(step, masked=True), dk)
        dk = lax.fori_loop(self.clear, self.high, functools.partial(step, masked=False), dk)
        for x, ref in zip(dk, self.outputs.parts, strict=True):
            ref[self.share, self.b, pl.ds(token0, ROWS), self.head] = x.astype(ref.dtype)

    def add_tile(
        self, i: jax.Array, dk: list[jax.Array], *, me: int, token0: jax.Array, masked: bool
    ) -> list[jax.Array]:
        """The gradients with those that tile i of the queries gives."""
        scratch, size, stage = self.scratch, (ROWS, ROWS), lax.rem(i - self.low, self.stages)
        plgpu.barrier_wait(scratch.full.at[stage])
        transposed = lambda x: x.at[stage].transpose((1, 0))
        s, dp = multiply(
            self.interpret,
            (size, [(k.at[me], transposed(q)) for q, k in zip(scratch.queries, scratch.keys, strict=True)]),
            (size, [(self.values.at[me], transposed(scratch.d_out))]),
        )
        lse, delta = (
            plgpu.load(ref.at[stage], layout=_COLUMN, optimized=False) for ref in (scratch.lse, scratch.delta)
        )
        p = jnp.exp2(s * (self.scale * LOG2E) - spread(lse, size, 1))
        if masked:
            token = plgpu.broadcasted_iota(jnp.int32, size, 0, layout=MATRIX) + token0
            first_row = self.row_tile(i)[1] + self.start
            row = plgpu.broadcasted_iota(jnp.int32, size, 1, layout=MATRIX) + first_row
            p = jnp.where(token <= row, p, 0.0)
        ds: Any = (p * (dp * self.scale - spread(delta, size, 1))).astype(jnp.bfloat16)
        weights: Any = p.astype(jnp.bfloat16)
        if self.interpret:
            smem = scratch.weights[me]
            smem[0], smem[1] = weights, ds
            plgpu.commit_smem()
            weights, ds = smem.at[0], smem.at[1]
        value = 0 if self.shape.latent else len(self.shape.widths)
        of_queries = [(n, ds, q.at[stage]) for n, q in enumerate(scratch.queries)]
        dk = add_products(self.interpret, dk, [(value, weights, scratch.d_out.at[stage]), *of_queries])
        plgpu.barrier_arrive(scratch.free.at[stage])
        return dk


def _key_kernel(*refs: Any, **options: Any) -> None:
    program = KeyProgram(*refs, **options)
    run_roles(program.produce, program.consume, KEY_GROUPS)


def _run_rows(
    consumer: Callable[..., RowConsumer],
    inputs: Inputs,
    outputs: Any,
    *,
    shape: Shape,
    consumers: int,
    block: int,
    stages: int,
    scale: float,
    interpret: Any,
    kernel_name: str,
) -> Any:
    tiles = shape.queries // ROWS * shape.heads_per_kv
    assert tiles % consumers == 0
    gradients = inputs.d_out is not None
    staged = not gradients and shape.v_width != shape.widths[0]
    return run_kernel(
        functools.partial(
            _row_kernel,
            consumer=consumer,
            consumers=consumers,
            shape=shape,
            block=block,
            stages=stages,
            scale=scale,
            interpret=interpret is not None,
        ),
        inputs,
        outputs,
        RowScratch(
            queries=[matrix_smem(consumers, ROWS, w) for w in shape.widths],
            d_out=matrix_smem(consumers, ROWS, shape.v_width) if gradients else None,
            keys=[matrix_smem(stages, block, w) for w in shape.widths],
            values=None if shape.latent else matrix_smem(stages, block, shape.v_width),
            out=matrix_smem(consumers, ROWS, shape.v_width) if staged else None,
            weights=None if interpret is None else [matrix_smem(ROWS, block)] * consumers,
            full=plgpu.Barrier(num_arrivals=len(shape.key_widths), num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
            own_full=plgpu.Barrier(num_arrivals=len(shape.widths) + gradients, num_barriers=consumers),
        ),
        grid=(tiles // consumers, shape.heads, shape.batch),
        grid_names=("tile", "head", "batch"),
        num_threads=consumers + 1,
        compiler_params=PARAMS,
        interpret=interpret,
        kernel_name=kernel_name,
    )


def _like_out(shape: Shape, width: int) -> jax.ShapeDtypeStruct:
    """[M, B, T, L, width]."""
    size = shape.heads_per_kv, shape.batch, shape.queries, shape.heads, width
    return jax.ShapeDtypeStruct(size, jnp.bfloat16)


@functools.partial(
    jax.jit, static_argnames=("shape", "config", "scale", "interpret")
)  # compiled once for all layers
def attend(tensors: Tensors, *, shape: Shape, config: Config, scale: float, interpret: Any) -> Forward:
    """Output and log-sum-exp of the scaled scores.

    Args:
      tensors: queries, keys and values, padded as `shape` says.
      shape: sizes.
      config: tiling.
      scale: of the scores.
      interpret: runs on the CPU.
    """
    lse = shape.heads_per_kv, shape.batch, shape.heads, shape.queries
    return _run_rows(
        ForwardConsumer,
        Inputs(tensors),
        Forward(out=_like_out(shape, shape.v_width), lse=jax.ShapeDtypeStruct(lse, jnp.float32)),
        shape=shape,
        consumers=config.row_groups,
        block=config.block,
        stages=config.stages,
        scale=scale,
        interpret=interpret,
        kernel_name="attention",
    )


@functools.partial(jax.jit, static_argnames=("shape", "config", "scale", "interpret"))
def gradients(
    tensors: Tensors,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    *,
    shape: Shape,
    config: Config,
    scale: float,
    interpret: Any,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Gradients for each head of the parts of its queries [M, B, T, L, W], and of its keys [B, S, L, W].

    The last of the keys' is the values' [B, S, L, V]; if the values are the first part of the keys, it is added to
    theirs.

    Args:
      tensors: see `attend`.
      out: as `attend` gave it.
      lse: as `attend` gave it.
      d_out: gradient of the output, like it.
      shape: sizes.
      config: tiling.
      scale: of the scores.
      interpret: runs on the CPU.
    """
    delta = scale * jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1).swapaxes(2, 3)
    inputs = Inputs(tensors, d_out, lse * LOG2E, delta)
    dq = _run_rows(
        QueryGradientConsumer,
        inputs,
        Gradients([_like_out(shape, w) for w in shape.widths]),
        shape=shape,
        consumers=2,
        block=config.dq_block,
        stages=config.dq_stages,
        scale=scale,
        interpret=interpret,
        kernel_name="attention_dq",
    )
    stages, shares = config.dk_stages, config.dk_shares
    dtype = jnp.float32 if shares > 1 else jnp.bfloat16
    vector = plgpu.SMEM((stages, ROWS), jnp.float32)
    like_keys = lambda w: jax.ShapeDtypeStruct((shares, shape.batch, shape.tokens, shape.heads, w), dtype)
    dk = run_kernel(
        functools.partial(
            _key_kernel, shape=shape, config=config, scale=scale, interpret=interpret is not None
        ),
        inputs,
        Gradients([like_keys(w) for w in shape.key_widths]),
        KeyScratch(
            keys=[matrix_smem(KEY_GROUPS, ROWS, w) for w in shape.widths],
            values=None if shape.latent else matrix_smem(KEY_GROUPS, ROWS, shape.v_width),
            queries=[matrix_smem(stages, ROWS, w) for w in shape.widths],
            d_out=matrix_smem(stages, ROWS, shape.v_width),
            lse=vector,
            delta=vector,
            weights=None if interpret is None else [matrix_smem(2, ROWS, ROWS)] * KEY_GROUPS,
            full=plgpu.Barrier(num_arrivals=len(shape.widths) + 3, num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=KEY_GROUPS, num_barriers=stages),
            own_full=plgpu.Barrier(num_arrivals=len(shape.key_widths), num_barriers=KEY_GROUPS),
        ),
        # The first keys are seen by most rows: they come first.
        grid=(shape.batch, shape.heads, shares, shape.tokens // (ROWS * KEY_GROUPS)),
        grid_names=("batch", "head", "share", "block"),
        num_threads=KEY_GROUPS + 1,
        compiler_params=PARAMS,
        interpret=interpret,
        kernel_name="attention_dk",
    )
    of_keys = [x[0] if shares == 1 else x.sum(axis=0).astype(jnp.bfloat16) for x in dk.parts]
    return dq.parts, of_keys
