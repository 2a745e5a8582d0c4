"""Appends to a cache on TPU, in place: one token of each row to a feature-major one, any tokens to a pool."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mlra_jax.ops import device
from mlra_jax.ops.back_end import Kernel
from mlra_jax.ops.columns import Columns
from mlra_jax.ops.shard_map_utils import unchecked

LANES = 128
POOL_BLOCK = 256
"""Most tokens whose copies to a pool are under way together."""


def _kernel(position_ref: Any, token_ref: Any, array_ref: Any, out_ref: Any, *, capacity: int) -> None:
    # token [1, X, W, 1]; array and out [1, X, W, LANES]: the lanes that hold the position
    position = position_ref[pl.program_id(0)]
    first = jnp.clip(position // LANES, 0, capacity // LANES - 1) * LANES
    lane = jax.lax.broadcasted_iota(jnp.int32, out_ref.shape, 3)
    out_ref[...] = jnp.where(lane == position - first, token_ref[...], array_ref[...])


def _pool_kernel(slot_ref: Any, tokens_ref: Any, _: Any, pool_ref: Any, copied: Any) -> None:
    # tokens [block, ..., k, W] in VMEM; pool [P, S, ..., k, W] in HBM
    (block, *_), (pages, page_size, *_) = tokens_ref.shape, pool_ref.shape
    first = pl.program_id(0) * block

    def each(do: Callable[[Any], None]) -> None:
        @pl.loop(0, block)
        def _(i: jax.Array) -> None:
            slot = slot_ref[first + i]

            @pl.when((slot >= 0) & (slot < pages * page_size))
            def _() -> None:
                target = pool_ref.at[slot // page_size, slot % page_size]
                do(pltpu.make_async_copy(tokens_ref.at[i], target, copied))

    each(lambda copy: copy.start())
    each(lambda copy: copy.wait())


class MosaicTPU(Kernel[None, None]):
    """For one token of each row of a feature-major cache, and for whole tokens of a serving engine's pool.

    XLA would give a scatter over lanes, or an update of one, another layout than the attention kernel reads, and copy
    the cache there and back. Here a tile of 128 positions of each row goes through VMEM. Into a pool XLA would write
    one token after the other; here their copies are under way together.
    """

    name: ClassVar[str] = "mosaic_tpu"

    def check(self, array: Any, tokens: jax.Array, cache_position: jax.Array, *, layout: str) -> None:
        """Whether it takes a call."""
        if not self.interpret:
            device.require_tpu()
        if isinstance(array, Columns):
            self._check_pool(array)
            return
        if layout != "feature_major":
            raise NotImplementedError(f"It needs a feature_major cache; this one is {layout}.")
        if tokens.shape[1] != 1:
            raise NotImplementedError(f"It appends one token of each row; got {tokens.shape[1]}.")
        if (capacity := array.shape[-1]) % LANES:
            raise NotImplementedError(f"It needs a cache for a multiple of {LANES} tokens; got {capacity}.")

    def _check_pool(self, columns: Columns) -> None:
        *_, packed, width = columns.array.shape
        if columns.array.ndim < 4 or packed * columns.dtype.itemsize % 4 or width % LANES:
            raise NotImplementedError(
                f"It writes pools [P, S, ..., k, {LANES}] or of a larger multiple of {LANES}, in which k values share "
                f"the 32 bits of a lane; got {list(columns.array.shape)} of {columns.dtype}."
            )
        if columns.shape[1::2] != (1, columns.token_width):
            raise NotImplementedError("It writes all columns of a token, not some.")

    def run(
        self,
        shape: None,
        config: None,
        array: Any,
        tokens: jax.Array,
        cache_position: jax.Array,
        *,
        layout: str,
    ) -> Any:
        """Runs the kernel; the cache is changed in place, if it is donated."""
        if isinstance(array, Columns):
            return array.of(self._append_to_pool(array.array, tokens, cache_position))
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

    def _append_to_pool(self, pool: jax.Array, tokens: jax.Array, slot_BT: jax.Array) -> jax.Array:
        token = pool.shape[2:]
        n, zeros = slot_BT.size, (0,) * len(token)
        block = min(n, POOL_BLOCK)
        padding = -n % block
        slot_N = jnp.pad(slot_BT.reshape(n), (0, padding), constant_values=-1)
        tokens_N = jnp.pad(tokens.reshape(n, *token), [(0, padding)] + [(0, 0)] * len(token))

        def run(_: None, slot_N: jax.Array, tokens_N: jax.Array, pool: jax.Array) -> jax.Array:
            return pl.pallas_call(
                _pool_kernel,
                out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
                grid_spec=pltpu.PrefetchScalarGridSpec(
                    num_scalar_prefetch=1,
                    grid=((n + padding) // block,),
                    in_specs=[
                        pl.BlockSpec((block, *token), lambda i, _: (i, *zeros)),
                        pl.BlockSpec(memory_space=pl.ANY),
                    ],
                    out_specs=pl.BlockSpec(memory_space=pl.ANY),
                    scratch_shapes=[pltpu.SemaphoreType.DMA],
                ),
                input_output_aliases={2: 0},
                interpret=self.interpret or False,
                name="append_tokens",
            )(slot_N, tokens_N, pool)

        return unchecked(run)(None, slot_N, tokens_N, pool)
