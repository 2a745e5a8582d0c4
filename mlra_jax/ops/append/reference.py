"""The specification of appending to a cache; XLA compiles it well enough for GPUs and CPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlra_jax.ops.norm.reference import rms_norm
from mlra_jax.ops.rotary import Frequencies, rotate


@dataclasses.dataclass(frozen=True)
class LatentTokens:
    """Arguments of every back end of `normalize_and_append`; see there."""

    a: jax.Array
    q_gain: jax.Array
    kv_gain: jax.Array
    position: jax.Array
    cache_position: jax.Array
    kv_latent: jax.Array
    k_rope: jax.Array
    eps: float
    q_scale: float
    kv_scale: float
    frequencies: Frequencies
    layout: str


def append(array: jax.Array, tokens: jax.Array, cache_position: jax.Array, *, layout: str) -> jax.Array:
    """See `mlra_jax.ops.append.append`."""
    token_axis = array.ndim - (1 if layout == "feature_major" else 2)
    if tokens.shape[:2] == (1, 1) and layout == "token_major":
        # A second token, that is dropped: XLA would make of a single one three operations on the GPU, to read what
        # was there, choose, and write.
        tokens = jnp.pad(tokens, [(0, 0), (0, 1)] + [(0, 0)] * (tokens.ndim - 2))
        cache_position = jnp.pad(cache_position, ((0, 0), (0, 1)), constant_values=-1)
    capacity = array.shape[token_axis]
    index: list[Any] = [slice(None)] * array.ndim
    index[0] = jnp.arange(len(array))[:, None]
    # Negative ones would count from the end.
    index[token_axis] = jnp.where(cache_position < 0, capacity, cache_position)
    return array.at[tuple(index)].set(tokens, mode="drop")


def normalize_and_append(
    args: LatentTokens, append: Callable[..., jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `mlra_jax.ops.append.normalize_and_append`; `append`: the op `append`, for which TPUs have a kernel."""
    rank, (u, c) = len(args.q_gain), args.kv_gain.shape
    q_BTA, kv, key_BTR = jnp.split(args.a, [rank, rank + u * c], axis=2)
    latent_BTUC = rms_norm(kv.reshape(*kv.shape[:2], u, c), args.kv_gain, args.eps) * args.kv_scale
    add = lambda cache, tokens: append(cache, tokens, args.cache_position, layout=args.layout)
    return (
        (rms_norm(q_BTA, args.q_gain, args.eps) * args.q_scale).astype(args.a.dtype),
        add(args.kv_latent, latent_BTUC),
        add(args.k_rope, rotate(key_BTR, args.position, args.frequencies)),
    )
