"""The public ops: new tokens into a cache, by themselves or with the norms and the rotation before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
from jaxtyping import Array, Float, Int

from mlra_jax.ops.append import mosaic_gpu, mosaic_tpu, reference
from mlra_jax.ops.decode.api import Layout
from mlra_jax.ops.dispatch import dispatch

IMPLEMENTATIONS: Mapping[str, Callable[..., jax.Array]] = {
    "mosaic_tpu": mosaic_tpu.append,
    "reference": reference.append,
}
"""Back ends of `append`, best first."""


def append(
    array: Float[Array, "B ..."],
    tokens: Float[Array, "B T ..."],
    position: Int[Array, "B T"],
    *,
    layout: Layout = "token_major",
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B ..."]:
    """One array of a cache with new tokens written into it.

    Args:
      array: by head [B, U, S, W] or shared by all heads [B, S, W], contiguous by row; donate it.
      tokens: [B, T, U, W] or [B, T, W].
      position: int32, where each token goes; dropped if it is S or more.
      layout: `token_major`, as above, or `feature_major`: W before S.
      implementation: None (the first that takes the arguments), or one name or several of `IMPLEMENTATIONS`.

    Returns:
      The array, in place if it was donated.

    Raises:
      NotImplementedError: the named implementation does not take these arguments.
    """
    return dispatch("append", IMPLEMENTATIONS, implementation, array, tokens, position, layout=layout)


def _normalize_then_append(
    a: jax.Array,
    q_gain: jax.Array,
    kv_gain: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    position: jax.Array,
    kv_latent: jax.Array,
    k_rope: jax.Array,
    *,
    eps: float,
    q_scale: float,
    kv_scale: float,
    layout: Layout,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, new_latent, new_rope = reference.normalize(
        a, q_gain, kv_gain, rotary, eps=eps, q_scale=q_scale, kv_scale=kv_scale
    )
    kv_latent = append(kv_latent, new_latent, position, layout=layout)
    return q, kv_latent, append(k_rope, new_rope, position, layout=layout)


NORMALIZING_IMPLEMENTATIONS: Mapping[str, Callable[..., tuple[jax.Array, jax.Array, jax.Array]]] = {
    "mosaic_gpu": mosaic_gpu.normalize_and_append,
    "reference": _normalize_then_append,
}
"""Back ends of `normalize_and_append`, best first; the last calls `append`."""


def normalize_and_append(
    a: Float[Array, "B T E"],
    q_gain: Float[Array, "A"],
    kv_gain: Float[Array, "U C"],
    rotary: tuple[Float[Array, "B T _"], Float[Array, "B T _"]],
    position: Int[Array, "B T"],
    kv_latent: Float[Array, "B U _ _"],
    k_rope: Float[Array, "B _ _"],
    *,
    eps: float,
    q_scale: float,
    kv_scale: float,
    layout: Layout = "token_major",
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "B T A"], Float[Array, "B U _ _"], Float[Array, "B _ _"]]:
    """Normalises the queries and latents of new tokens, rotates their keys, and writes latents and keys into the cache.

    Args:
      a: products of the tokens with W_qa, W_kva and W_kr, side by side: [B, T, A + U*C + R].
      q_gain: of the queries' norm.
      kv_gain: of the latents' norms.
      rotary: cosines and sines of the tokens' positions, [B, T, R/2] (`mlra_jax.ops.rotary.rotary_tables`).
      position: int32, where each token goes in the cache; dropped if it is S or more.
      kv_latent: cached latents [B, U, S, C]; donate them.
      k_rope: cached rotary keys [B, S, R]; donate them.
      eps: of the norms.
      q_scale: multiplies the normalised queries.
      kv_scale: multiplies the normalised latents.
      layout: of the cache, see `append`.
      implementation: None (the first that takes the arguments), or one name or several of
        `NORMALIZING_IMPLEMENTATIONS`.

    Returns:
      The normalised, scaled queries [B, T, A], and the two caches.

    Raises:
      NotImplementedError: the named implementation does not take these arguments.
    """
    return dispatch(
        "normalize_and_append",
        NORMALIZING_IMPLEMENTATIONS,
        implementation,
        a,
        q_gain,
        kv_gain,
        rotary,
        position,
        kv_latent,
        k_rope,
        eps=eps,
        q_scale=q_scale,
        kv_scale=kv_scale,
        layout=layout,
    )
