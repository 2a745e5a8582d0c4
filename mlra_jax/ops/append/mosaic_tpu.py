"""One more token of each row in a feature-major cache on TPU, in place."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mlra_jax.ops.device import current_device
from mlra_jax.ops.manual import unchecked

LANES = 128


def _kernel(position_ref: Any, token_ref: Any, array_ref: Any, out_ref: Any, *, capacity: int) -> None:
    # token [1, X, W, 1]; array and out [1, X, W, LANES]: the lanes that hold the position
    position = position_ref[pl.program_id(0)]
    first = jnp.minimum(position // LANES, capacity // LANES - 1) * LANES
    lane = jax.lax.broadcasted_iota(jnp.int32, out_ref.shape, 3)
    out_ref[...] = jnp.where(lane == position - first, token_ref[...], array_ref[...])


def append(
    array: jax.Array, tokens_BTX: jax.Array, position_BT: jax.Array, *, layout: str, interpret: Any = False
) -> jax.Array:
    """See `mlra_jax.ops.append.append`; one token of each row of a feature-major cache, on TPU.

    XLA would give a scatter over lanes, or an update of one, another layout than the attention kernel reads, and copy
    the cache there and back. Here a tile of 128 positions of each row goes through VMEM.

    Raises:
      NotImplementedError: this is no TPU, or the arguments are not what the kernel takes.
    """
    b, *middle, width, capacity = array.shape
    if current_device()[0] != "tpu" and not interpret:
        raise NotImplementedError("it needs a TPU.")
    if tokens_BTX.shape[1] != 1 or layout != "feature_major":
        raise NotImplementedError(
            f"it takes one token of each row and a feature-major cache; got {tokens_BTX.shape[1]} and {layout}."
        )
    if capacity % LANES:
        raise NotImplementedError(f"a cache of {capacity} positions is not made of whole tiles of {LANES}.")

    def run(_: None, position_B: jax.Array, tokens: jax.Array, array: jax.Array) -> jax.Array:
        heads = functools.reduce(lambda x, y: x * y, middle, 1)
        last = capacity // LANES - 1
        tile = lambda i, position: (i, 0, 0, jnp.minimum(position[i] // LANES, last))
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
            interpret=interpret,
            name="append",
        )(position_B, tokens.reshape(b, heads, width, 1), array.reshape(b, heads, width, capacity))
        return out.reshape(array.shape)

    return unchecked(run)(None, position_BT[:, 0], tokens_BTX[:, 0].astype(array.dtype), array)
