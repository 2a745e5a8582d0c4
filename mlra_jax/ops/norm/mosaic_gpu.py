"""The residual sum with its norm on Hopper GPUs, and their gradients: one Pallas Mosaic GPU kernel for each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mlra_jax.ops.hopper import THREADS, HopperKernel, plgpu
from mlra_jax.ops.remat import RESIDUAL
from mlra_jax.ops.shard_map_utils import unchecked

MAX_WIDTH = 8192
"""Longest row: a thread keeps its elements of a row in registers."""
FORWARD, BACKWARD = 6, 3
"""Programs that a processor has registers for; the rows are divided among all programs."""


def _read(ref: Any) -> jax.Array:
    lay_out = plgpu.Layout.WG_STRIDED((ref.shape[-1],), vec_size=4)
    return plgpu.load(ref, layout=lay_out).astype(jnp.float32)


def _rows(n: int, programs: int, one: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
    """Folds `one(row, carry)` over those of n rows that are this program's."""
    program = lax.axis_index("program")
    step = lambda i, carry: one(program + i * programs, carry)
    return lax.fori_loop(0, lax.div(n - 1 - program, programs) + 1, step, carry)


def _kernel(
    x_ref: Any,  # float32 [rows, D]
    y_ref: Any,  # bfloat16 [rows, D]
    gain_ref: Any,  # [D]
    sum_ref: Any,  # float32 [rows, D]
    h_ref: Any,  # bfloat16 [rows, D]
    *,
    eps: float,
    programs: int,
) -> None:
    rows, width = x_ref.shape
    gain = _read(gain_ref)

    def one(row: jax.Array, _: None) -> None:
        x = _read(x_ref.at[row]) + _read(y_ref.at[row])
        sum_ref[row, :] = x
        h_ref[row, :] = (x * lax.rsqrt(jnp.sum(x * x) / width + eps) * gain).astype(h_ref.dtype)

    _rows(rows, programs, one, None)


def _gradient_kernel(
    x_ref: Any,  # float32 [rows, D]: the sum
    gain_ref: Any,  # [D]
    d_sum_ref: Any,  # float32 [rows, D]
    d_h_ref: Any,  # bfloat16 [rows, D]
    d_x_ref: Any,  # float32 [rows, D]
    d_y_ref: Any,  # bfloat16 [rows, D]: the same rounded
    d_gain_ref: Any,  # float32 [programs, D]: parts of the gain's
    *,
    eps: float,
    programs: int,
) -> None:
    rows, width = x_ref.shape
    gain = _read(gain_ref)

    def one(row: jax.Array, d_gain: jax.Array) -> jax.Array:
        x, d_h, d_sum = (_read(ref.at[row]) for ref in (x_ref, d_h_ref, d_sum_ref))
        scale = lax.rsqrt(jnp.sum(x * x) / width + eps)
        normal, d_normal = x * scale, d_h * gain
        along = jnp.sum(normal * d_normal) / width
        d_x = d_sum + scale * (d_normal - normal * along)
        d_x_ref[row, :] = d_x
        d_y_ref[row, :] = d_x.astype(d_y_ref.dtype)
        return d_gain + d_h * normal

    zeros = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), plgpu.Layout.WG_STRIDED((width,), vec_size=4))
    d_gain_ref[lax.axis_index("program"), :] = _rows(rows, programs, one, zeros)


def _run(
    kernel: Callable[..., None],
    programs: int,
    out_type: list[Any],
    name: str,
    interpret: Any,
    *args: jax.Array,
) -> Any:
    return plgpu.kernel(
        functools.partial(kernel, programs=programs),
        out_type=out_type,
        grid=(programs,),
        grid_names=("program",),
        num_threads=1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(),
        interpret=interpret,
        kernel_name=name,
    )(*args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _add(
    eps: float, processors: int, interpret: Any, x: jax.Array, y: jax.Array, gain: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _forward(eps, processors, interpret, x, y, gain)[0]


def _forward(
    eps: float, processors: int, interpret: Any, x: jax.Array, y: jax.Array, gain: jax.Array
) -> tuple[Any, Any]:
    out_type = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, y)]
    kernel, programs = functools.partial(_kernel, eps=eps), min(len(x), FORWARD * processors)
    outputs = _run(kernel, programs, out_type, "add_rms_norm", interpret, x, y, gain)
    total, h = (checkpoint_name(a, RESIDUAL) for a in outputs)
    return (total, h), (total, gain)


def _backward(
    eps: float, processors: int, interpret: Any, saved: Any, d: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, ...]:
    (total, gain), (d_total, d_h) = saved, d
    rows, width = total.shape
    programs = min(rows, BACKWARD * processors)
    out_type = [
        jax.ShapeDtypeStruct(total.shape, total.dtype),
        jax.ShapeDtypeStruct(total.shape, d_h.dtype),
        jax.ShapeDtypeStruct((programs, width), jnp.float32),
    ]
    kernel = functools.partial(_gradient_kernel, eps=eps)
    d_x, d_y, d_gains = _run(
        kernel, programs, out_type, "add_rms_norm_d", interpret, total, gain, d_total, d_h
    )
    return d_x, d_y, d_gains.sum(axis=0).astype(gain.dtype)


_add.defvjp(_forward, _backward)


class MosaicGPU(HopperKernel[None, None]):
    """Float32 and bfloat16 in, float32 statistics; differentiable once."""

    def check(self, x: jax.Array, y: jax.Array, gain: jax.Array, *, eps: float) -> None:
        """Whether it takes a call."""
        self.target()
        width = x.shape[-1]
        if (x.dtype, y.dtype) != (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(
                f"the Mosaic GPU kernels add bfloat16 to float32; got {y.dtype} and {x.dtype}."
            )
        if width % (4 * THREADS) or width > MAX_WIDTH:
            raise NotImplementedError(
                f"the Mosaic GPU kernels take rows of up to {MAX_WIDTH} elements, a multiple of {4 * THREADS}; "
                f"got {width}."
            )

    def run(
        self, shape: None, config: None, x: jax.Array, y: jax.Array, gain: jax.Array, *, eps: float
    ) -> tuple[jax.Array, jax.Array]:
        """Runs the kernels."""
        rows, width = math.prod(x.shape[:-1]), x.shape[-1]
        run = unchecked(lambda _, *args: _add(eps, self.target(), self.interpret, *args))
        total, h = run(None, x.reshape(rows, width), y.reshape(rows, width), gain)
        return total.reshape(x.shape), h.reshape(x.shape)
