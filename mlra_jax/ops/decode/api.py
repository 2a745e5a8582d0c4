"""The public ops: decode attention over latent caches (MLA, GLA, MLRA) and grouped caches (MHA, GQA, MQA)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
from jaxtyping import Array, Float, Int

from mlra_jax.ops.decode import reference, xla
from mlra_jax.ops.dispatch import dispatch


def _latent(backend: Callable, args: tuple[jax.Array, ...], scale: float) -> tuple[jax.Array, jax.Array]:
    q_nope, q_rope, kv_latent, k_rope, kv_len = args
    parts = [(q_nope, kv_latent)]
    if q_rope.shape[-1]:
        parts.append((q_rope, k_rope[:, None]))
    return backend(parts, kv_latent, kv_len, scale=scale)


def _grouped(backend: Callable, args: tuple[jax.Array, ...], scale: float) -> tuple[jax.Array, jax.Array]:
    q, k, v, kv_len = args
    return backend([(q, k)], v, kv_len, scale=scale)


BACKENDS = {"xla": xla.decode_attention, "reference": reference.decode_attention}
LATENT_IMPLEMENTATIONS = {name: functools.partial(_latent, f) for name, f in BACKENDS.items()}
GROUPED_IMPLEMENTATIONS = {name: functools.partial(_grouped, f) for name, f in BACKENDS.items()}


def latent_decode_attention(
    q_nope: Float[Array, "B T L M C"],
    q_rope: Float[Array, "B T L M R"],
    kv_latent: Float[Array, "B L S C"],
    k_rope: Float[Array, "B S R"],
    kv_len: Int[Array, "B T"],
    *,
    scale: float,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "B T L M C"], Float[Array, "B T L M"]]:
    """Absorbed attention of each latent head over its cache, which serves as key and as value.

    Scores are `scale * (q_nope . kv_latent + q_rope . k_rope)`; the output is the weighted sum of the latents
    (docs/architecture.md; paper, section 3, with W_UK moved to the query).

    Args:
      q_nope: absorbed content queries, M rows for each of L local latent heads.
      q_rope: rotary queries of the same rows; R may be 0.
      kv_latent: cached latents. Slots that no query of the row sees may hold anything, NaN too.
      k_rope: cached rotary keys, shared by all latent heads.
      kv_len: how many of the leading slots each query sees; causal and ragged batches are expressed by it. 0: none.
      scale: multiplies the scores: 1/sqrt(H + R) of the expanded form, whatever C is.
      implementation: None (the first that takes the arguments), or one name or several of `xla`, `reference`.

    Returns:
      Output in the type of `q_nope`, zeros where nothing is seen, and the float32 log-sum-exp, -inf there.

    Raises:
      ValueError: shapes that do not belong together.
      NotImplementedError: the named implementation does not take these arguments.
    """
    b, t, heads, m, c = q_nope.shape
    s = kv_latent.shape[2]
    _check(q_rope=(q_rope, (b, t, heads, m, q_rope.shape[-1])))
    _check(
        kv_latent=(kv_latent, (b, heads, s, c)),
        k_rope=(k_rope, (b, s, q_rope.shape[-1])),
        kv_len=(kv_len, (b, t)),
    )
    args = (q_nope, q_rope, kv_latent, k_rope, kv_len)
    return dispatch("latent_decode_attention", LATENT_IMPLEMENTATIONS, implementation, args, scale)


def grouped_decode_attention(
    q: Float[Array, "B T K M H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S V"],
    kv_len: Int[Array, "B T"],
    *,
    scale: float,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "B T K M V"], Float[Array, "B T K M"]]:
    """Attention of M query heads for each of K local KV heads over a cache of keys and values.

    Args:
      q: queries.
      k: cached keys. Slots that no query of the row sees may hold anything, NaN too.
      v: cached values.
      kv_len: how many of the leading slots each query sees. 0: none.
      scale: multiplies the scores.
      implementation: None (the first that takes the arguments), or one name or several of `xla`, `reference`.

    Returns:
      Output in the type of `q`, zeros where nothing is seen, and the float32 log-sum-exp, -inf there.

    Raises:
      ValueError: shapes that do not belong together.
      NotImplementedError: the named implementation does not take these arguments.
    """
    b, t, heads, _, h = q.shape
    s = k.shape[2]
    _check(k=(k, (b, heads, s, h)), v=(v, (b, heads, s, v.shape[-1])), kv_len=(kv_len, (b, t)))
    args = (q, k, v, kv_len)
    return dispatch("grouped_decode_attention", GROUPED_IMPLEMENTATIONS, implementation, args, scale)


def _check(**arrays: tuple[jax.Array, tuple[int, ...]]) -> None:
    for name, (x, expected) in arrays.items():
        if x.shape != expected:
            raise ValueError(f"{name} must have the shape {expected} that the queries imply; got {x.shape}.")
