"""The specification of appending to a cache; XLA compiles it well enough for GPUs and CPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlra_jax.ops.columns import Columns, pack
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
    kv_latent: Any
    k_rope: Any
    eps: float
    q_scale: float
    kv_scale: float
    frequencies: Frequencies
    layout: str


def append(
    array: jax.Array | Columns, tokens: jax.Array, cache_position: jax.Array, *, layout: str
) -> jax.Array | Columns:
    """See `mlra_jax.ops.append.append`."""
    if tokens.shape[:2] == (1, 1) and layout == "token_major":
        # A second token, that is dropped: XLA would make of a single one three operations on the GPU, to read what
        # was there, choose, and write.
        tokens = jnp.pad(tokens, [(0, 0), (0, 1)] + [(0, 0)] * (tokens.ndim - 2))
        cache_position = jnp.pad(cache_position, ((0, 0), (0, 1)), constant_values=-1)
    if isinstance(array, Columns):
        return _append_columns(array, tokens, cache_position)
    token_axis = array.ndim - (1 if layout == "feature_major" else 2)
    capacity = array.shape[token_axis]
    index: list[Any] = [slice(None)] * array.ndim
    index[0] = jnp.arange(len(array))[:, None]
    # Negative ones would count from the end.
    index[token_axis] = jnp.where(cache_position < 0, capacity, cache_position)
    return array.at[tuple(index)].set(tokens, mode="drop")


def _append_columns(columns: Columns, tokens: jax.Array, slot_BT: jax.Array) -> Columns:
    buffer, (pages, page_size) = columns.array, columns.array.shape[:2]
    page_BT = jnp.where((slot_BT < 0) | (slot_BT >= pages * page_size), pages, slot_BT // page_size)
    at = buffer.at[page_BT, slot_BT % page_size]
    if tokens.shape[2:] == (1, columns.token_width):  # nothing of a token is kept
        rows = tokens
    else:
        rows = pack(tokens, columns, at.get(mode="clip").reshape(*slot_BT.shape, columns.token_width))
    return columns.of(at.set(rows.reshape(*slot_BT.shape, *buffer.shape[2:]), mode="drop"))


def normalize_and_append(
    args: LatentTokens, append: Callable[..., Any]
) -> tuple[jax.Array, jax.Array | Columns, jax.Array | Columns]:
    """See `mlra_jax.ops.append.normalize_and_append`; `append`: the op `append`, for which TPUs have a kernel."""
    rank, (u, c) = len(args.q_gain), args.kv_gain.shape
    q_BTA, kv, key_BTR = jnp.split(args.a, [rank, rank + u * c], axis=2)
    latent_BTUC = rms_norm(kv.reshape(*kv.shape[:2], u, c), args.kv_gain, args.eps) * args.kv_scale
    key_BTR = rotate(key_BTR, args.position, args.frequencies)
    q_BTA = (rms_norm(q_BTA, args.q_gain, args.eps) * args.q_scale).astype(args.a.dtype)
    add = lambda cache, tokens: append(cache, tokens, args.cache_position, layout=args.layout)
    if not isinstance(args.kv_latent, Columns):
        return q_BTA, add(args.kv_latent, latent_BTUC), add(args.k_rope, key_BTR)
    assert isinstance(args.k_rope, Columns)
    # Whole tokens, padding too, in one operation.
    whole = Columns(args.kv_latent.array, (0,), args.kv_latent.token_width)
    rows = jnp.zeros((*args.a.shape[:2], whole.width), whole.dtype)
    rows = pack(key_BTR, args.k_rope, pack(latent_BTUC, args.kv_latent, rows))
    buffer = add(whole, rows[:, :, None]).array
    return q_BTA, args.kv_latent.of(buffer), args.k_rope.of(buffer)
