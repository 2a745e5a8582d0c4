"""Causal attention for Hopper GPUs, in Pallas Mosaic GPU: a kernel for the output, and one each for the gradients of
the queries and of the keys and values.

A warpgroup of a program has a tile of 64 tokens of one query head, or 64 keys; those of a program share what streams
by. The gradients' kernels make the weights again from the log-sum-exp, and neither adds to memory that others write, so
gradients are the same from run to run. Arrays are as products with weights leave them: nothing is turned.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mlra_jax.ops.attention.mosaic_gpu import ROWS, Config, Shape
from mlra_jax.ops.hopper import LOG2E, LOWEST, MATRIX, PARAMS, ROW, plgpu, transforms

_COLUMN = plgpu.Layout.WGMMA.reduce(0)
KEY_GROUPS = 2
"""Warpgroups of a program for the gradients of keys, each with 64 keys."""


def _products(interpret: bool, *pairs: tuple[tuple[int, ...], list[tuple[Any, Any]]]) -> list[jax.Array]:
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


def _add_products(
    interpret: bool, accs: list[jax.Array], pairs: list[tuple[int, Any, Any]]
) -> list[jax.Array]:
    """Adds a @ b to accumulator i, for each (i, a, b), in place."""
    if interpret:
        accs = list(accs)
        for i, a, b in pairs:
            accs[i] = accs[i] + _products(True, (accs[i].shape, [(a, b)]))[0]
        return accs

    def run(refs: Any) -> None:
        for i, a, b in pairs:
            plgpu.wgmma(refs[i], a, b)

    return list(pl.run_state(run)(tuple(plgpu.ACC.init(acc) for acc in accs)))


def _zeros(*shape: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), MATRIX)


def _spread(x: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, (axis,))


class Inputs:
    """What all three kernels read, and which of it a program's head has."""

    def __init__(self, refs: list[Any], shape: Shape, gradients: bool):
        take = lambda n: [refs.pop(0) for _ in range(n)]
        parts = len(shape.widths)
        (start_ref,) = take(1)  # int32 [1]: position of the first query
        self.q_refs = take(parts)  # [M, B, T, heads of the part, W]
        self.k_refs = take(parts)  # [B, S, heads of the part, W]
        self.v_ref = None if shape.latent else take(1)[0]  # [B, S, L, V]
        # Gradient of the output [M, B, T, L, V], log-sum-exp to the base of 2, and sums of gradient times output
        # times scale, [M, B, L, T]
        more: list[Any] = take(3) if gradients else [None] * 3
        self.do_ref, self.lse_ref, self.delta_ref = more
        self.head, self.b = lax.axis_index("head"), lax.axis_index("batch")
        self.start, self.shape = start_ref[0], shape

    def rows(self, r: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Query head and first token of tile r: the heads' tiles of the same tokens follow each other."""
        m = self.shape.heads_per_kv
        return lax.rem(r, m), lax.div(r, m) * ROWS

    def queries(self, r: jax.Array) -> list[Any]:
        """The parts of tile r's queries."""
        m, t = self.rows(r)
        heads = [lax.rem(self.head, n) for n in self.shape.q_heads]
        return [q.at[m, self.b, pl.ds(t, ROWS), n] for q, n in zip(self.q_refs, heads, strict=True)]

    def keys(self, first: jax.Array, n: int) -> list[Any]:
        """The parts of n keys, and their values where those are not part of the keys."""
        heads = [lax.rem(self.head, n) for n in self.shape.k_heads]
        keys = [k.at[self.b, pl.ds(first, n), h] for k, h in zip(self.k_refs, heads, strict=True)]
        return keys if self.v_ref is None else [*keys, self.v_ref.at[self.b, pl.ds(first, n), self.head]]

    def of_rows(self, ref: Any, r: jax.Array) -> Any:
        """Tile r of an array like the output, or like the log-sum-exp."""
        m, t = self.rows(r)
        if ref.shape[-1] == self.shape.queries and len(ref.shape) == 4:
            return ref.at[m, self.b, self.head, pl.ds(t, ROWS)]
        return ref.at[m, self.b, pl.ds(t, ROWS), self.head]


def _stream(n: jax.Array, stages: int, full: Any, free: Any, copies: Any) -> None:
    """Issues `copies(i, slot)`, each to arrive at `full`, for i below n, each slot when it is free again."""
    plgpu.set_max_registers(40, action="decrease")

    def one(i: jax.Array, _: None) -> None:
        slot = lax.rem(i, stages)
        pl.when(i >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
        for source, target in copies(i, slot):
            plgpu.copy_gmem_to_smem(source, target, full.at[slot])

    lax.fori_loop(0, n, one, None)
    # A barrier must not be left before all its phases were seen.
    drain = lambda i, _: plgpu.barrier_wait(free.at[lax.rem(i, stages)])
    lax.fori_loop(jnp.maximum(n - stages, 0), n, drain, None)


def _row_kernel(
    *refs: Any,
    shape: Shape,
    groups: int,
    block: int,
    stages: int,
    scale: float,
    gradients: bool,
    interpret: bool,
) -> None:
    """The output and its log-sum-exp; with `gradients` those of the queries. A program has `groups` tiles of rows."""
    args = list(refs)
    inputs = Inputs(args, shape, gradients)
    outs = [args.pop(0) for _ in range(len(shape.widths) if gradients else 2)]
    q_smem, do_smem, k_smem, v_smem, o_smem, p_smem, full, free, q_full = args
    v_smem = k_smem[0] if shape.latent else v_smem
    o_smem = q_smem[0] if o_smem is None else o_smem

    wg = lax.axis_index("wg")
    tile = lax.axis_size("tile") - 1 - lax.axis_index("tile")  # long ones first
    last_token = inputs.rows(tile * groups + (groups - 1))[1] + (ROWS - 1)
    seen = jnp.minimum(inputs.start + last_token + 1, shape.keys)
    n_blocks = lax.div(seen + (block - 1), block)

    @pl.when(wg == groups)
    def _copy() -> None:
        values = [] if shape.latent else [v_smem]

        def copies(j: jax.Array, slot: jax.Array) -> Any:
            return zip(inputs.keys(j * block, block), [x.at[slot] for x in (*k_smem, *values)], strict=True)

        _stream(n_blocks, stages, full, free, copies)

    def compute(me: int) -> None:
        plgpu.set_max_registers(min(232, (512 - 40) // groups // 8 * 8), action="increase")
        r = tile * groups + me
        t0 = inputs.rows(r)[1] + inputs.start
        for source, smem in zip(inputs.queries(r), q_smem, strict=True):
            plgpu.copy_gmem_to_smem(source, smem.at[me], q_full.at[me])
        lse: Any = None
        delta: Any = None
        if gradients:
            plgpu.copy_gmem_to_smem(inputs.of_rows(inputs.do_ref, r), do_smem.at[me], q_full.at[me])
            lse, delta = (
                plgpu.load(inputs.of_rows(ref, r), layout=ROW, optimized=False)
                for ref in (inputs.lse_ref, inputs.delta_ref)
            )
        plgpu.barrier_wait(q_full.at[me])
        size = (ROWS, block)

        def operand(x: jax.Array) -> Any:
            """For products from registers; the interpreter knows shared memory alone."""
            x = x.astype(jnp.bfloat16)
            if not interpret:
                return x
            p_smem[me][...] = x
            plgpu.commit_smem()
            return p_smem[me]

        def visible(j: jax.Array) -> jax.Array:
            row = plgpu.broadcasted_iota(jnp.int32, size, 0, layout=MATRIX) + t0
            token = plgpu.broadcasted_iota(jnp.int32, size, 1, layout=MATRIX) + j * block
            if shape.keys < shape.tokens:  # the last rows may see all keys, but not what pads them
                row = jnp.minimum(row, shape.keys - 1)
            return token <= row

        def step(j: jax.Array, carry: Any, masked: bool) -> Any:
            slot = lax.rem(j, stages)
            plgpu.barrier_wait(full.at[slot])
            turned = lambda x: x.at[slot].transpose((1, 0))
            scores = size, [(q.at[me], turned(k)) for q, k in zip(q_smem, k_smem, strict=True)]
            if gradients:
                s, dp = _products(interpret, scores, (size, [(do_smem.at[me], turned(v_smem))]))
                p = jnp.exp2(s * (scale * LOG2E) - _spread(lse, size, 0))
                p = jnp.where(visible(j), p, 0.0) if masked else p
                ds = operand(p * (dp * scale - _spread(delta, size, 0)))
                carry = _add_products(interpret, carry, [(n, ds, k.at[slot]) for n, k in enumerate(k_smem)])
            else:
                acc, m, norm = carry
                (s,) = _products(interpret, scores)
                s = jnp.where(visible(j), s, -jnp.inf) if masked else s
                m_new = jnp.maximum(m, s.max(axis=1) * (scale * LOG2E))
                alpha = jnp.exp2(m - m_new)
                p = jnp.exp2(s * (scale * LOG2E) - _spread(m_new, size, 0))
                norm = norm * alpha + p.sum(axis=1)
                acc = acc * _spread(alpha, acc.shape, 0)
                (acc,) = _add_products(interpret, [acc], [(0, operand(p), v_smem.at[slot])])
                carry = acc, m_new, norm
            plgpu.barrier_arrive(free.at[slot])
            return carry

        vector = lambda x: plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), ROW)
        carry: Any = [_zeros(ROWS, w) for w in shape.widths]
        if not gradients:
            carry = _zeros(ROWS, shape.v_width), vector(LOWEST), vector(0.0)
        clear = lax.div(jnp.minimum(t0 + 1, shape.keys), block)  # up to here every row sees every token
        carry = lax.fori_loop(0, clear, functools.partial(step, masked=False), carry)
        carry = lax.fori_loop(clear, n_blocks, functools.partial(step, masked=True), carry)

        if gradients:
            results = list(zip(carry, q_smem, outs, strict=True))
        else:
            acc, m, norm = carry
            inputs.of_rows(outs[1], r)[...] = (m + jnp.log2(norm)) * (1 / LOG2E)
            results = [(acc * _spread(1.0 / norm, acc.shape, 0), o_smem, outs[0])]
        for x, smem, _ in results:
            smem[me] = x.astype(jnp.bfloat16)
        plgpu.commit_smem()
        for _, smem, ref in results:
            plgpu.copy_smem_to_gmem(smem.at[me], inputs.of_rows(ref, r))
        plgpu.wait_smem_to_gmem(0)

    for me in range(groups):
        pl.when(wg == me)(functools.partial(compute, me))


def _key_kernel(*refs: Any, shape: Shape, config: Config, scale: float, interpret: bool) -> None:
    """Gradients of keys and values. A program has 64 keys for each warpgroup, and a share of the rows that see them."""
    args = list(refs)
    inputs = Inputs(args, shape, gradients=True)
    parts, stages = len(shape.widths), config.dk_stages
    dk_refs = [
        args.pop(0) for _ in range(parts + (not shape.latent))
    ]  # [shares, B, S, L, W], and of the values
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, p_smem, full, free, k_full = args
    v_smem = k_smem[0] if shape.latent else v_smem

    block, share, wg = (lax.axis_index(name) for name in ("block", "share", "wg"))
    first_token = block * (ROWS * KEY_GROUPS)
    n_tiles = shape.queries // ROWS * shape.heads_per_kv
    # The first tile with a token that sees the first key, and with only tokens that see the last.
    first = lax.div(jnp.maximum(first_token - inputs.start, 0), ROWS) * shape.heads_per_kv
    whole = first_token + (ROWS * KEY_GROUPS - 1) - inputs.start
    whole = lax.div(jnp.maximum(whole, 0) + (ROWS - 1), ROWS) * shape.heads_per_kv
    first = jnp.minimum(first, n_tiles)
    per = lax.div(n_tiles - first + (config.dk_shares - 1), config.dk_shares)
    low = jnp.minimum(first + share * per, n_tiles)
    high = jnp.minimum(low + per, n_tiles)
    clear = jnp.clip(whole, low, high)

    @pl.when(wg == KEY_GROUPS)
    def _copy() -> None:
        def copies(i: jax.Array, slot: jax.Array) -> Any:
            r = low + i
            vectors = ((inputs.do_ref, do_smem), (inputs.lse_ref, lse_smem), (inputs.delta_ref, delta_smem))
            yield from zip(inputs.queries(r), [smem.at[slot] for smem in q_smem], strict=True)
            yield from ((inputs.of_rows(ref, r), smem.at[slot]) for ref, smem in vectors)

        _stream(high - low, stages, full, free, copies)

    def compute(me: int) -> None:
        plgpu.set_max_registers(232, action="increase")
        token0 = first_token + me * ROWS
        values = [] if shape.latent else [v_smem]
        for source, smem in zip(inputs.keys(token0, ROWS), (*k_smem, *values), strict=True):
            plgpu.copy_gmem_to_smem(source, smem.at[me], k_full.at[me])
        plgpu.barrier_wait(k_full.at[me])
        size = (ROWS, ROWS)

        def step(i: jax.Array, dk: list[jax.Array], masked: bool) -> list[jax.Array]:
            slot = lax.rem(i - low, stages)
            plgpu.barrier_wait(full.at[slot])
            turned = lambda x: x.at[slot].transpose((1, 0))
            s, dp = _products(
                interpret,
                (size, [(k.at[me], turned(q)) for q, k in zip(q_smem, k_smem, strict=True)]),
                (size, [(v_smem.at[me], turned(do_smem))]),
            )
            lse, delta = (
                plgpu.load(ref.at[slot], layout=_COLUMN, optimized=False) for ref in (lse_smem, delta_smem)
            )
            p = jnp.exp2(s * (scale * LOG2E) - _spread(lse, size, 1))
            if masked:
                token = plgpu.broadcasted_iota(jnp.int32, size, 0, layout=MATRIX) + token0
                row = plgpu.broadcasted_iota(jnp.int32, size, 1, layout=MATRIX) + (
                    inputs.rows(i)[1] + inputs.start
                )
                p = jnp.where(token <= row, p, 0.0)
            ds: Any = (p * (dp * scale - _spread(delta, size, 1))).astype(jnp.bfloat16)
            weights: Any = p.astype(jnp.bfloat16)
            if interpret:
                p_smem[me][0], p_smem[me][1] = weights, ds
                plgpu.commit_smem()
                weights, ds = p_smem[me].at[0], p_smem[me].at[1]
            value = 0 if shape.latent else parts
            pairs = [(value, weights, do_smem.at[slot]), *((n, ds, q.at[slot]) for n, q in enumerate(q_smem))]
            dk = _add_products(interpret, dk, pairs)
            plgpu.barrier_arrive(free.at[slot])
            return dk

        dk = [_zeros(ROWS, w) for w in shape.key_widths]
        dk = lax.fori_loop(low, clear, functools.partial(step, masked=True), dk)
        dk = lax.fori_loop(clear, high, functools.partial(step, masked=False), dk)
        for x, ref in zip(dk, dk_refs, strict=True):
            ref[share, inputs.b, pl.ds(token0, ROWS), inputs.head] = x.astype(ref.dtype)

    for me in range(KEY_GROUPS):
        pl.when(wg == me)(functools.partial(compute, me))


def _bf16(*shape: int) -> Any:
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms(shape[-1]))


def _run_rows(
    arrays: Sequence[jax.Array],
    *,
    shape: Shape,
    groups: int,
    block: int,
    stages: int,
    scale: float,
    gradients: bool,
    interpret: Any,
) -> list[jax.Array]:
    of_rows = lambda heads, w: jax.ShapeDtypeStruct(
        (shape.heads_per_kv, shape.batch, shape.queries, heads, w), jnp.bfloat16
    )
    out_type: list[Any] = [of_rows(shape.heads, w) for w in shape.widths]
    if not gradients:
        lse = (shape.heads_per_kv, shape.batch, shape.heads, shape.queries)
        out_type = [of_rows(shape.heads, shape.v_width), jax.ShapeDtypeStruct(lse, jnp.float32)]
    tiles = shape.queries // ROWS * shape.heads_per_kv
    assert tiles % groups == 0
    staged = not gradients and shape.v_width != shape.widths[0]
    return plgpu.kernel(
        functools.partial(
            _row_kernel,
            shape=shape,
            groups=groups,
            block=block,
            stages=stages,
            scale=scale,
            gradients=gradients,
            interpret=interpret is not None,
        ),
        out_type=out_type,
        scratch_types=[
            [_bf16(groups, ROWS, w) for w in shape.widths],
            _bf16(groups, ROWS, shape.v_width) if gradients else None,
            [_bf16(stages, block, w) for w in shape.widths],
            None if shape.latent else _bf16(stages, block, shape.v_width),
            _bf16(groups, ROWS, shape.v_width) if staged else None,
            None if interpret is None else [_bf16(ROWS, block)] * groups,
            plgpu.Barrier(num_arrivals=len(shape.key_widths), num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=len(shape.widths) + gradients, num_barriers=groups),
        ],
        grid=(tiles // groups, shape.heads, shape.batch),
        grid_names=("tile", "head", "batch"),
        num_threads=groups + 1,
        thread_name="wg",
        compiler_params=PARAMS,
        interpret=interpret,
        kernel_name="attention_dq" if gradients else "attention",
    )(*arrays)


@functools.partial(
    jax.jit, static_argnames=("shape", "config", "scale", "interpret")
)  # compiled once for all layers
def attend(
    start: jax.Array,
    qs: Sequence[jax.Array],
    ks: Sequence[jax.Array],
    v: jax.Array | None,
    *,
    shape: Shape,
    config: Config,
    scale: float,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Output [M, B, T, L, V] and log-sum-exp of the scaled scores [M, B, L, T].

    Args:
      start: position of the first query, int32 [1].
      qs: parts of the queries [M, B, T, heads of the part, W].
      ks: parts of the keys [B, S, heads of the part, W].
      v: values [B, S, L, V], or None: the first part of the keys.
      shape: sizes.
      config: how the work is cut.
      scale: of the scores.
      interpret: runs on the CPU.
    """
    out, lse = _run_rows(
        [start, *qs, *ks, *([] if v is None else [v])],
        shape=shape,
        groups=config.row_groups,
        block=config.block,
        stages=config.stages,
        scale=scale,
        gradients=False,
        interpret=interpret,
    )
    return out, lse


@functools.partial(jax.jit, static_argnames=("shape", "config", "scale", "interpret"))
def gradients(
    start: jax.Array,
    qs: Sequence[jax.Array],
    ks: Sequence[jax.Array],
    v: jax.Array | None,
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

    The last of the keys' is the values' [B, S, L, V]; where `v` is None, it is in that of the first part.

    Args:
      start: see `attend`.
      qs: see `attend`.
      ks: see `attend`.
      v: see `attend`.
      out: as `attend` gave it.
      lse: as `attend` gave it.
      d_out: gradient of the output, like it.
      shape: sizes.
      config: how the work is cut.
      scale: of the scores.
      interpret: runs on the CPU.
    """
    delta = scale * jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1).swapaxes(2, 3)
    arrays = [start, *qs, *ks, *([] if v is None else [v]), d_out, lse * LOG2E, delta]
    dq = _run_rows(
        arrays,
        shape=shape,
        groups=2,
        block=config.dq_block,
        stages=config.dq_stages,
        scale=scale,
        gradients=True,
        interpret=interpret,
    )
    stages, shares = config.dk_stages, config.dk_shares
    dtype = jnp.float32 if shares > 1 else jnp.bfloat16
    vector = plgpu.SMEM((stages, ROWS), jnp.float32)
    dk = plgpu.kernel(
        functools.partial(
            _key_kernel, shape=shape, config=config, scale=scale, interpret=interpret is not None
        ),
        out_type=[
            jax.ShapeDtypeStruct((shares, shape.batch, shape.tokens, shape.heads, w), dtype)
            for w in shape.key_widths
        ],
        scratch_types=[
            [_bf16(KEY_GROUPS, ROWS, w) for w in shape.widths],
            None if shape.latent else _bf16(KEY_GROUPS, ROWS, shape.v_width),
            [_bf16(stages, ROWS, w) for w in shape.widths],
            _bf16(stages, ROWS, shape.v_width),
            vector,
            vector,
            None if interpret is None else [_bf16(2, ROWS, ROWS)] * KEY_GROUPS,
            plgpu.Barrier(num_arrivals=len(qs) + 3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=KEY_GROUPS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=len(shape.key_widths), num_barriers=KEY_GROUPS),
        ],
        # The first keys are seen by most rows: they come first.
        grid=(shape.batch, shape.heads, shares, shape.tokens // (ROWS * KEY_GROUPS)),
        grid_names=("batch", "head", "share", "block"),
        num_threads=KEY_GROUPS + 1,
        thread_name="wg",
        compiler_params=PARAMS,
        interpret=interpret,
        kernel_name="attention_dk",
    )(*arrays)
    return dq, [x[0] if shares == 1 else x.sum(axis=0).astype(jnp.bfloat16) for x in dk]
