"""The specification of decode attention: short, float32 softmax, no tiling."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mlra_jax.ops.rotary import apply_rope

Parts = Sequence[tuple[jax.Array, jax.Array]]
"""Queries [B, T, L, M, W] with keys [P, L, S, W], or [P, 1, S, W] where all heads share them; scores are their sum.

`unabridged` allows shorter ways to give queries.
"""

Rotary = tuple[jax.Array, jax.Array]
"""Cosines and sines [B, T, R/2] of the queries' positions."""


def unabridged(attend: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., Any]:
    """An implementation of plain queries as one that takes shorter ways to give them.

    A part's queries may have a divisor of the L heads: head l reads entry l modulo that. They may be wider than the
    keys: their last features count. And with `rotary` those of the last part are turned first.
    """

    @functools.wraps(attend)
    def call(
        parts: Parts, v: jax.Array | None, *args: Any, rotary: Rotary | None = None, **keywords: Any
    ) -> tuple[jax.Array, jax.Array]:
        layout = keywords.get("layout", "token_major")
        heads = (parts[0][1] if v is None else v).shape[1]
        plain = [(q[..., -token_major(k, layout).shape[-1] :], k) for q, k in parts]
        if rotary is not None:
            q, k = plain[-1]
            plain[-1] = apply_rope(q, *(x[:, :, None, None] for x in rotary)), k
        whole = lambda q: jnp.tile(q, (1, 1, heads // q.shape[2], 1, 1))
        return attend([(whole(q), k) for q, k in plain], v, *args, **keywords)

    return call


def token_major(k: jax.Array, layout: str) -> jax.Array:
    """A cached array as [P, L, S, W], whatever its layout."""
    return k.swapaxes(-1, -2) if layout == "feature_major" else k


def gather_pages(k_PLSW: jax.Array, page_table_BN: jax.Array | None) -> jax.Array:
    """The tokens of each row in order, [B, L, N * S, W], from the pages that hold them."""
    if page_table_BN is None:
        return k_PLSW
    # What a table holds past a row's end may be no page at all; it is not seen.
    k_BNLSW = jnp.take(k_PLSW, page_table_BN, axis=0, mode="clip")
    b, n, heads, s, w = k_BNLSW.shape
    return k_BNLSW.swapaxes(1, 2).reshape(b, heads, n * s, w)


@unabridged
def decode_attention(
    parts: Parts,
    v: jax.Array | None,
    kv_len_BT: jax.Array,
    *,
    scale: float,
    page_table: jax.Array | None = None,
    layout: str = "token_major",
    kv_start: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Attention whose scores are a sum over parts of the key, each with its own query.

    Args:
      parts: pairs of queries and keys.
      v: values [P, L, S, V]; None: the keys of the first part.
      kv_len_BT: how many of the leading tokens each query sees; any integers. Slots that no query sees may hold
        anything.
      scale: multiplies the scores.
      page_table: pages of each row [B, N]; None: page b is row b.
      layout: of keys and values: `token_major` as above, or `feature_major` with the last two axes swapped.
      kv_start: first token that is seen.

    Returns:
      Output [B, T, L, M, V] in the type of the first query, zeros where nothing is seen, and the log-sum-exp of the
      scaled scores [B, T, L, M] in float32, -inf where nothing is seen.
    """
    rows = lambda k: gather_pages(token_major(k, layout), page_table)
    parts = [(q, rows(k)) for q, k in parts]
    v_BLSV = parts[0][1] if v is None else rows(v)
    heads = v_BLSV.shape[1]
    scores = jnp.zeros((), jnp.float32)
    for q_BTLMW, k in parts:
        k_BLSW = jnp.broadcast_to(k, (k.shape[0], heads, *k.shape[2:]))
        scores = scores + jnp.einsum("BTLMW,BLSW->BTLMS", q_BTLMW, k_BLSW, preferred_element_type=jnp.float32)
    p, total, lse = masked_softmax(scores * scale, kv_len_BT, kv_start)
    v_BLSV = written(v_BLSV, kv_len_BT)
    # Batch axes first: einsum would make of "->BTLMV" a bfloat16 product that XLA lacks on the CPU.
    out = jnp.einsum("BTLMS,BLSV->BLTMV", p.astype(v_BLSV.dtype), v_BLSV, preferred_element_type=jnp.float32)
    out = out.swapaxes(1, 2) / jnp.where(total > 0, total, 1.0)[..., None]
    return out.astype(parts[0][0].dtype), lse


def masked_softmax(
    scores_BTLMS: jax.Array, kv_len_BT: jax.Array, kv_start: jax.Array | int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Exponentials of the visible scores below their maximum, 0 elsewhere; their sum; the scores' log-sum-exp."""
    slots = jnp.arange(scores_BTLMS.shape[-1])
    visible = (slots >= kv_start) & (slots < kv_len_BT[..., None])  # [B, T, S]
    visible = visible[:, :, None, None, :]
    scores = jnp.where(visible, scores_BTLMS, -jnp.inf)
    top = scores.max(axis=-1, keepdims=True)
    p = jnp.where(visible, jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
    total = p.sum(axis=-1)
    return p, total, jnp.where(total > 0, jnp.log(total) + top[..., 0], -jnp.inf)


def written(v_BLSV: jax.Array, kv_len_BT: jax.Array) -> jax.Array:
    """The values, zeros where no query of the row sees them: 0 * NaN is NaN."""
    seen_BS = jnp.arange(v_BLSV.shape[2]) < kv_len_BT.max(axis=1)[:, None]
    return jnp.where(seen_BS[:, None, :, None], v_BLSV, 0)


def factored_decode_attention(
    q_BTKMH: jax.Array,
    factors: Sequence[jax.Array],
    kv_len_BT: jax.Array,
    *,
    scale: float,
    page_table: jax.Array | None = None,
    layout: str = "token_major",
    kv_start: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Attention over keys and values that are sums of r products of a factor by head and one that all heads share.

    Args:
      q_BTKMH: queries.
      factors: a_k [P, K, S, r], b_k [P, 1, S, r * H], a_v [P, K, S, r'], b_v [P, 1, S, r' * V].
      kv_len_BT: see `decode_attention`.
      scale: multiplies the scores.
      page_table: see `decode_attention`.
      layout: see `decode_attention`.
      kv_start: first token that is seen.

    Returns:
      As `decode_attention`: output [B, T, K, M, V] and log-sum-exp [B, T, K, M].
    """
    a_k, b_k, a_v, b_v = (gather_pages(token_major(x, layout), page_table) for x in factors)
    by_factor = lambda b, a: b.reshape(b.shape[0], b.shape[2], a.shape[-1], -1)  # [B, S, r, H]
    product = lambda equation, *xs: jnp.einsum(equation, *xs, preferred_element_type=jnp.float32)
    # Batch axes first, as above.
    dots_BTKMSr = product("BTKMH,BSrH->BTKMSr", q_BTKMH, by_factor(b_k, a_k))
    scores = jnp.einsum("BTKMSr,BKSr->BTKMS", dots_BTKMSr, a_k.astype(jnp.float32))
    p, total, lse = masked_softmax(scores * scale, kv_len_BT, kv_start)
    a_v, b_v = written(a_v, kv_len_BT), written(b_v, kv_len_BT)
    p_BTKMSr = jnp.einsum("BTKMS,BKSr->BTKMSr", p, a_v.astype(jnp.float32))
    out = product("BTKMSr,BSrV->BTKMV", p_BTKMSr.astype(b_v.dtype), by_factor(b_v, a_v))
    return (out / jnp.where(total > 0, total, 1.0)[..., None]).astype(q_BTKMH.dtype), lse
