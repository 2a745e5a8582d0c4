"""Causal attention for Hopper GPUs, in Pallas Mosaic GPU: a kernel for the output, and one each for the gradients of
the queries and of the keys and values.

A consumer warpgroup has a tile of 64 tokens of one query head, or 64 keys; those of a program share the blocks that a
producer streams through a ring in shared memory. The gradients' kernels compute the weights again from the log-sum-exp,
and neither adds to memory that others write, so gradients are the same from run to run. Arrays are laid out as products
with weights leave them: nothing is transposed.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mlra_jax.ops import hopper
from mlra_jax.ops.attention.mosaic_gpu.config import Config, Shape
from mlra_jax.ops.hopper import LOG2E, MATRIX, ROWS, plgpu, spread
from mlra_jax.ops.hopper import matrix_smem as smem

Static = hopper.Static[Shape, Config]
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

    def __init__(self, static: Static, inputs: Inputs, outputs: Any, scratch: Any):
        self.inputs, self.outputs, self.scratch = inputs, outputs, scratch
        self.shape, self.config, self.scale = static.shape, static.config, static.scale
        self.interpret = static.interpret is not None
        self.head, self.b = lax.axis_index("head"), lax.axis_index("batch")
        self.start = inputs.tensors.start[0]
        self.values = scratch.keys[0] if self.shape.latent else scratch.values
        self.key_smem = [*scratch.keys, *([] if self.shape.latent else [scratch.values])]

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

    def like_out(self, ref: Any, r: jax.Array) -> Any:
        """Tile r of an array like the output."""
        m, t = self.row_tile(r)
        return ref.at[m, self.b, pl.ds(t, ROWS), self.head]

    def like_lse(self, ref: Any, r: jax.Array) -> Any:
        """Tile r of an array like the log-sum-exp."""
        m, t = self.row_tile(r)
        return ref.at[m, self.b, self.head, pl.ds(t, ROWS)]


class RowProgram(Program):
    """A program with a tile of query rows for each consumer, past which blocks of keys stream."""

    def __init__(self, *args: Any, consumers: int, block: int, stages: int):
        super().__init__(*args)
        self.consumers, self.block, self.stages = consumers, block, stages
        self.tile = lax.axis_size("tile") - 1 - lax.axis_index("tile")  # long ones first
        last_token = self.row_tile(self.tile * consumers + (consumers - 1))[1] + (ROWS - 1)
        seen = jnp.minimum(self.start + last_token + 1, self.shape.keys)
        self.n_blocks = lax.div(seen + (block - 1), block)

    def produce(self) -> None:
        """The producer: streams the blocks of keys, and of values."""
        plgpu.set_max_registers(hopper.PRODUCER_REGISTERS, action="decrease")

        def copies(j: jax.Array, stage: jax.Array) -> Any:
            targets = [x.at[stage] for x in self.key_smem]
            return zip(self.keys(j * self.block, self.block), targets, strict=True)

        hopper.stream(self.n_blocks, self.stages, self.scratch.full, self.scratch.free, copies)


class RowConsumer:
    """A warpgroup that makes the output of 64 query rows; or, given the output's gradient, that of their queries."""

    def __init__(self, program: RowProgram, me: int):
        self.program, self.me, self.size = program, me, (ROWS, program.block)
        self.gradients = program.inputs.d_out is not None
        self.r = program.tile * program.consumers + me
        self.t0 = program.row_tile(self.r)[1] + program.start

    def run(self) -> None:
        """Attends to all blocks of keys that a row sees."""
        program, shape = self.program, self.program.shape
        plgpu.set_max_registers(hopper.consumer_registers(program.consumers), action="increase")
        self.load()
        vector = hopper.row_vector
        carry: Any = [hopper.zeros(ROWS, w) for w in shape.widths]
        if not self.gradients:
            carry = hopper.zeros(ROWS, shape.v_width), vector(hopper.LOWEST), vector(0.0)
        clear = lax.div(jnp.minimum(self.t0 + 1, shape.keys), program.block)  # seen by every row, whole
        carry = lax.fori_loop(0, clear, functools.partial(self.step, masked=False), carry)
        carry = lax.fori_loop(clear, program.n_blocks, functools.partial(self.step, masked=True), carry)
        self.write(carry)

    def load(self) -> None:
        """Loads the queries and, for gradients, what else belongs to the rows."""
        program, inputs, scratch = self.program, self.program.inputs, self.program.scratch
        copies = list(zip(program.queries(self.r), scratch.queries, strict=True))
        if self.gradients:
            copies.append((program.like_out(inputs.d_out, self.r), scratch.d_out))
        for source, target in copies:
            plgpu.copy_gmem_to_smem(source, target.at[self.me], scratch.own_full.at[self.me])
        if self.gradients:
            self.lse, self.delta = (
                plgpu.load(program.like_lse(ref, self.r), layout=hopper.ROW, optimized=False)
                for ref in (inputs.lse, inputs.delta)
            )
        plgpu.barrier_wait(scratch.own_full.at[self.me])

    def step(self, j: jax.Array, carry: Any, masked: bool) -> Any:
        """Adds block j of the keys to the carry."""
        scratch, stage = self.program.scratch, lax.rem(j, self.program.stages)
        plgpu.barrier_wait(scratch.full.at[stage])
        transposed = lambda x: x.at[stage].transpose((1, 0))
        operands = zip(scratch.queries, scratch.keys, strict=True)
        products = [(self.size, [(q.at[self.me], transposed(k)) for q, k in operands])]
        if self.gradients:
            products.append((self.size, [(scratch.d_out.at[self.me], transposed(self.program.values))]))
        add = self.add_gradients if self.gradients else self.add_output
        carry = add(j, stage, carry, multiply(self.program.interpret, *products), masked)
        plgpu.barrier_arrive(scratch.free.at[stage])
        return carry

    def add_output(self, j: jax.Array, stage: jax.Array, carry: Any, products: Any, masked: bool) -> Any:
        """The sum of weighted values, the running maximum and the running sum of weights, with block j."""
        (acc, m, norm), (s,), scale = carry, products, self.program.scale * LOG2E
        s = jnp.where(self.visible(j), s, -jnp.inf) if masked else s
        m_new = jnp.maximum(m, s.max(axis=1) * scale)
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(s * scale - spread(m_new, self.size))
        norm = norm * alpha + p.sum(axis=1)
        acc = acc * spread(alpha, acc.shape)
        values = self.program.values.at[stage]
        (acc,) = add_products(self.program.interpret, [acc], [(0, self.operand(p), values)])
        return acc, m_new, norm

    def add_gradients(self, j: jax.Array, stage: jax.Array, carry: Any, products: Any, masked: bool) -> Any:
        """The gradients of the queries' parts, with block j."""
        (s, dp), scale, keys = products, self.program.scale, self.program.scratch.keys
        p = jnp.exp2(s * (scale * LOG2E) - spread(self.lse, self.size))
        p = jnp.where(self.visible(j), p, 0.0) if masked else p
        ds = self.operand(p * (dp * scale - spread(self.delta, self.size)))
        pairs = [(n, ds, k.at[stage]) for n, k in enumerate(keys)]
        return add_products(self.program.interpret, carry, pairs)

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
        weights = self.program.scratch.weights[self.me]
        weights[...] = x
        plgpu.commit_smem()
        return weights

    def write(self, carry: Any) -> None:
        """The epilogue: writes the output and its log-sum-exp, or the gradients, through shared memory."""
        program, outputs, scratch = self.program, self.program.outputs, self.program.scratch
        if self.gradients:
            results = list(zip(carry, scratch.queries, outputs.parts, strict=True))
        else:
            acc, m, norm = carry
            program.like_lse(outputs.lse, self.r)[...] = (m + jnp.log2(norm)) * (1 / LOG2E)
            staged = scratch.queries[0] if scratch.out is None else scratch.out
            results = [(acc * spread(1.0 / norm, acc.shape), staged, outputs.out)]
        for x, own, _ in results:
            own[self.me] = x.astype(jnp.bfloat16)
        plgpu.commit_smem()
        for _, own, ref in results:
            plgpu.copy_smem_to_gmem(own.at[self.me], program.like_out(ref, self.r))
        plgpu.wait_smem_to_gmem(0)


class KeyProgram(Program):
    """A program with 64 keys for each consumer, past which a share of the query rows that see them streams."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        block, self.share = lax.axis_index("block"), lax.axis_index("share")
        shares, m = self.config.dk_shares, self.shape.heads_per_kv
        self.stages, self.first_token = self.config.dk_stages, block * (ROWS * KEY_GROUPS)
        n_tiles = self.shape.queries // ROWS * m
        # The first tile with a token that sees the first key, and with only tokens that see the last.
        first = lax.div(jnp.maximum(self.first_token - self.start, 0), ROWS) * m
        whole = self.first_token + (ROWS * KEY_GROUPS - 1) - self.start
        whole = lax.div(jnp.maximum(whole, 0) + (ROWS - 1), ROWS) * m
        first = jnp.minimum(first, n_tiles)
        per = lax.div(n_tiles - first + (shares - 1), shares)
        self.low = jnp.minimum(first + self.share * per, n_tiles)
        self.high = jnp.minimum(self.low + per, n_tiles)
        self.clear = jnp.clip(whole, self.low, self.high)

    def produce(self) -> None:
        """The producer: streams tiles of queries and what belongs to them."""
        plgpu.set_max_registers(hopper.PRODUCER_REGISTERS, action="decrease")
        inputs, scratch = self.inputs, self.scratch

        def copies(i: jax.Array, stage: jax.Array) -> Any:
            r = self.low + i
            yield from zip(self.queries(r), [x.at[stage] for x in scratch.queries], strict=True)
            yield self.like_out(inputs.d_out, r), scratch.d_out.at[stage]
            yield self.like_lse(inputs.lse, r), scratch.lse.at[stage]
            yield self.like_lse(inputs.delta, r), scratch.delta.at[stage]

        hopper.stream(self.high - self.low, self.stages, scratch.full, scratch.free, copies)

    def consume(self, me: int) -> None:
        """A consumer: the gradients of 64 keys and of their values."""
        plgpu.set_max_registers(hopper.MAX_REGISTERS, action="increase")
        token0, own_full = self.first_token + me * ROWS, self.scratch.own_full.at[me]
        for source, target in zip(self.keys(token0, ROWS), self.key_smem, strict=True):
            plgpu.copy_gmem_to_smem(source, target.at[me], own_full)
        plgpu.barrier_wait(own_full)
        step = functools.partial(self.add_tile, me=me, token0=token0)
        dk = [hopper.zeros(ROWS, w) for w in self.shape.key_widths]
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
            both = scratch.weights[me]
            both[0], both[1] = weights, ds
            plgpu.commit_smem()
            weights, ds = both.at[0], both.at[1]
        value = 0 if self.shape.latent else len(self.shape.widths)
        of_queries = [(n, ds, q.at[stage]) for n, q in enumerate(scratch.queries)]
        dk = add_products(self.interpret, dk, [(value, weights, scratch.d_out.at[stage]), *of_queries])
        plgpu.barrier_arrive(scratch.free.at[stage])
        return dk


def _run_rows(static: Static, inputs: Inputs, outputs: Any, consumers: int, block: int, stages: int) -> Any:
    shape, interpret, gradients = static.shape, static.interpret, inputs.d_out is not None
    tiles = shape.queries // ROWS * shape.heads_per_kv
    assert tiles % consumers == 0
    staged = not gradients and shape.v_width != shape.widths[0]

    def kernel(*refs: Any) -> None:
        program = RowProgram(static, *refs, consumers=consumers, block=block, stages=stages)
        hopper.run_roles(program.produce, lambda me: RowConsumer(program, me).run(), consumers)

    return hopper.run_kernel(
        kernel,
        inputs,
        outputs,
        RowScratch(
            queries=[smem(consumers, ROWS, w) for w in shape.widths],
            d_out=smem(consumers, ROWS, shape.v_width) if gradients else None,
            keys=[smem(stages, block, w) for w in shape.widths],
            values=None if shape.latent else smem(stages, block, shape.v_width),
            out=smem(consumers, ROWS, shape.v_width) if staged else None,
            weights=None if interpret is None else [smem(ROWS, block)] * consumers,
            full=plgpu.Barrier(num_arrivals=len(shape.key_widths), num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
            own_full=plgpu.Barrier(num_arrivals=len(shape.widths) + gradients, num_barriers=consumers),
        ),
        grid=(tiles // consumers, shape.heads, shape.batch),
        grid_names=("tile", "head", "batch"),
        num_threads=consumers + 1,
        compiler_params=hopper.PARAMS,
        interpret=interpret,
        kernel_name="attention_dq" if gradients else "attention",
    )


def _like_out(shape: Shape, width: int) -> jax.ShapeDtypeStruct:
    """[M, B, T, L, width]."""
    size = shape.heads_per_kv, shape.batch, shape.queries, shape.heads, width
    return jax.ShapeDtypeStruct(size, jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=0)  # compiled once for all layers
def attend(static: Static, tensors: Tensors) -> Forward:
    """Output and log-sum-exp of the scaled scores."""
    shape, config = static.shape, static.config
    lse = shape.heads_per_kv, shape.batch, shape.heads, shape.queries
    outputs = Forward(_like_out(shape, shape.v_width), jax.ShapeDtypeStruct(lse, jnp.float32))
    return _run_rows(static, Inputs(tensors), outputs, config.row_groups, config.block, config.stages)


@functools.partial(jax.jit, static_argnums=0)
def gradients(
    static: Static, tensors: Tensors, out: jax.Array, lse: jax.Array, d_out: jax.Array
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Gradients for each head of the parts of its queries [M, B, T, L, W], and of its keys [B, S, L, W].

    The last of the keys' is the values' [B, S, L, V]; if the values are the first part of the keys, it is added to
    theirs.

    Args:
      static: what the kernels are compiled for.
      tensors: as for `attend`.
      out: as `attend` gave it.
      lse: as `attend` gave it.
      d_out: gradient of the output, like it.
    """
    shape, config, interpret = static.shape, static.config, static.interpret
    delta = static.scale * jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1).swapaxes(
        2, 3
    )
    inputs = Inputs(tensors, d_out, lse * LOG2E, delta)
    like_queries = Gradients([_like_out(shape, w) for w in shape.widths])
    dq = _run_rows(static, inputs, like_queries, 2, config.dq_block, config.dq_stages)
    stages, shares = config.dk_stages, config.dk_shares
    dtype = jnp.float32 if shares > 1 else jnp.bfloat16
    vector = plgpu.SMEM((stages, ROWS), jnp.float32)
    like_keys = lambda w: jax.ShapeDtypeStruct((shares, shape.batch, shape.tokens, shape.heads, w), dtype)

    def kernel(*refs: Any) -> None:
        program = KeyProgram(static, *refs)
        hopper.run_roles(program.produce, program.consume, KEY_GROUPS)

    dk = hopper.run_kernel(
        kernel,
        inputs,
        Gradients([like_keys(w) for w in shape.key_widths]),
        KeyScratch(
            keys=[smem(KEY_GROUPS, ROWS, w) for w in shape.widths],
            values=None if shape.latent else smem(KEY_GROUPS, ROWS, shape.v_width),
            queries=[smem(stages, ROWS, w) for w in shape.widths],
            d_out=smem(stages, ROWS, shape.v_width),
            lse=vector,
            delta=vector,
            weights=None if interpret is None else [smem(2, ROWS, ROWS)] * KEY_GROUPS,
            full=plgpu.Barrier(num_arrivals=len(shape.widths) + 3, num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=KEY_GROUPS, num_barriers=stages),
            own_full=plgpu.Barrier(num_arrivals=len(shape.key_widths), num_barriers=KEY_GROUPS),
        ),
        # The first keys are seen by most rows: they come first.
        grid=(shape.batch, shape.heads, shares, shape.tokens // (ROWS * KEY_GROUPS)),
        grid_names=("batch", "head", "share", "block"),
        num_threads=KEY_GROUPS + 1,
        compiler_params=hopper.PARAMS,
        interpret=interpret,
        kernel_name="attention_dk",
    )
    of_keys = [x[0] if shares == 1 else x.sum(axis=0).astype(jnp.bfloat16) for x in dk.parts]
    return dq.parts, of_keys
