"""What our kernels for Hopper GPUs share: the device, its sizes, layouts, and the ring through which blocks stream."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Generic

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from mlra_jax.execution.accelerators import find_accelerator
from mlra_jax.ops import device
from mlra_jax.ops.back_end import C, Kernel, S

plgpu: Any = mosaic_gpu  # typed differently in each version of JAX
THREADS = 128
"""Of a warpgroup."""
ROWS = 64
"""Of a warpgroup's matrix products."""
SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory that one program may hold."""
LOG2E = math.log2(math.e)
LOWEST = -1e30
"""Where running maxima start: finite, so that the difference of two is never NaN."""
PRODUCER_REGISTERS = 40
"""Of a thread of the warpgroup that only issues copies."""
MAX_REGISTERS = 232
"""Of a thread of a warpgroup that computes; more would not help."""

# Reductions along rows, inside a warp: they need next to none of the scratch memory set aside for others.
PARAMS = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024)
MATRIX = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)


class HopperKernel(Kernel[S, C]):
    """A kernel in Pallas Mosaic GPU."""

    name: ClassVar[str] = "mosaic_gpu"

    def target(self) -> int:
        """Streaming multiprocessors of the GPU that is compiled for; an H100's where a kernel is interpreted.

        Raises:
          NotImplementedError: Mosaic GPU kernels do not run there.
        """
        processors = 132 if self.interpret is not None else device.require_hopper().processors
        if jax.__version_info__ < (0, 11):
            raise NotImplementedError(
                f"the Mosaic GPU kernel needs JAX 0.11 or later, which needs Python 3.12; this is {jax.__version__}."
            )
        return processors


@dataclasses.dataclass(frozen=True)
class Static(Generic[S, C]):
    """What an attention kernel is compiled for."""

    shape: S
    config: C
    scale: float
    interpret: Any


def find_processors(kind: str) -> int | None:
    """Streaming multiprocessors of the Hopper GPU that a JAX device kind names; None: it is none."""
    chip = find_accelerator(kind)
    return chip.processors if chip is not None and chip.capability == 90 else None


def require_bfloat16(arrays: Iterable[Any], kernel: str = "the Mosaic GPU kernel takes") -> None:
    """Declines arrays of other types.

    Raises:
      NotImplementedError: one is not bfloat16.
    """
    if others := {str(x.dtype) for x in arrays if x.dtype != jnp.bfloat16}:
        raise NotImplementedError(f"{kernel} bfloat16; got {', '.join(sorted(others))}.")


def transforms(width: int) -> tuple[Any, ...]:
    """How the tensor cores want a bfloat16 array of so many columns to lie in shared memory."""
    swizzle = min(64, width)
    return plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(2 * swizzle)


def matrix_smem(*shape: int) -> Any:
    """Shared memory for a bfloat16 array that tensor cores multiply."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms(shape[-1]))


def spread(x: jax.Array, shape: tuple[int, ...], axis: int = 0) -> jax.Array:
    """A vector along `axis` of a matrix, repeated along the other."""
    return lax.broadcast_in_dim(x, shape, (axis,))


def row_vector(value: float) -> jax.Array:
    """The same float32 for each row of a product."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), ROW)


def zeros(*shape: int) -> jax.Array:
    """A float32 accumulator."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), MATRIX)


def consumer_registers(warpgroups: int, producers: int = 1) -> int:
    """Registers of a thread of each computing warpgroup: of 512 that one lane of all warpgroups has together."""
    return min(MAX_REGISTERS, (512 - producers * PRODUCER_REGISTERS) // warpgroups // 8 * 8)


def run_roles(
    producer: Callable[[], None], consumer: Callable[[int], None], consumers: int, first: int = 0
) -> None:
    """Gives warpgroups from number `first` on their roles: number i runs `consumer(i)`, and the last one `producer`."""
    wg = lax.axis_index("wg")
    pl.when(wg == first + consumers)(producer)
    for me in range(consumers):
        pl.when(wg == first + me)(functools.partial(consumer, me))


def wait_until_free(n: jax.Array, stages: int, free: Any) -> jax.Array:
    """The stage of a ring that its n-th block goes to, once what it held has been used."""
    stage = lax.rem(n, stages)
    pl.when(n >= stages)(lambda: plgpu.barrier_wait(free.at[stage]))
    return stage


def drain(n: jax.Array, stages: int, free: Any) -> None:
    """Waits until the last of n blocks are used: a barrier must not be left before all its phases were seen."""
    wait = lambda i, _: plgpu.barrier_wait(free.at[lax.rem(i, stages)])
    lax.fori_loop(jnp.maximum(n - stages, 0), n, wait, None)


def stream(n: jax.Array, stages: int, full: Any, free: Any, copies: Callable[..., Any]) -> None:
    """The producer of a ring: issues the copies of n blocks, each to a stage when that is free.

    Args:
      n: number of blocks.
      stages: of the ring.
      full: barriers at which copies arrive, one for each stage.
      free: barriers at which consumers arrive when they have used a block.
      copies: gives the (source, target) pairs of block i in a stage.
    """

    def one(i: jax.Array, _: None) -> None:
        stage = wait_until_free(i, stages, free)
        for source, target in copies(i, stage):
            plgpu.copy_gmem_to_smem(source, target, full.at[stage])

    lax.fori_loop(0, n, one, None)
    drain(n, stages, free)


def run_kernel(
    body: Callable[..., None], inputs: Any, out_type: Any, scratch: tuple[Any, ...], **options: Any
) -> Any:
    """Runs a Mosaic GPU kernel whose body takes its references by name.

    Args:
      body: called with references in the structure of `inputs`, of `out_type` and of `scratch`.
      inputs: a named tuple of arrays, or tuples of arrays, or None for what there is not.
      out_type: a named tuple of `jax.ShapeDtypeStruct`s.
      scratch: a named tuple of types of scratch memory.
      **options: of `plgpu.kernel`.

    Returns:
      Arrays in the structure of `out_type`.
    """
    arrays, in_tree = jax.tree.flatten(inputs)
    types, out_tree = jax.tree.flatten(out_type)
    n, m = len(arrays), len(types)

    def by_position(*refs: Any) -> None:
        body(
            jax.tree.unflatten(in_tree, refs[:n]),
            jax.tree.unflatten(out_tree, refs[n : n + m]),
            type(scratch)(*refs[n + m :]),
        )

    kernel = plgpu.kernel(by_position, out_type=types, scratch_types=scratch, thread_name="wg", **options)
    return jax.tree.unflatten(out_tree, kernel(*arrays))
