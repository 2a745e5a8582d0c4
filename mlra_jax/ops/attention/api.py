"""The public ops: causal attention over whole sequences, with grouped heads, or with keys in parts."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Array, Float, Int

from mlra_jax.ops import device
from mlra_jax.ops.attention import reference, xla
from mlra_jax.ops.attention.qk_parts import Joins, Parts, heads_of
from mlra_jax.ops.back_end import BackEnd, Function, Lazy
from mlra_jax.ops.dispatch import Implementation, dispatch

IMPLEMENTATIONS: Mapping[str, BackEnd] = {
    "mosaic_gpu": Lazy("mlra_jax.ops.attention.mosaic_gpu", "MosaicGPU", device.require_hopper),
    "tokamax": Joins(Lazy("mlra_jax.ops.attention.tokamax", "Tokamax", device.require_ampere)),
    "cudnn": Joins(Lazy("mlra_jax.ops.attention.cudnn", "CuDNN", device.require_ampere)),
    "splash": Joins(Lazy("mlra_jax.ops.attention.splash", "Splash", device.require_tpu)),
    "xla": Joins(Function(xla.causal_attention)),
    "reference": Joins(Function(reference.causal_attention)),
}
"""Back ends, in order of preference; each takes the arguments of `causal_attention_parts`."""


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    scale: float,
    q_start: Int[Array, ""] | int = 0,
    implementation: Implementation = None,
) -> Float[Array, "B T N V"]:
    """Causal grouped-query attention of T queries over S keys and values.

    Query t stands at position `q_start + t` and sees the keys 0 to `q_start + t`, or all S where there are no more.
    There may be more queries than keys. Query head n reads KV head
    n // (N / K). Keys and values may differ in width. The softmax is float32.

    Args:
      q: queries.
      k: keys, with K dividing N.
      v: values.
      scale: multiplies the scores (the paper: 1/sqrt(H) of the expanded form).
      q_start: position of the first query, not negative; q_start + T less than 2**31.
      implementation: a name in `IMPLEMENTATIONS`, or a back end, or several to be tried in order; None: the first that
        takes the call.

    Returns:
      The attention output in the type of `q`.

    Raises:
      ValueError: shapes that do not belong together.
      NotImplementedError: the named implementation does not take these arguments.
    """
    if (
        k.shape[:3] != v.shape[:3]
        or q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
        or q.shape[2] % k.shape[2]
    ):
        raise ValueError(
            f"q [B,T,N,H], k [B,S,K,H], v [B,S,K,V] with K dividing N expected; got {q.shape=}, {k.shape=}, {v.shape=}."
        )
    b, t, n, h = q.shape
    heads = k.shape[2]
    parts = [(q.reshape(b, t, heads, n // heads, h), k)]
    keywords = {"scale": scale, "q_start": q_start}
    return dispatch("causal_attention", IMPLEMENTATIONS, implementation, parts, v, **keywords).reshape(
        b, t, n, -1
    )


def causal_attention_parts(
    parts: Parts,
    v: Float[Array, "B S L V"] | None,
    *,
    scale: float,
    q_start: Int[Array, ""] | int = 0,
    implementation: Implementation = None,
) -> Float[Array, "B T L M V"]:
    """Causal attention whose scores are a sum over parts of the key, each with its own queries.

    A rotary key that all heads share, or queries that all latent heads share, are passed only once, and values that
    are a part of the key, as latents are, not again.

    Args:
      parts: pairs of queries [B, T, heads, M, W] and keys [B, S, heads, W]. Of L heads, head l reads entry l mod
        `heads`, so that the heads of queries and keys divide L.
      v: values; None: the keys of the first part, which has L heads then.
      scale: multiplies the scores.
      q_start: position of the first query, see `causal_attention`.
      implementation: see `causal_attention`.

    Returns:
      The attention output in the type of the queries.

    Raises:
      ValueError: shapes that do not belong together.
      NotImplementedError: the named implementation does not take these arguments.
    """
    heads = heads_of(parts, v)
    b, t, _, m, _ = parts[0][0].shape
    s = parts[0][1].shape[1]
    for i, (q, k) in enumerate(parts):
        if (
            q.shape != (b, t, q.shape[2], m, k.shape[-1])
            or k.shape[:2] != (b, s)
            or heads % q.shape[2]
            or heads % k.shape[2]
        ):
            raise ValueError(
                f"Part {i}: queries [B={b},T={t},heads,M={m},W] and keys [B={b},S={s},heads,W] expected, heads "
                f"dividing L={heads}; got {q.shape=}, {k.shape=}."
            )
    if v is not None and v.shape[:2] != (b, s):
        raise ValueError(f"Values [B={b},S={s},L,V] expected; got {v.shape=}.")
    keywords = {"scale": scale, "q_start": q_start}
    return dispatch("causal_attention", IMPLEMENTATIONS, implementation, parts, v, **keywords)
