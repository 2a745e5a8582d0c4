"""One more token of each row in a feature-major cache on TPU, in place."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mlra_jax.ops.device import current_device
from mlra_jax.ops.shard_map_utils import unchecked

LANES = 128


def _kernel(slot_ref: Any, token_ref: Any, array_ref: Any, out_ref: Any, *, n_slots: int) -> None:
    # token [1, X, W, 1]; array and out [1, X, W, LANES]: the lanes that hold the slot
    slot = slot_ref[pl.program_id(0)]
    first = jnp.clip(slot // LANES, 0, n_slots // LANES - 1) * LANES
    lane = jax.lax.broadcasted_iota(jnp.int32, out_ref.shape, 3)
    out_ref[...] = jnp.where(lane == slot - first, token_ref[...], array_ref[...])


def append(
    array: jax.Array, tokens: jax.Array, slot_BT: jax.Array, *, layout: str, interpret: Any = False
) -> jax.Array:
    """See `mlra_jax.ops.append.append`; for one token of each row.

    XLA would give a scatter over lanes, or an update of one, another layout than the attention kernel reads, and copy
    the cache there and back. Here a tile of 128 slots of each row goes through VMEM.

    Args:
      array: feature-major cache [B, ..., W, S], S a multiple of 128; donate it.
      tokens: [B, 1, ..., W], in the type of the cache.
      slot_BT: int32.
      layout: of the cache.
      interpret: runs the kernel on the CPU.

    Raises:
      NotImplementedError: not a TPU, not a feature-major cache of whole tiles, or several tokens of a row.
    """
    if not interpret and current_device()[0] != "tpu":
        raise NotImplementedError("It needs a TPU.")
    if layout != "feature_major":
        raise NotImplementedError(f"It needs a feature_major cache; this one is {layout}.")
    if tokens.shape[1] != 1:
        raise NotImplementedError(f"It appends one token of each row; got {tokens.shape[1]}.")
    b, *middle, width, slots = array.shape
    if slots % LANES:
        raise NotImplementedError(f"It needs a cache of whole tiles of {LANES} slots; got {slots}.")

    def run(_: None, slot_B: jax.Array, tokens: jax.Array, array: jax.Array) -> jax.Array:
        heads = functools.reduce(lambda x, y: x * y, middle, 1)
        last = slots // LANES - 1
        tile = lambda i, slot: (i, 0, 0, jnp.clip(slot[i] // LANES, 0, last))
        out = pl.pallas_call(
            functools.partial(_kernel, n_slots=slots),
            out_shape=jax.ShapeDtypeStruct((b, heads, width, slots), array.dtype),
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
            name="append_column",
        )(slot_B, tokens.reshape(b, heads, width, 1), array.reshape(b, heads, width, slots))
        return out.reshape(array.shape)

    return unchecked(run)(None, slot_BT[:, 0], tokens, array)
