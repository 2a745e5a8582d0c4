"""The public ops: append tokens to one array of a contiguous cache, or normalise and rotate them first."""

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
from mlra_jax.ops.dispatch import Implementation, dispatch
from mlra_jax.ops.rotary import Frequencies

Layout = Literal["token_major", "feature_major"]

TOKENS: Mapping[str, BackEnd] = {
    "mosaic_tpu": Lazy("mlra_jax.ops.append.mosaic_tpu", "MosaicTPU", device.require_tpu),
    "reference": Function(reference.append),
}
"""Back ends of `append`, in order of preference."""


def append(
    array: Float[Array, "B *heads _ _"],
    tokens: Float[Array, "B T *heads W"],
    cache_position: Int[Array, "B T"],
    *,
    layout: Layout = "token_major",
    implementation: Implementation = None,
) -> Float[Array, "B *heads _ _"]:
    """The array with T new tokens of each row; in place, if it is donated.

    Args:
      array: [B, *heads, S, W] in the layout `token_major`, [B, *heads, W, S] in `feature_major`.
      tokens: rounded to the type of the array.
      cache_position: where in the row each token goes. A token whose position is less than 0, or S or more, is dropped;
        no two others of a row may go to the same position.
      layout: of the array.
      implementation: a name in `TOKENS`, or a back end, or several to be tried in order; None: the first that takes
        the call.

    Raises:
      NotImplementedError: the named implementation does not take these arguments.
    """
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
    kv_latent: Float[Array, "B U _ _"],
    k_rope: Float[Array, "B _ _"],
    *,
    eps: float,
    q_scale: float,
    kv_scale: float,
    frequencies: Frequencies,
    layout: Layout = "token_major",
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T A"], Float[Array, "B U _ _"], Float[Array, "B _ _"]]:
    """Normalises the tokens' queries and latents, rotates their keys, and appends latents and keys to a cache.

    Args:
      a: products of the tokens with W_qa, W_kva and W_kr, side by side: [B, T, A + U*C + R].
      q_gain: of the queries' norm.
      kv_gain: of the latents' norms.
      position: of each token, see `mlra_jax.ops.rotary.rotary_tables`.
      cache_position: see `append`.
      kv_latent: cached latents [B, U, S, C], or features before tokens; donate it.
      k_rope: cached rotary keys [B, S, R], or features before tokens; donate it.
      eps: of the norms.
      q_scale: multiplies the normalised queries.
      kv_scale: multiplies the normalised latents.
      frequencies: of the rotation.
      layout: of the cache, see `append`.
      implementation: see `append`; the names are those in `LATENTS`.

    Returns:
      The normalised, scaled queries in the type of `a`, and the two caches.

    Raises:
      NotImplementedError: the named implementation does not take these arguments.
    """
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
