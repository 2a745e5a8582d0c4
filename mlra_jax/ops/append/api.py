"""The public ops: tokens into an array of a contiguous cache, or, normalised and rotated first, into a latent cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mlra_jax.ops.append import reference
from mlra_jax.ops.dispatch import dispatch, lazily
from mlra_jax.ops.rotary import Frequencies

Layout = Literal["token_major", "feature_major"]

TOKENS: Mapping[str, Callable[..., jax.Array]] = {
    "mosaic_tpu": lazily("mlra_jax.ops.append.mosaic_tpu", "append"),
    "reference": reference.append,
}
"""Back ends of `append`, best first."""


def append(
    array: Float[Array, "B *heads _ _"],
    tokens: Float[Array, "B T *heads W"],
    slot: Int[Array, "B T"],
    *,
    layout: Layout = "token_major",
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B *heads _ _"]:
    """The array with T new tokens of each row; in place, if it is donated.

    Args:
      array: [B, *heads, S, W] in the layout `token_major`, [B, *heads, W, S] in `feature_major`.
      tokens: rounded to the type of the array.
      slot: where each token goes. Any integers: one for which there is no slot, less than 0 or S and more, is dropped.
        The others of a row differ.
      layout: of the array.
      implementation: None (the first that takes the arguments; `mlra_jax.ops.explain` says why), or one name or
        several of `TOKENS`.

    Raises:
      NotImplementedError: the named implementation does not take these arguments.
    """
    tokens, slot = tokens.astype(array.dtype), slot.astype(jnp.int32)
    return dispatch("append", TOKENS, implementation, array, tokens, slot, layout=layout)


LATENTS: Mapping[str, Callable[..., tuple[jax.Array, jax.Array, jax.Array]]] = {
    "mosaic_gpu": lazily("mlra_jax.ops.append.mosaic_gpu", "normalize_and_append"),
    "reference": functools.partial(reference.normalize_and_append, append=append),
}
"""Back ends of `normalize_and_append`, best first."""


def normalize_and_append(
    a: Float[Array, "B T _"],
    q_gain: Float[Array, "A"],
    kv_gain: Float[Array, "U C"],
    position: Int[Array, "B T"],
    slot: Int[Array, "B T"],
    kv_latent: Float[Array, "B U _ _"],
    k_rope: Float[Array, "B _ _"],
    *,
    eps: float,
    q_scale: float,
    kv_scale: float,
    frequencies: Frequencies,
    layout: Layout = "token_major",
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "B T A"], Float[Array, "B U _ _"], Float[Array, "B _ _"]]:
    """Normalises the tokens' queries and latents, rotates their keys, and appends latents and keys to a cache.

    Args:
      a: products of the tokens with W_qa, W_kva and W_kr, side by side: [B, T, A + U*C + R].
      q_gain: of the queries' norm.
      kv_gain: of the latents' norms.
      position: of each token, see `mlra_jax.ops.rotary.rotary_tables`.
      slot: see `append`.
      kv_latent: cached latents [B, U, S, C], or features before tokens; donate it.
      k_rope: cached rotary keys [B, S, R], or features before tokens; donate it.
      eps: of the norms.
      q_scale: multiplies the normalised queries.
      kv_scale: multiplies the normalised latents.
      frequencies: of the rotation.
      layout: of the cache, see `append`.
      implementation: see `append`; of `LATENTS`.

    Returns:
      The normalised, scaled queries in the type of `a`, and the two caches.

    Raises:
      NotImplementedError: the named implementation does not take these arguments.
    """
    args = a, q_gain, kv_gain, position, slot.astype(jnp.int32), kv_latent, k_rope
    scales = {"eps": eps, "q_scale": q_scale, "kv_scale": kv_scale}
    return dispatch(
        "normalize_and_append",
        LATENTS,
        implementation,
        *args,
        **scales,
        frequencies=frequencies,
        layout=layout,
    )
