"""Gradients of causal attention for Hopper GPUs, in Pallas Mosaic GPU: one kernel for the queries, one for the keys.

Rows of a head are its query heads for each token in turn, M a token, so that a tile of rows ends at nearly one token
and little is computed only to be masked. Each kernel makes the weights again from the log-sum-exp; neither adds to
memory that others write, so gradients are the same from run to run. The forward pass is the decode kernel
(`mlra_jax.ops.decode.mosaic_gpu_kernel`), which has the same rows.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mlra_jax.ops.attention.mosaic_gpu import Config, Shape
from mlra_jax.ops.decode.mosaic_gpu_kernel import _MATRIX, _PARAMS, _ROW, LOG2E, _transforms, plgpu

ROWS = 64
"""Rows of a warpgroup's products."""
_COLUMN = plgpu.Layout.WGMMA.reduce(0)


GROUPS = 2
"""Warpgroups of a program that compute, each with 64 rows of queries or 64 keys of its own."""


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
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), _MATRIX)


def _spread(x: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, (axis,))


def _dq_kernel(*refs: Any, shape: Shape, config: Config, scale: float, interpret: bool) -> None:
    args = list(refs)
    take = lambda n: [args.pop(0) for _ in range(n)]
    parts, block, stages = len(shape.widths), config.dq_block, config.dq_stages
    (start_ref,) = take(1)  # int32 [1]: position of the first query
    q_refs, k_refs = take(parts), take(parts)  # [B, heads of the part, rows, W], [B, heads of the part, S, W]
    v_ref = None if shape.latent else take(1)[0]  # [B, L, S, V]
    do_ref, lse_ref, delta_ref = take(
        3
    )  # [B, L, rows, V], [B, L, rows] to the base of 2, [B, L, rows] times scale
    dq_refs = take(parts)  # [B, L, rows, W]
    q_smem, do_smem, k_smem, v_smem, p_smem, full, free, q_full = args
    v_smem = k_smem[0] if shape.latent else v_smem

    i, head, b, wg = (lax.axis_index(name) for name in ("tile", "head", "batch", "wg"))
    tile = shape.rows // (ROWS * GROUPS) - 1 - i  # long ones first
    m, start = shape.rows_per_token, start_ref[0]
    seen = lambda row: start + lax.div(row, m) + 1  # tokens
    first_row = tile * (ROWS * GROUPS)
    most = jnp.minimum(seen(first_row + (ROWS * GROUPS - 1)), shape.tokens)
    n_blocks = lax.div(most + (block - 1), block)

    @pl.when(wg == GROUPS)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def one(j: jax.Array, _: None) -> None:
            slot = lax.rem(j, stages)
            pl.when(j >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            tokens = pl.ds(j * block, block)
            for k_ref, smem, heads in zip(k_refs, k_smem, shape.k_heads, strict=True):
                source = k_ref.at[b, lax.rem(head, heads), tokens]
                plgpu.copy_gmem_to_smem(source, smem.at[slot], full.at[slot])
            if v_ref is not None:
                plgpu.copy_gmem_to_smem(v_ref.at[b, head, tokens], v_smem.at[slot], full.at[slot])

        lax.fori_loop(0, n_blocks, one, None)
        drain = lambda j, _: plgpu.barrier_wait(free.at[lax.rem(j, stages)])
        lax.fori_loop(jnp.maximum(n_blocks - stages, 0), n_blocks, drain, None)

    def compute(me: int) -> None:
        plgpu.set_max_registers(232, action="increase")
        row0 = first_row + me * ROWS
        rows = pl.ds(row0, ROWS)
        for q_ref, smem, heads in zip(q_refs, q_smem, shape.q_heads, strict=True):
            plgpu.copy_gmem_to_smem(q_ref.at[b, lax.rem(head, heads), rows], smem.at[me], q_full.at[me])
        plgpu.copy_gmem_to_smem(do_ref.at[b, head, rows], do_smem.at[me], q_full.at[me])
        lse, delta = (
            plgpu.load(ref.at[b, head, rows], layout=_ROW, optimized=False) for ref in (lse_ref, delta_ref)
        )
        plgpu.barrier_wait(q_full.at[me])

        def step(j: jax.Array, dq: list[jax.Array], masked: bool) -> list[jax.Array]:
            slot = lax.rem(j, stages)
            plgpu.barrier_wait(full.at[slot])
            size = (ROWS, block)
            turned = lambda x: x.at[slot].transpose((1, 0))
            s, dp = _products(
                interpret,
                (size, [(q.at[me], turned(k)) for q, k in zip(q_smem, k_smem, strict=True)]),
                (size, [(do_smem.at[me], turned(v_smem))]),
            )
            p = jnp.exp2(s * (scale * LOG2E) - _spread(lse, size, 0))
            if masked:
                row = plgpu.broadcasted_iota(jnp.int32, size, 0, layout=_MATRIX) + row0
                token = plgpu.broadcasted_iota(jnp.int32, size, 1, layout=_MATRIX) + (j * block - start)
                p = jnp.where(token * m <= row, p, 0.0)
            ds: Any = (p * (dp * scale - _spread(delta, size, 0))).astype(jnp.bfloat16)
            if interpret:
                p_smem[me][...] = ds
                plgpu.commit_smem()
                ds = p_smem[me]
            dq = _add_products(interpret, dq, [(n, ds, k.at[slot]) for n, k in enumerate(k_smem)])
            plgpu.barrier_arrive(free.at[slot])
            return dq

        clear = jnp.clip(lax.div(seen(row0), block), 0, n_blocks)  # up to here every row sees every token
        dq = [_zeros(ROWS, w) for w in shape.widths]
        dq = lax.fori_loop(0, clear, functools.partial(step, masked=False), dq)
        dq = lax.fori_loop(clear, n_blocks, functools.partial(step, masked=True), dq)
        for x, smem in zip(dq, q_smem, strict=True):
            smem[me] = x.astype(jnp.bfloat16)
        plgpu.commit_smem()
        for smem, dq_ref in zip(q_smem, dq_refs, strict=True):
            plgpu.copy_smem_to_gmem(smem.at[me], dq_ref.at[b, head, rows])
        plgpu.wait_smem_to_gmem(0)

    for me in range(GROUPS):
        pl.when(wg == me)(functools.partial(compute, me))


def _dk_kernel(*refs: Any, shape: Shape, config: Config, scale: float, interpret: bool) -> None:
    args = list(refs)
    take = lambda n: [args.pop(0) for _ in range(n)]
    parts, tile, stages = len(shape.widths), ROWS, config.dk_stages
    (start_ref,) = take(1)  # int32 [1]: position of the first query
    q_refs, k_refs = take(parts), take(parts)  # [B, heads of the part, rows, W], [B, heads of the part, S, W]
    v_ref = None if shape.latent else take(1)[0]  # [B, L, S, V]
    do_ref, lse_ref, delta_ref = take(
        3
    )  # [B, L, rows, V], [B, L, rows] to the base of 2, [B, L, rows] times scale
    dk_refs = take(parts + (not shape.latent))  # [shares, B, L, S, W], and of the values
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, p_smem, full, free, k_full = args
    v_smem = k_smem[0] if shape.latent else v_smem

    block, share, head, b, wg = (lax.axis_index(name) for name in ("block", "share", "head", "batch", "wg"))
    m, start = shape.rows_per_token, start_ref[0]
    first_row = lambda token: jnp.maximum(token - start, 0) * m  # that sees the token
    first_token, last_token = block * (ROWS * GROUPS), (block + 1) * (ROWS * GROUPS) - 1
    n_tiles = shape.rows // tile
    first = jnp.minimum(lax.div(first_row(first_token), tile), n_tiles)
    per = lax.div(n_tiles - first + (config.dk_shares - 1), config.dk_shares)
    low = jnp.minimum(first + share * per, n_tiles)
    high = jnp.minimum(low + per, n_tiles)
    clear = jnp.clip(
        lax.div(first_row(last_token) + (tile - 1), tile), low, high
    )  # from here on nothing is masked

    @pl.when(wg == GROUPS)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def one(n: jax.Array, _: None) -> None:
            slot = lax.rem(n, stages)
            pl.when(n >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            rows = pl.ds((low + n) * tile, tile)
            for q_ref, smem, heads in zip(q_refs, q_smem, shape.q_heads, strict=True):
                source = q_ref.at[b, lax.rem(head, heads), rows]
                plgpu.copy_gmem_to_smem(source, smem.at[slot], full.at[slot])
            for ref, smem in ((do_ref, do_smem), (lse_ref, lse_smem), (delta_ref, delta_smem)):
                plgpu.copy_gmem_to_smem(ref.at[b, head, rows], smem.at[slot], full.at[slot])

        lax.fori_loop(0, high - low, one, None)
        drain = lambda n, _: plgpu.barrier_wait(free.at[lax.rem(n, stages)])
        lax.fori_loop(jnp.maximum(high - low - stages, 0), high - low, drain, None)

    def compute(me: int) -> None:
        plgpu.set_max_registers(232, action="increase")
        token0 = first_token + me * ROWS
        tokens = pl.ds(token0, ROWS)
        for k_ref, smem, heads in zip(k_refs, k_smem, shape.k_heads, strict=True):
            plgpu.copy_gmem_to_smem(k_ref.at[b, lax.rem(head, heads), tokens], smem.at[me], k_full.at[me])
        if v_ref is not None:
            plgpu.copy_gmem_to_smem(v_ref.at[b, head, tokens], v_smem.at[me], k_full.at[me])
        plgpu.barrier_wait(k_full.at[me])

        def step(i: jax.Array, dk: list[jax.Array], masked: bool) -> list[jax.Array]:
            slot = lax.rem(i - low, stages)
            plgpu.barrier_wait(full.at[slot])
            size = (ROWS, tile)
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
                token = plgpu.broadcasted_iota(jnp.int32, size, 0, layout=_MATRIX) + (token0 - start)
                row = plgpu.broadcasted_iota(jnp.int32, size, 1, layout=_MATRIX) + i * tile
                p = jnp.where(token * m <= row, p, 0.0)
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

        dk = [_zeros(ROWS, w) for w in (*shape.widths, *(() if shape.latent else (shape.v_width,)))]
        dk = lax.fori_loop(low, clear, functools.partial(step, masked=True), dk)
        dk = lax.fori_loop(clear, high, functools.partial(step, masked=False), dk)
        for x, ref in zip(dk, dk_refs, strict=True):
            ref[share, b, head, tokens] = x.astype(ref.dtype)

    for me in range(GROUPS):
        pl.when(wg == me)(functools.partial(compute, me))


@functools.partial(
    jax.jit, static_argnames=("shape", "config", "scale", "interpret")
)  # compiled once for all layers
def gradients(
    start: jax.Array,
    qs: tuple[jax.Array, ...],
    ks: tuple[jax.Array, ...],
    v: jax.Array | None,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    *,
    shape: Shape,
    config: Config,
    scale: float,
    interpret: Any,
) -> tuple[list[jax.Array], list[jax.Array], jax.Array | None]:
    """Gradients of queries, keys and values by head.

    Args:
      start: position of the first query, int32 [1].
      qs: parts of the queries [B, heads of the part, rows, W].
      ks: parts of the keys [B, heads of the part, S, W].
      v: values [B, L, S, V], or None: the first part of the keys.
      out: the output [B, L, rows, V].
      lse: log-sum-exp of the scaled scores [B, L, rows].
      d_out: gradient of the output.
      shape: sizes.
      config: how the work is cut.
      scale: of the scores.
      interpret: runs on the CPU.

    Returns:
      For each part the queries' gradient for each head, [B, L, rows, W]; the keys' [B, L, S, W] (what the values add
      is in the first of them if `v` is None); the values'.
    """
    interpreted = interpret is not None
    delta = scale * jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    arrays = [start, *qs, *ks, *([] if v is None else [v]), d_out, lse * LOG2E, delta]
    kernel = functools.partial(plgpu.kernel, thread_name="wg", compiler_params=_PARAMS, interpret=interpret)
    bf16 = lambda *s: plgpu.SMEM(s, jnp.bfloat16, transforms=_transforms(s[-1]))
    keep = functools.partial(
        functools.partial, shape=shape, config=config, scale=scale, interpret=interpreted
    )
    copies = len(qs) + (v is not None)
    of_head = lambda rows, w, *first: jax.ShapeDtypeStruct(
        (*first, shape.batch, shape.heads, rows, w), jnp.bfloat16
    )

    block, stages = config.dq_block, config.dq_stages
    dq = kernel(
        keep(_dq_kernel),
        out_type=[of_head(shape.rows, w) for w in shape.widths],
        scratch_types=[
            [bf16(GROUPS, ROWS, w) for w in shape.widths],
            bf16(GROUPS, ROWS, shape.v_width),
            [bf16(stages, block, w) for w in shape.widths],
            None if v is None else bf16(stages, block, shape.v_width),
            [bf16(ROWS, block)] * GROUPS if interpreted else None,
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=len(qs) + 1, num_barriers=GROUPS),
        ],
        grid=(shape.rows // (ROWS * GROUPS), shape.heads, shape.batch),
        grid_names=("tile", "head", "batch"),
        num_threads=GROUPS + 1,
        kernel_name="attention_dq",
    )(*arrays)

    tile, stages = ROWS, config.dk_stages
    vector = plgpu.SMEM((stages, tile), jnp.float32)
    widths = [*shape.widths, *([] if v is None else [shape.v_width])]
    sums = [of_head(shape.tokens, w, config.dk_shares) for w in widths]
    if config.dk_shares > 1:
        sums = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in sums]
    dk = kernel(
        keep(_dk_kernel),
        out_type=sums,
        scratch_types=[
            [bf16(GROUPS, ROWS, w) for w in shape.widths],
            None if v is None else bf16(GROUPS, ROWS, shape.v_width),
            [bf16(stages, tile, w) for w in shape.widths],
            bf16(stages, tile, shape.v_width),
            vector,
            vector,
            [bf16(2, ROWS, tile)] * GROUPS if interpreted else None,
            plgpu.Barrier(num_arrivals=len(qs) + 3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=copies, num_barriers=GROUPS),
        ],
        grid=(shape.batch, shape.heads, config.dk_shares, shape.tokens // (ROWS * GROUPS)),
        grid_names=("batch", "head", "share", "block"),
        num_threads=GROUPS + 1,
        kernel_name="attention_dk",
    )(*arrays)
    dk = [x[0] if config.dk_shares == 1 else x.sum(axis=0).astype(jnp.bfloat16) for x in dk]
    return dq, dk[: len(ks)], None if v is None else dk[-1]
