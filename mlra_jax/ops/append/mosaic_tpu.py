"""Appends one token of each row to a feature-major cache on TPU, in place."""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mlra_jax.ops import device
from mlra_jax.ops.back_end import Kernel
from mlra_jax.ops.shard_map_utils import unchecked

LANES = 128


def _kernel(position_ref: Any, token_ref: Any, array_ref: Any, out_ref: Any, *, capacity: int) -> None:
    # token [1, X, W, 1]; array and out [1, X, W, LANES]: the lanes that hold the position
    position = position_ref[pl.program_id(0)]
    first = jnp.clip(position // LANES, 0, capacity // LANES - 1) * LANES
    lane = jax.lax.broadcasted_iota(jnp.int32, out_ref.shape, 3)
    out_ref[...] = jnp.where(lane == position - first, token_ref[...], array_ref[...])


class MosaicTPU(Kernel[None, None]):
    """For one token of each row.

    XLA would give a scatter over lanes, or an update of one, another layout than the attention kernel reads, and copy
    the cache there and back. Here a tile of 128 positions of each row goes through VMEM.
    """

    name: ClassVar[str] = "mosaic_tpu"

    def check(self, array: jax.Array, tokens: jax.Array, cache_position: jax.Array, *, layout: str) -> None:
        """Whether it takes a call."""
        if not self.interpret:
            device.require_tpu()
        if layout != "feature_major":
            raise NotImplementedError(f"It needs a feature_major cache; this one is {layout}.")
        if tokens.shape[1] != 1:
            raise NotImplementedError(f"It appends one token of each row; got {tokens.shape[1]}.")
        if (capacity := array.shape[-1]) % LANES:
            raise NotImplementedError(f"It needs a cache for a multiple of {LANES} tokens; got {capacity}.")

    def run(
        self,
        shape: None,
        config: None,
        array: jax.Array,
        tokens: jax.Array,
        cache_position: jax.Array,
        *,
        layout: str,
    ) -> jax.Array:
        """Runs the kernel; the cache is changed in place, if it is donated."""
        b, *middle, width, capacity = array.shape
        heads, last = math.prod(middle), capacity // LANES - 1
        tile = lambda i, position: (i, 0, 0, jnp.clip(position[i] // LANES, 0, last))

        def run(_: None, position_B: jax.Array, tokens: jax.Array, array: jax.Array) -> jax.Array:
            out = pl.pallas_call(
                functools.partial(_kernel, capacity=capacity),
                out_shape=jax.ShapeDtypeStruct((b, heads, width, capacity), array.dtype),
                grid_spec=pltpu.PrefetchScalarGridSpec(
                    num_scalar_prefetch=1,
                    grid=(b,),
                    in_specs=[
                        pl.BlockSpec((1, heads, width, 1), lambda i, _: (i, 0, 0, 0)),
                        pl.BlockSpec((1, heads, width, LANES), tile),
                    ],
                    out_specs=pl.BlockSpec((1, heads, width, LANES), tile),
                ),
                input_output_aliases={2: 0},
                interpret=self.interpret or False,
                name="append_column",
            )(position_B, tokens.reshape(b, heads, width, 1), array.reshape(b, heads, width, capacity))
            return out.reshape(array.shape)

        return unchecked(run)(None, cache_position[:, 0], tokens, array)
