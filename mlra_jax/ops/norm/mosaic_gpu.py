"""The residual sum with its norm on Hopper GPUs: one Pallas Mosaic GPU kernel, for the few rows of a decode step."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu

from mlra_jax.ops.decode.mosaic_gpu import check_device
from mlra_jax.ops.manual import unchecked

plgpu: Any = mosaic_gpu  # typed differently in each version of JAX
THREADS = 128
"""Of a warpgroup."""
MAX_ROWS = 256
"""With more, XLA's own kernels are as fast: they wait for memory, not for each other."""


def _kernel(
    x_ref: Any,  # float32 [rows, D]
    y_ref: Any,  # bfloat16 [rows, D]
    gain_ref: Any,  # [D]
    sum_ref: Any,  # float32 [rows, D]
    h_ref: Any,  # bfloat16 [rows, D]
    *,
    eps: float,
) -> None:
    """A program has a row."""
    row, width = lax.axis_index("row"), gain_ref.shape[0]
    lay_out = plgpu.Layout.WG_STRIDED((width,), vec_size=4)
    read = lambda ref: plgpu.load(ref, layout=lay_out).astype(jnp.float32)
    gain = read(gain_ref)
    x = read(x_ref.at[row]) + read(y_ref.at[row])
    sum_ref[row, :] = x
    h_ref[row, :] = (x * lax.rsqrt(jnp.sum(x * x) / width + eps) * gain).astype(h_ref.dtype)


def add_rms_norm(
    x: jax.Array, y: jax.Array, gain: jax.Array, *, eps: float, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """See `mlra_jax.ops.norm.add_rms_norm`; `interpret`: `plgpu.InterpretGPUParams` run the kernel on the CPU.

    Raises:
      NotImplementedError: this is no Hopper GPU, or the arguments are not what the kernel takes.
    """
    check_device(interpret)
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    if (x.dtype, y.dtype) != (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            f"the Mosaic GPU kernel adds bfloat16 to float32; got {y.dtype} and {x.dtype}."
        )
    if width % (4 * THREADS) or rows > MAX_ROWS:
        raise NotImplementedError(
            f"the Mosaic GPU kernel takes up to {MAX_ROWS} rows of a multiple of {4 * THREADS} elements; got {rows} of "
            f"{width}."
        )

    def run(_: None, *args: jax.Array) -> Any:
        shape = functools.partial(jax.ShapeDtypeStruct, (rows, width))
        return plgpu.kernel(
            functools.partial(_kernel, eps=eps),
            out_type=[shape(x.dtype), shape(y.dtype)],
            grid=(rows,),
            grid_names=("row",),
            num_threads=1,
            thread_name="wg",
            compiler_params=plgpu.CompilerParams(),
            interpret=interpret,
            kernel_name="add_rms_norm",
        )(*args)

    total, h = unchecked(run)(None, x.reshape(rows, width), y.reshape(rows, width), gain)
    return total.reshape(x.shape), h.reshape(x.shape)
