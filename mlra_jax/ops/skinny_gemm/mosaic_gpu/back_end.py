"""When the skinny GEMM kernel for Hopper GPUs applies."""

from __future__ import annotations

import functools
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
    """bfloat16 in, float32 sums."""

    config_type = Config

    def check(self, x: jax.Array, w: jax.Array, *, dtype: jnp.dtype) -> Shape:
        """The sizes of a call."""
        return self._check(x, w[None], dtype)

    def _check(self, x: jax.Array, w: jax.Array, dtype: jnp.dtype) -> Shape:
        rows, depth = x.shape
        self.processors()
        if (x.dtype, w.dtype) != (jnp.bfloat16, jnp.bfloat16):
            raise NotImplementedError(
                f"the Mosaic GPU kernel multiplies bfloat16 with bfloat16; got {x.dtype} and {w.dtype}."
            )
        if not self.takes_rows(rows, x.dtype):
            raise NotImplementedError(f"the Mosaic GPU kernel multiplies 2 to {ROWS} rows; got {rows}.")
        if depth % 64 or w.shape[1] % UNIT:
            raise NotImplementedError(
                "the Mosaic GPU kernel takes matrices of a multiple of 8 rows of a multiple of 64 elements; "
                f"got {w.shape[1]} of {depth}."
            )
        size = 2 * math.prod(w.shape)
        if self.config is None and self.interpret is None and not MIN_BYTES <= size <= MAX_BYTES:
            raise NotImplementedError(
                f"the Mosaic GPU kernel is for matrices of 4 to 256 MiB; got {size} bytes."
            )
        return Shape(-(-rows // UNIT) * UNIT, w.shape[1], depth, len(w) == 2, dtype.itemsize)

    def takes_rows(self, rows: int, dtype: jnp.dtype) -> bool:
        """Whether the kernel multiplies so many rows of this type with a large matrix.

        Raises:
          NotImplementedError: the current device is no Hopper GPU.
        """
        self.processors()
        return 2 <= rows <= ROWS and dtype == jnp.bfloat16

    def heuristic(self, shape: Shape) -> Config | None:
        """See `Config.heuristic`."""
        return Config.heuristic(shape, self.processors())

    def run(
        self, shape: Shape, config: Config | None, x: jax.Array, w: jax.Array, *, dtype: jnp.dtype
    ) -> jax.Array:
        """Runs the kernel."""
        return self._run(shape, config, x, w[None], dtype)

    def _run(
        self, shape: Shape, config: Config | None, x: jax.Array, w: jax.Array, dtype: jnp.dtype
    ) -> jax.Array:
        if config is None or not config.fits(shape):
            raise NotImplementedError(f"the Mosaic GPU kernel has no tiling for {shape}; got {config}.")
        run = functools.partial(multiply, shape=shape, config=config, dtype=dtype, interpret=self.interpret)
        return unchecked(lambda _, x, w: run(x, w))(None, x, w)


class MosaicGPUSwiGLU(MosaicGPU):
    """The same kernel with two matrices, whose products it gates."""

    def check(self, x: jax.Array, w: jax.Array) -> Shape:  # type: ignore[override]
        """The sizes of a call."""
        return self._check(x, w, x.dtype)

    def run(self, shape: Shape, config: Config | None, x: jax.Array, w: jax.Array) -> jax.Array:  # type: ignore[override]
        """Runs the kernel."""
        return self._run(shape, config, x, w, x.dtype)
