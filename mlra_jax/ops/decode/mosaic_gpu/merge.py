"""The kernel that merges the partial results of a decode call by their log-sum-exps, in a fixed order."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mlra_jax.ops.decode.mosaic_gpu.schedule import Schedule, limit
from mlra_jax.ops.decode.shape import Shape
from mlra_jax.ops.hopper import LOG2E, LOWEST, PARAMS, Static, plgpu, run_kernel

MANY_ROWS = 8 * 132
"""More rows than an H100's processors hold programs of the merge at a time."""


@dataclasses.dataclass(frozen=True)
class MergePlan:
    """How partial results are merged.

    Attributes:
      warpgroups: of a program; they take equal shares of a row's partial results.
      at_once: partial results of a row that a warpgroup has in flight.
      rows: rows of a program, whose loads are in flight together; one if there are several warpgroups.
    """

    warpgroups: int
    at_once: int
    rows: int

    @classmethod
    def of(cls, shape: Shape, rows: int, n_splits: int) -> MergePlan:
        """Enough programs to fill the GPU, and all loads for a row of an even batch in flight together."""
        parts = n_splits if shape.batch == 1 else n_splits // shape.batch + 2
        warpgroups = min(4, -(-parts // 33))
        at_once = min(33, -(-parts // warpgroups))
        several = 4 if at_once <= 8 and rows * shape.heads * shape.batch > MANY_ROWS else 1
        return cls(warpgroups, at_once, several)


class Inputs(NamedTuple):
    """What the kernel reads."""

    longest: Any  # int32 [B]: tokens that the longest query of a sequence sees
    table: Any  # see `make_table`; None: there is one sequence
    out: Any  # float32 [partial results, L, rows, V]
    lse: Any  # float32 [partial results, L, rows]


class Outputs(NamedTuple):
    """What the kernel writes."""

    out: Any  # [B, G, rows, J, V]
    lse: Any  # float32 [B, L, rows]


class Scratch(NamedTuple):
    """What the warpgroups of a program share."""

    acc: Any  # float32 [warpgroups, V]
    stat: Any  # float32 [2, warpgroups]: maximum and sum
    done: Any  # all have written theirs


def _kernel(inputs: Inputs, outputs: Outputs, scratch: Scratch, *, static: Static, plan: MergePlan) -> None:
    """Merges the partial results of some rows."""
    program, head, b, wg = (lax.axis_index(name) for name in ("rows", "head", "batch", "wg"))
    shape = static.shape
    schedule = Schedule(limit(inputs.longest, shape), inputs.table, static.config)
    first, end = schedule.results(b, shape.batch)
    share = lax.div(end - first + (plan.warpgroups - 1), plan.warpgroups)
    start = jnp.minimum(first + wg * share, end)
    stop = jnp.minimum(start + share, end)
    width = inputs.out.shape[-1]
    groups = shape.heads // shape.branches
    strided = plgpu.Layout.WG_STRIDED((width,), width // 128)
    spread = lambda x: plgpu.layout_cast(jnp.full((width,), x, jnp.float32), strided)

    rows = [program * plan.rows + k for k in range(plan.rows)]

    def add(n: jax.Array, carry: Any) -> Any:
        indices = [start + n * plan.at_once + k for k in range(plan.at_once)]
        valid = [jnp.minimum(i, end - 1) for i in indices]
        loaded = [
            (
                [plgpu.load(inputs.out.at[i, head, r], layout=strided) for i in valid],
                [inputs.lse[i, head, r] for i in valid],
            )
            for r in rows
        ]
        added = []
        for (acc, top, total), (parts, lses) in zip(carry, loaded, strict=True):
            lses = [jnp.where(i < stop, lse, -jnp.inf) for i, lse in zip(indices, lses, strict=True)]
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
        group, branch = lax.rem(head, groups), lax.div(head, groups)
        outputs.out[b, group, r, branch, :] = out.astype(outputs.out.dtype)
        outputs.lse[b, head, r] = jnp.where(total > 0, top + jnp.log2(total) * (1 / LOG2E), -jnp.inf)

    if plan.warpgroups == 1:
        for r, row in zip(rows, merged, strict=True):
            finish(r, *row)
        return
    [(acc, top, total)] = merged
    scratch.acc[wg, :] = acc
    scratch.stat[0, wg] = top
    scratch.stat[1, wg] = total
    plgpu.barrier_arrive(scratch.done)
    plgpu.barrier_wait(scratch.done)

    @pl.when(wg == 0)
    def _() -> None:
        tops = [scratch.stat[0, k] for k in range(plan.warpgroups)]
        top = functools.reduce(jnp.maximum, tops)
        scales = [jnp.exp2((t - top) * LOG2E) for t in tops]
        total = functools.reduce(jnp.add, [scratch.stat[1, k] * s for k, s in enumerate(scales)])
        accs = [plgpu.load(scratch.acc.at[k], layout=strided) * spread(s) for k, s in enumerate(scales)]
        finish(rows[0], functools.reduce(jnp.add, accs), top, total)


def merge(
    static: Static, rows: int, longest: jax.Array, table: jax.Array | None, out: jax.Array, lse: jax.Array
) -> Outputs:
    """Merges what the shares have left.

    Args:
      static: what the shares were compiled for.
      rows: of a head, to merge.
      longest: tokens of each sequence that its longest query sees, int32 [B].
      table: see `make_table`; None: there is one sequence.
      out: float32 [partial results, L, rows or more, V].
      lse: float32 [partial results, L, rows or more].
    """
    shape, plan = static.shape, MergePlan.of(static.shape, rows, static.config.n_splits)
    width, groups = out.shape[-1], shape.heads // shape.branches
    return run_kernel(
        functools.partial(_kernel, static=static, plan=plan),
        Inputs(longest, table, out, lse),
        Outputs(
            out=jax.ShapeDtypeStruct((shape.batch, groups, rows, shape.branches, width), jnp.bfloat16),
            lse=jax.ShapeDtypeStruct((shape.batch, shape.heads, rows), jnp.float32),
        ),
        Scratch(
            acc=plgpu.SMEM((plan.warpgroups, width), jnp.float32),
            stat=plgpu.SMEM((2, plan.warpgroups), jnp.float32),
            done=plgpu.Barrier(num_arrivals=plan.warpgroups),
        ),
        grid=(rows // plan.rows, shape.heads, shape.batch),
        grid_names=("rows", "head", "batch"),
        num_threads=plan.warpgroups,
        compiler_params=PARAMS,
        interpret=static.interpret,
        kernel_name="merge_attention",
    )
