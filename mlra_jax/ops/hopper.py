"""What our kernels for Hopper GPUs share: the device, its sizes, and names for layouts of Pallas Mosaic GPU."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu

from mlra_jax.ops.device import current_device, find_chip

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

# Reductions along rows, inside a warp: they need next to none of the scratch memory set aside for others.
PARAMS = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024)
MATRIX = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)


def transforms(width: int) -> tuple[Any, ...]:
    """How the tensor cores want a bfloat16 array of so many columns to lie in shared memory."""
    swizzle = min(64, width)
    return plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(2 * swizzle)


def find_processors(kind: str) -> int | None:
    """Streaming multiprocessors of the Hopper GPU that a JAX device kind names; None: it is none."""
    chip = find_chip(kind)
    return chip.processors if chip is not None and chip.capability == 90 else None


def check_device(interpret: Any) -> tuple[str, int]:
    """Kind and streaming multiprocessors of the GPU that is compiled for; 132 where a kernel is interpreted.

    Raises:
      NotImplementedError: Mosaic GPU kernels do not run there.
    """
    platform, kind = current_device()
    processors = 132 if interpret is not None else find_processors(kind)
    if processors is None or (interpret is None and platform != "gpu"):
        raise NotImplementedError(f"the Mosaic GPU kernel runs on Hopper GPUs; this is a {kind}.")
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(
            f"the Mosaic GPU kernel needs JAX 0.11 or later, which needs Python 3.12; this is {jax.__version__}."
        )
    return kind, processors
