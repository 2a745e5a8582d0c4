"""The public ops: append tokens to one array of a cache, or normalise and rotate them first."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mlra_jax.ops import device
from mlra_jax.ops.append import reference
from mlra_jax.ops.append.reference import LatentTokens
from mlra_jax.ops.back_end import BackEnd, Function, Lazy
from mlra_jax.ops.columns import Columns
from mlra_jax.ops.dispatch import Implementation, dispatch
from mlra_jax.ops.rotary import Frequencies

Layout = Literal["token_major", "feature_major"]

TOKENS: Mapping[str, BackEnd] = {
    "mosaic_tpu": Lazy("mlra_jax.ops.append.mosaic_tpu", "MosaicTPU", device.require_tpu),
    "reference": Function(reference.append),
}
"""Back ends of `append`, in order of preference."""


def append(
    array: Float[Array, "B *heads _ _"] | Columns,
    tokens: Float[Array, "B T *heads W"],
    cache_position: Int[Array, "B T"],
    *,
    layout: Layout = "token_major",
    implementation: Implementation = None,
) -> Float[Array, "B *heads _ _"] | Columns:
    """The array with T new tokens of each row; in place, if it is donated.

    Args:
      array: [B, *heads, S, W] in the layout `token_major`, [B, *heads, W, S] in `feature_major`. Or `Columns` of a pool
        of P pages of S tokens, which belong to any row.
      tokens: rounded to the type of the array. Without heads, [B, T, W], they go to those of every head of `Columns`.
      cache_position: where in the row each token goes. A token whose position is less than 0, or S or more, is dropped;
        no two others of a row may go to the same position. In `Columns` it is the token's slot, page * S + its place in
        the page; one less than 0, or P * S or more, drops the token, and no two others may go to the same slot.
      layout: of the array.
      implementation: a name in `TOKENS`, or a back end, or several to be tried in order; None: the first that takes
        the call.

    Raises:
      ValueError: columns that the buffer has not.
      NotImplementedError: the named implementation does not take these arguments.
    """
    if isinstance(array, Columns):
        array.check("array", layout)
    tokens, cache_position = tokens.astype(array.dtype), cache_position.astype(jnp.int32)
    return dispatch("append", TOKENS, implementation, array, tokens, cache_position, layout=layout)


LATENTS: Mapping[str, BackEnd] = {
    "mosaic_gpu": Lazy("mlra_jax.ops.append.mosaic_gpu", "MosaicGPU", device.require_hopper),
    "reference": Function(functools.partial(reference.normalize_and_append, append=append)),
}
"""Back ends of `normalize_and_append`, in order of preference; all are called with `LatentTokens`."""


def normalize_and_append(
    a: Float[Array, "B T _"],
    q_gain: Float[Array, "A"],
    kv_gain: Float[Array, "U C"],
    position: Int[Array, "B T"],
    cache_position: Int[Array, "B T"],
    kv_latent: Float[Array, "B U _ _"] | Columns,
    k_rope: Float[Array, "B _ _"] | Columns,
    *,
    eps: float,
    q_scale: float,
    kv_scale: float,
    frequencies: Frequencies,
    layout: Layout = "token_major",
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T A"], Float[Array, "B U _ _"] | Columns, Float[Array, "B _ _"] | Columns]:
    """Normalises the tokens' queries and latents, rotates their keys, and appends latents and keys to a cache.

    The cache is two arrays, or one pool of pages of tokens of which `kv_latent` and `k_rope` are `Columns`. What else a
    token has in that pool is padding, and may be overwritten.

    Args:
      a: products of the tokens with W_qa, W_kva and W_kr, side by side: [B, T, A + U*C + R].
      q_gain: of the queries' norm.
      kv_gain: of the latents' norms.
      position: of each token, see `mlra_jax.ops.rotary.rotary_tables`.
      cache_position: see `append`.
      kv_latent: cached latents [B, U, S, C], or features before tokens; donate it.
      k_rope: cached rotary keys [B, S, R], or features before tokens; donate it. As `Columns` of several heads each
        holds the same.
      eps: of the norms.
      q_scale: multiplies the normalised queries.
      kv_scale: multiplies the normalised latents.
      frequencies: of the rotation.
      layout: of the cache, see `append`.
      implementation: see `append`; the names are those in `LATENTS`.

    Returns:
      The normalised, scaled queries in the type of `a`, and the two caches; `Columns` are of the same, changed pool.

    Raises:
      ValueError: columns that the pool has not, or of two pools.
      NotImplementedError: the named implementation does not take these arguments.
    """
    caches = {"kv_latent": kv_latent, "k_rope": k_rope}
    if columns := {name: x for name, x in caches.items() if isinstance(x, Columns)}:
        for name, x in columns.items():
            x.check(name, layout)
        if len({id(getattr(x, "array", x)) for x in caches.values()}) > 1:
            raise ValueError(
                "kv_latent and k_rope must be columns of one and the same pool; make both of them where they are used, "
                "inside `jit` and `shard_map`, of the array that went in."
            )
        if kv_latent.shape[1::2] != kv_gain.shape:
            raise ValueError(
                f"kv_latent must be columns for {len(kv_gain)} heads of {kv_gain.shape[1]}, as kv_gain has them; got "
                f"{kv_latent.shape[1]} of {kv_latent.shape[3]}."
            )
    args = LatentTokens(
        a,
        q_gain,
        kv_gain,
        position,
        cache_position.astype(jnp.int32),
        kv_latent,
        k_rope,
        eps,
        q_scale,
        kv_scale,
        frequencies,
        layout,
    )
    return dispatch("normalize_and_append", LATENTS, implementation, args)
