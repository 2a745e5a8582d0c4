"""The public op: causal attention, grouped heads, values narrower than keys."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float, Int

from mlra_jax.ops.attention import reference, splash, xla
from mlra_jax.ops.dispatch import dispatch

IMPLEMENTATIONS = {
    "splash": splash.causal_attention,
    "xla": xla.causal_attention,
    "reference": reference.causal_attention,
}
"""Best first; each takes what `reference.causal_attention` takes, or declines."""


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    scale: float,
    q_start: Int[Array, ""] | int = 0,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B T N V"]:
    """Causal grouped-query attention of T queries over S keys and values.

    Query t stands at position `q_start + t` and sees the keys 0 to `q_start + t`. Query head n reads KV head
    n // (N / K). Keys and values may differ in width. The softmax is float32.

    Args:
      q: queries.
      k: keys, with K dividing N.
      v: values.
      scale: multiplies the scores (the paper: 1/sqrt(H) of the expanded form).
      q_start: position of the first query.
      implementation: None (the first that takes the arguments), or one name or several of `IMPLEMENTATIONS`.

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
    return dispatch(
        "causal_attention",
        IMPLEMENTATIONS,
        implementation,
        q,
        k,
        v,
        scale=scale,
        q_start=q_start,
    )
