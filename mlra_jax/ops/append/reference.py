"""What the append ops compute, in plain JAX; XLA's implementation too."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mlra_jax.ops.norm.reference import rms_norm
from mlra_jax.ops.rotary import turn


def append(array: jax.Array, tokens_BTX: jax.Array, position_BT: jax.Array, *, layout: str) -> jax.Array:
    """See `mlra_jax.ops.append.append`."""
    token_axis = array.ndim - (2 if layout == "token_major" else 1)
    if tokens_BTX.shape[:2] == (1, 1) and layout == "token_major":
        # A second token, that is dropped: XLA would make of a single one three operations on the GPU, to read what was
        # there, choose, and write.
        tokens_BTX = jnp.pad(tokens_BTX, [(0, 0), (0, 1)] + [(0, 0)] * (tokens_BTX.ndim - 2))
        position_BT = jnp.pad(position_BT, [(0, 0), (0, 1)], constant_values=array.shape[token_axis])
    index: list[Any] = [slice(None)] * array.ndim
    index[0], index[token_axis] = jnp.arange(array.shape[0])[:, None], position_BT
    return array.at[tuple(index)].set(tokens_BTX.astype(array.dtype), mode="drop")


def normalize(
    a_BTE: jax.Array,
    q_gain_A: jax.Array,
    kv_gain_UC: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    *,
    eps: float,
    q_scale: float,
    kv_scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The queries [B, T, A], latents [B, T, U, C] and rotary keys [B, T, R] of `normalize_and_append`."""
    (b, t, _), rank, (u, c) = a_BTE.shape, q_gain_A.shape[0], kv_gain_UC.shape
    q_BTA, kv, k_rope = jnp.split(a_BTE, [rank, rank + u * c], axis=2)
    q_BTA = (rms_norm(q_BTA, q_gain_A, eps) * q_scale).astype(a_BTE.dtype)
    kv_latent = rms_norm(kv.reshape(b, t, u, c), kv_gain_UC, eps) * kv_scale
    return q_BTA, kv_latent, turn(k_rope, *rotary)
