"""Skinny GEMM for Hopper GPUs, in Pallas Mosaic GPU: few rows times a large matrix, which is read once.

A program makes some columns of the result. One warpgroup, the producer, issues the copies of blocks of the matrix, and
of the matching part of the rows, into a ring in shared memory; the other, the consumer, multiplies. The tensor cores'
product always has 64 rows, used or not; its columns are a program's columns of the result, in any multiple of 8: so all
processors get the same share of almost any matrix. Many rows take more of the L2 cache's bandwidth than the matrix:
then K is split as well, and the shares are summed afterwards, in a fixed order.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mlra_jax.ops.hopper import ROWS, matrix_smem, plgpu, run_kernel, stream
from mlra_jax.ops.skinny_gemm.mosaic_gpu.config import UNIT, Config, Shape


class Inputs(NamedTuple):
    """What the kernel reads."""

    x: Any  # bfloat16 [rows, K]
    w: Any  # bfloat16 [1 or 2, F, K]


class Outputs(NamedTuple):
    """What the kernel writes."""

    out: Any  # [splits, rows, F]


class Scratch(NamedTuple):
    """Shared memory and barriers of a program."""

    x: Any  # [stages * rows + what is missing to 64, block]
    w: Any  # [1 or 2, stages, tile, block]
    out: Any  # [64, tile]
    full: Any  # of each stage: its block has arrived
    free: Any  # of each stage: its block has been used


class Program:
    """What both warpgroups of a program know: its references, columns and share of K."""

    def __init__(
        self, inputs: Inputs, outputs: Outputs, scratch: Scratch, *, shape: Shape, config: Config, pitch: int
    ):
        self.inputs, self.outputs, self.scratch = inputs, outputs, scratch
        self.shape, self.config, self.pitch = shape, config, pitch
        self.program, self.split = lax.axis_index("program"), lax.axis_index("split")
        blocks = shape.depth // config.block
        self.first = lax.div(self.split * blocks, config.splits)
        self.steps = lax.div((self.split + 1) * blocks, config.splits) - self.first

    def columns(self, t: jax.Array) -> Any:
        """The columns of tile t. The last tiles overlap, so that all are whole: the overlap is computed twice."""
        tile = self.config.tile
        first = (self.program * self.config.tiles + t) * tile
        return pl.ds(jnp.minimum(first, self.shape.features - tile), tile)

    def produce(self) -> None:
        """The producer: streams blocks of the matrix and of the rows."""
        scratch = self.scratch

        def copies(n: jax.Array, stage: jax.Array) -> Any:
            t = lax.div(n, self.steps)
            block = pl.ds((self.first + n - t * self.steps) * self.config.block, self.config.block)
            for g in range(self.shape.matrices):
                yield self.inputs.w.at[g, self.columns(t), block], scratch.w.at[g, stage]
            yield self.inputs.x.at[:, block], scratch.x.at[pl.ds(stage * self.pitch, self.shape.rows)]

        stream(self.config.tiles * self.steps, self.config.stages, scratch.full, scratch.free, copies)

    def consume(self) -> None:
        """The consumer: multiplies, tile after tile."""
        lax.fori_loop(0, self.config.tiles, lambda t, _: self.write(t, self.multiply(t)), None)

    def multiply(self, t: jax.Array) -> jax.Array:
        """The columns of tile t."""
        scratch, stages = self.scratch, self.config.stages

        def sums(*accs: Any) -> list[jax.Array]:
            def step(k: jax.Array, _: None) -> None:
                n = t * self.steps + k
                stage = lax.rem(n, stages)
                plgpu.barrier_wait(scratch.full.at[stage])
                # Fewer rows than 64 are followed by others, or by anything: of no use, and of no effect on them.
                x = scratch.x.at[pl.ds(stage * self.pitch, ROWS)]
                for g, acc in enumerate(accs):
                    plgpu.wgmma(acc, x, scratch.w.at[g, stage].transpose((1, 0)))
                plgpu.wgmma_wait(len(accs))  # for the block before
                pl.when(k > 0)(lambda: plgpu.barrier_arrive(scratch.free.at[lax.rem(n - 1, stages)]))

            lax.fori_loop(0, self.steps, step, None)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(scratch.free.at[lax.rem((t + 1) * self.steps - 1, stages)])
            return [acc[...] for acc in accs]

        acc = plgpu.ACC((ROWS, self.config.tile), jnp.float32)
        y, *up = pl.run_scoped(sums, *[acc] * self.shape.matrices)
        return y / (1 + jnp.exp(-y)) * up[0] if up else y

    def write(self, t: jax.Array, y: jax.Array) -> None:
        """The epilogue: writes the columns of tile t."""
        scratch, out = self.scratch, self.outputs.out
        scratch.out[...] = y.astype(out.dtype)
        plgpu.commit_smem()
        target = out.at[self.split, :, self.columns(t)]
        plgpu.copy_smem_to_gmem(scratch.out.at[pl.ds(0, self.shape.rows)], target)
        plgpu.wait_smem_to_gmem(0)


def _kernel(*refs: Any, **options: Any) -> None:
    program, wg = Program(*refs, **options), lax.axis_index("wg")
    pl.when(wg == 1)(program.produce)
    pl.when(wg == 0)(program.consume)


@functools.partial(
    jax.jit, static_argnames=("shape", "config", "dtype", "interpret")
)  # compiled once for all layers
def multiply(
    x: jax.Array, w: jax.Array, *, shape: Shape, config: Config, dtype: jnp.dtype, interpret: Any
) -> jax.Array:
    """[rows, F] of x [rows, K] and w [1 or 2, F, K]."""
    rows = len(x)
    x = jnp.pad(x, ((0, -rows % UNIT), (0, 0)))
    # The interpreter would see a race between a block's rows and what is copied behind them.
    pitch = ROWS if interpret is not None else shape.rows
    part = jnp.dtype(jnp.float32) if config.splits > 1 else dtype
    (parts,) = run_kernel(
        functools.partial(_kernel, shape=shape, config=config, pitch=pitch),
        Inputs(x, w),
        Outputs(jax.ShapeDtypeStruct((config.splits, shape.rows, shape.features), part)),
        Scratch(
            x=matrix_smem(config.stages * pitch + ROWS - pitch, config.block),
            w=matrix_smem(shape.matrices, config.stages, config.tile, config.block),
            out=plgpu.SMEM((ROWS, config.tile), part),
            full=plgpu.Barrier(num_arrivals=shape.matrices + 1, num_barriers=config.stages),
            free=plgpu.Barrier(num_arrivals=1, num_barriers=config.stages),
        ),
        grid=(config.programs(shape), config.splits),
        grid_names=("program", "split"),
        num_threads=2,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="swiglu" if shape.gated else "skinny_gemm",
    )
    return (parts.sum(axis=0) if config.splits > 1 else parts[0])[:rows].astype(dtype)
