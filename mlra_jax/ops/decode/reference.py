"""The specification of decode attention: short, float32 softmax, no tiling."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mlra_jax.ops.columns import Columns, unpack
from mlra_jax.ops.rotary import apply_rope

Cached = jax.Array | Columns
"""A cached array [P, L or 1, S, W], whose last two axes may be swapped, or columns of a buffer in its place."""

Parts = Sequence[tuple[jax.Array, Cached]]
"""Queries [B, T, G, M, W or more] and keys [P, L or 1, S, W] of each part of the key; scores are the sum over parts."""

Rotary = tuple[jax.Array, jax.Array]
"""Cosines and sines [B, T, R/2] of the queries' positions."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What every back end of decode attention is called with.

    Attributes:
      parts: of the key, with queries. Of G heads of queries, G a divisor of L, head l reads entry l mod G. Queries may
        be wider than keys: the last features count. All heads share a key with one head.
      v: values [P, L, S, V]; None: the keys of the first part.
      kv_len: how many of the leading tokens each query sees [B, T]; any integers. What no query sees may hold anything.
      scale: multiplies the scores.
      rotary: rotates the queries of the last part; None: they have been.
      page_table: pages of each row [B, N]; None: page b is row b.
      layout: of keys and values: `token_major` as above, or `feature_major` with the last two axes swapped.
    """

    parts: Parts
    v: jax.Array | None
    kv_len: jax.Array
    scale: float
    rotary: Rotary | None = None
    page_table: jax.Array | None = None
    layout: str = "token_major"

    @property
    def cached(self) -> tuple[Cached, ...]:
        """Keys of each part, and the values if they are not the first of these."""
        return (*(k for _, k in self.parts), *(() if self.v is None else (self.v,)))

    def with_cached(self, cached: Sequence[Any]) -> Arguments:
        """The same with other arrays in place of `cached`."""
        parts = [(q, k) for (q, _), k in zip(self.parts, cached, strict=False)]
        return dataclasses.replace(self, parts=parts, v=None if self.v is None else cached[-1])

    @property
    def score_shape(self) -> tuple[int, ...]:
        """[B, T, L, M]: of the scores of a token."""
        b, t, _, m, _ = self.parts[0][0].shape
        return b, t, (self.parts[0][1] if self.v is None else self.v).shape[1], m

    def rotated(self) -> Arguments:
        """The same with the last part's queries rotated."""
        if self.rotary is None:
            return self
        *first, (q, k) = self.parts
        cos, sin = (x[:, :, None, None] for x in self.rotary)
        q = q[..., -token_major(k, self.layout).shape[-1] :]
        return dataclasses.replace(self, parts=[*first, (apply_rope(q, cos, sin), k)], rotary=None)

    def expanded(self) -> Arguments:
        """The same with queries [B, T, L, M, W]: for every head, as wide as the keys, rotated."""
        rotated, heads = self.rotated(), self.score_shape[2]
        width = lambda k: token_major(k, self.layout).shape[-1]
        expand = lambda q, k: jnp.tile(q[..., -width(k) :], (1, 1, heads // q.shape[2], 1, 1))
        return dataclasses.replace(rotated, parts=[(expand(q, k), k) for q, k in rotated.parts])


@dataclasses.dataclass(frozen=True)
class FactoredArguments:
    """What every back end of factored decode attention is called with.

    Attributes:
      q: queries [B, T, K, M, H].
      cached: factors a_k [P, K, S, r], b_k [P, 1, S, r * H], a_v [P, K, S, r'], b_v [P, 1, S, r' * V].
      kv_len: see `Arguments`, and the same for `scale`, `page_table` and `layout`.
    """

    q: jax.Array
    cached: Sequence[jax.Array]
    kv_len: jax.Array
    scale: float
    page_table: jax.Array | None = None
    layout: str = "token_major"

    def with_cached(self, cached: Sequence[Any]) -> FactoredArguments:
        """The same with other factors."""
        return dataclasses.replace(self, cached=cached)

    @property
    def score_shape(self) -> tuple[int, ...]:
        """[B, T, K, M, r]: of the terms of a token's scores."""
        ranks = (token_major(x, self.layout).shape[-1] for x in (self.cached[0], self.cached[2]))
        return *self.q.shape[:-1], max(ranks)


def token_major(k: Any, layout: str) -> Any:
    """A cached array as [P, L, S, W], whatever its layout; columns are that already."""
    return k.swapaxes(-1, -2) if layout == "feature_major" else k


def gather_pages(k_PLSW: Cached, page_table_BN: jax.Array | None) -> jax.Array:
    """The tokens of each row in order, [B, L, N * S, W], from the pages that hold them."""
    if isinstance(k_PLSW, Columns):
        buffer = k_PLSW.array
        if page_table_BN is not None:  # before it is cut into columns: the rest of the buffer is not touched
            pages = jnp.take(buffer, page_table_BN, axis=0, mode="clip")
            buffer = pages.reshape(len(page_table_BN), -1, *buffer.shape[2:])
        return unpack(k_PLSW.of(buffer))
    if page_table_BN is None:
        return k_PLSW
    # What a table holds past a row's end may be no page at all; it is not seen.
    k_BNLSW = jnp.take(k_PLSW, page_table_BN, axis=0, mode="clip")
    b, n, heads, s, w = k_BNLSW.shape
    return k_BNLSW.swapaxes(1, 2).reshape(b, heads, n * s, w)


def decode_attention(args: Arguments, kv_start: jax.Array | int = 0) -> tuple[jax.Array, jax.Array]:
    """Attention whose scores are a sum over parts of the key, each with its own query.

    Args:
      args: queries and cache.
      kv_start: first token that is seen.

    Returns:
      Output [B, T, L, M, V] in the type of the first query, zeros where nothing is seen, and the log-sum-exp of the
      scaled scores [B, T, L, M] in float32, -inf where nothing is seen.
    """
    args = args.expanded()
    rows = lambda k: gather_pages(token_major(k, args.layout), args.page_table)
    parts = [(q, rows(k)) for q, k in args.parts]
    v_BLSV = parts[0][1] if args.v is None else rows(args.v)
    heads = v_BLSV.shape[1]
    scores = jnp.zeros((), jnp.float32)
    for q_BTLMW, k in parts:
        k_BLSW = jnp.broadcast_to(k, (k.shape[0], heads, *k.shape[2:]))
        scores = scores + jnp.einsum("BTLMW,BLSW->BTLMS", q_BTLMW, k_BLSW, preferred_element_type=jnp.float32)
    p, total, lse = masked_softmax(scores * args.scale, args.kv_len, kv_start)
    v_BLSV = blank_unseen(v_BLSV, args.kv_len)
    # Batch axes first: einsum would make of "->BTLMV" a bfloat16 product that XLA lacks on the CPU.
    out = jnp.einsum("BTLMS,BLSV->BLTMV", p.astype(v_BLSV.dtype), v_BLSV, preferred_element_type=jnp.float32)
    out = out.swapaxes(1, 2) / jnp.where(total > 0, total, 1.0)[..., None]
    return out.astype(parts[0][0].dtype), lse


def masked_softmax(
    scores_BTLMS: jax.Array, kv_len_BT: jax.Array, kv_start: jax.Array | int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Exponentials of the visible scores below their maximum, 0 elsewhere; their sum; the scores' log-sum-exp."""
    token = jnp.arange(scores_BTLMS.shape[-1])
    visible = (token >= kv_start) & (token < kv_len_BT[..., None])  # [B, T, S]
    visible = visible[:, :, None, None, :]
    scores = jnp.where(visible, scores_BTLMS, -jnp.inf)
    top = scores.max(axis=-1, keepdims=True)
    p = jnp.where(visible, jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
    total = p.sum(axis=-1)
    return p, total, jnp.where(total > 0, jnp.log(total) + top[..., 0], -jnp.inf)


def blank_unseen(v_BLSV: jax.Array, kv_len_BT: jax.Array) -> jax.Array:
    """The values, zeros where no query of the row sees them: 0 * NaN is NaN."""
    seen_BS = jnp.arange(v_BLSV.shape[2]) < kv_len_BT.max(axis=1)[:, None]
    return jnp.where(seen_BS[:, None, :, None], v_BLSV, 0)


def factored_decode_attention(
    args: FactoredArguments, kv_start: jax.Array | int = 0
) -> tuple[jax.Array, jax.Array]:
    """Attention over keys and values that are sums of r products of a factor by head and one that all heads share.

    Args:
      args: queries and cache.
      kv_start: first token that is seen.

    Returns:
      As `decode_attention`: output [B, T, K, M, V] and log-sum-exp [B, T, K, M].
    """
    a_k, b_k, a_v, b_v = (gather_pages(token_major(x, args.layout), args.page_table) for x in args.cached)
    by_factor = lambda b, a: b.reshape(b.shape[0], b.shape[2], a.shape[-1], -1)  # [B, S, r, H]
    product = lambda equation, *xs: jnp.einsum(equation, *xs, preferred_element_type=jnp.float32)
    # Batch axes first, as above.
    dots_BTKMSr = product("BTKMH,BSrH->BTKMSr", args.q, by_factor(b_k, a_k))
    scores = jnp.einsum("BTKMSr,BKSr->BTKMS", dots_BTKMSr, a_k.astype(jnp.float32))
    p, total, lse = masked_softmax(scores * args.scale, args.kv_len, kv_start)
    a_v, b_v = blank_unseen(a_v, args.kv_len), blank_unseen(b_v, args.kv_len)
    p_BTKMSr = jnp.einsum("BTKMS,BKSr->BTKMSr", p, a_v.astype(jnp.float32))
    out = product("BTKMSr,BSrV->BTKMV", p_BTKMSr.astype(b_v.dtype), by_factor(b_v, a_v))
    return (out / jnp.where(total > 0, total, 1.0)[..., None]).astype(args.q.dtype), lse
