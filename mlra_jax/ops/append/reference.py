"""The specification of appending to a cache; XLA compiles it well enough for GPUs and CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlra_jax.ops.norm.reference import rms_norm
from mlra_jax.ops.rotary import Frequencies, rotate


def append(array: jax.Array, tokens: jax.Array, slot_BT: jax.Array, *, layout: str) -> jax.Array:
    """See `mlra_jax.ops.append.append`."""
    token_axis = array.ndim - (1 if layout == "feature_major" else 2)
    if tokens.shape[:2] == (1, 1) and layout == "token_major":
        # A second token, that is dropped: XLA would make of a single one three operations on the GPU, to read what
        # was there, choose, and write.
        tokens = jnp.pad(tokens, [(0, 0), (0, 1)] + [(0, 0)] * (tokens.ndim - 2))
        slot_BT = jnp.pad(slot_BT, ((0, 0), (0, 1)), constant_values=-1)
    slots = array.shape[token_axis]
    index: list[Any] = [slice(None)] * array.ndim
    index[0] = jnp.arange(len(array))[:, None]
    index[token_axis] = jnp.where(slot_BT < 0, slots, slot_BT)  # negative ones would count from the end
    return array.at[tuple(index)].set(tokens, mode="drop")


def normalize_and_append(
    a_BTE: jax.Array,
    q_gain_A: jax.Array,
    kv_gain_UC: jax.Array,
    position_BT: jax.Array,
    slot_BT: jax.Array,
    kv_latent: jax.Array,
    k_rope: jax.Array,
    *,
    eps: float,
    q_scale: float,
    kv_scale: float,
    frequencies: Frequencies,
    layout: str,
    append: Callable[..., jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `mlra_jax.ops.append.normalize_and_append`; `append`: the op `append`, of which TPUs have a kernel."""
    rank, (u, c) = len(q_gain_A), kv_gain_UC.shape
    q_BTA, kv, key_BTR = jnp.split(a_BTE, [rank, rank + u * c], axis=2)
    latent_BTUC = rms_norm(kv.reshape(*kv.shape[:2], u, c), kv_gain_UC, eps) * kv_scale
    return (
        (rms_norm(q_BTA, q_gain_A, eps) * q_scale).astype(a_BTE.dtype),
        append(kv_latent, latent_BTUC, slot_BT, layout=layout),
        append(k_rope, rotate(key_BTR, position_BT, frequencies), slot_BT, layout=layout),
    )
