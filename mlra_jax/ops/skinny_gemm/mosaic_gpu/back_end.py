"""When the skinny GEMM kernel for Hopper GPUs applies."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mlra_jax.ops.hopper import ROWS, HopperKernel
from mlra_jax.ops.shard_map_utils import unchecked
from mlra_jax.ops.skinny_gemm.mosaic_gpu.config import UNIT, Config, Shape
from mlra_jax.ops.skinny_gemm.mosaic_gpu.kernel import multiply

MIN_BYTES = 4 * 1024**2
"""Of the matrix: smaller ones are read before a kernel of ours is under way."""
MAX_BYTES = 256 * 1024**2
"""Larger ones XLA reads as fast, or faster (a token matrix of 309 MB on an H100: 111 us, and 116 by this kernel)."""


class MosaicGPU(HopperKernel[Shape, Config]):
    """`skinny_gemm` or, with two matrices, `swiglu`: bfloat16 in, float32 sums."""

    config_type = Config

    def check(self, x: jax.Array, w: jax.Array, *, dtype: jnp.dtype | None = None) -> Shape:
        """The sizes of a call."""
        (rows, depth), features, gated = x.shape, w.shape[-2], w.ndim == 3
        self.target()
        if (x.dtype, w.dtype) != (jnp.bfloat16, jnp.bfloat16):
            raise NotImplementedError(
                f"the Mosaic GPU kernel multiplies bfloat16 with bfloat16; got {x.dtype} and {w.dtype}."
            )
        if not self.takes_rows(rows, x.dtype):
            raise NotImplementedError(f"the Mosaic GPU kernel multiplies 2 to {ROWS} rows; got {rows}.")
        if depth % 64 or features % UNIT:
            raise NotImplementedError(
                "the Mosaic GPU kernel takes matrices of a multiple of 8 rows of a multiple of 64 elements; "
                f"got {features} of {depth}."
            )
        size = 2 * math.prod(w.shape)
        if self.config is None and self.interpret is None and not MIN_BYTES <= size <= MAX_BYTES:
            raise NotImplementedError(
                f"the Mosaic GPU kernel is for matrices of 4 to 256 MiB; got {size} bytes."
            )
        return Shape(-(-rows // UNIT) * UNIT, features, depth, gated, (dtype or x.dtype).itemsize)

    def takes_rows(self, rows: int, dtype: jnp.dtype) -> bool:
        """Whether the kernel multiplies so many rows of this type with a large matrix.

        Raises:
          NotImplementedError: the current device is no Hopper GPU.
        """
        self.target()
        return 2 <= rows <= ROWS and dtype == jnp.bfloat16

    def run(
        self,
        shape: Shape,
        config: Config | None,
        x: jax.Array,
        w: jax.Array,
        *,
        dtype: jnp.dtype | None = None,
    ) -> jax.Array:
        """Runs the kernel."""
        if config is None or not config.fits(shape):
            raise NotImplementedError(f"the Mosaic GPU kernel has no tiling for {shape}; got {config}.")
        options = {"shape": shape, "config": config, "dtype": dtype or x.dtype, "interpret": self.interpret}
        w = w.reshape(shape.matrices, *w.shape[-2:])
        return unchecked(lambda _, x, w: multiply(x, w, **options))(None, x, w)
