"""Tensor product attention (TPA): queries, keys and values are products of factors; the cache holds those of K and V.

A_q, B_q    = W_Aq x, W_Bq x                           q_rank factors for each head, and q_rank of width H
A_k, B_k    = W_Ak x, W_Bk x                           the same with rank; A_v, B_v likewise
q_n         = 1/q_rank * sum over r of A_q,n,r rope(B_q,r)
k_n, v_n    = 1/rank * sum over r of A_k,n,r rope(B_k,r),      1/rank * sum over r of A_v,n,r B_v,r
y_n         = softmax(q_n . k_n / sqrt(H), causal) v_n
out         = W_o concat_n(y_n)

Source: Zhang et al., Tensor Product Attention Is All You Need, 2025.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mlra_jax.attention.base import HEADS, Attention, attend_own
from mlra_jax.attention.head_shards import HeadShards
from mlra_jax.attention.kv_cache import LayerCache
from mlra_jax.attention.output import Output
from mlra_jax.config import AttentionConfig, CacheArray, ModelConfig, Positive, uneven
from mlra_jax.model.layers import (
    DecodeLeaves,
    Relayout,
    nested,
    parameter,
    product,
    rotary_frequencies,
    softmax_scale,
    uniform,
)
from mlra_jax.ops.attention import causal_attention
from mlra_jax.ops.decode import factored_decode_attention
from mlra_jax.ops.rotary import rotate
from mlra_jax.sharding import AxisRules


@dataclasses.dataclass(frozen=True)
class TensorProductAttentionConfig(AttentionConfig):
    """TPA: queries, keys and values of all heads are sums of a few products of a head factor and a width factor."""

    rank: Positive = 2
    """Number of products that are summed to make keys, and values; their factors are cached."""
    q_rank: Positive = 6
    """Number of products that are summed to make queries."""
    d_head: Positive = 128
    """H: width of a query, key and value head; all of it is rotary."""

    cached_heads_field: ClassVar[str] = "n_heads"

    @classmethod
    def module(cls) -> type[TensorProductAttention]:
        return TensorProductAttention

    def cached_heads(self, n_heads: int) -> int:
        return n_heads

    def cache_arrays(self) -> dict[str, CacheArray]:
        by_head, shared = CacheArray(self.rank), CacheArray(self.rank * self.d_head, by_head=False)
        return {"a_k": by_head, "b_k": shared, "a_v": by_head, "b_v": shared}

    def train_flops(self, n_heads: int, keys: float) -> float:
        """2 * (H + H) for each query head and key, and 2 * H for each factor of each head."""
        return n_heads * (2 * 2 * self.d_head * keys + 2 * (self.q_rank + 2 * self.rank) * self.d_head)

    def decode_flops(self, n_heads: int) -> int:
        """2 * 2 * rank * (H + 1) for each query head."""
        return 2 * n_heads * 2 * self.rank * (self.d_head + 1)

    def activation_bytes(self, n_heads: int, itemsize: int) -> int:
        factors = self.q_rank + 2 * self.rank
        return itemsize * (3 * n_heads * self.d_head + factors * (n_heads + self.d_head))

    def conflicts(self) -> list[str]:
        return uneven(self, "d_head")


class TensorProductAttention(Attention):
    """Attention of N query heads whose own keys and values are sums of a few products of factors.

    Decoding never builds keys or values of cached tokens: scores are sums over r of A_k,n,r (q_n . B_k,r), and values
    likewise (`ops.decode.factored_decode_attention`). The cached heads are the query heads.

    The training layout has w_a* [D, N, r] and w_b* [D, r, H] for each of q, k and v with r factors; the decode layout
    w_aq [N, r, D], w_akv [2, U, r, D] with w_ak and w_av by KV-head shard, and w_b [sum of r, H, D] with all w_b*.
    """

    def build(self, rngs: nnx.Rngs) -> None:
        config, rules, layout = self.config, self.rules, self.layout
        a = config.attention
        assert isinstance(a, TensorProductAttentionConfig)
        self.sizes = a
        d, n, h = config.d_model, config.n_heads, a.d_head
        self.softmax_scale = softmax_scale(config, h)
        self.frequencies = rotary_frequencies(config, h)

        def new(shape: tuple[int, ...], names: tuple[str | None, ...], fan: int) -> nnx.Param:
            # Glorot's bound for an array [D, fan axes], as in the official code.
            init = uniform(math.sqrt(6 / fan))
            return parameter(rngs, rules, shape, names, init, config.param_dtype, layout)

        by_head = lambda r: new((d, n, r), ("embed", "heads", None), n * r + d * r)
        by_width = lambda r: new((d, r, h), ("embed", None, None), r * h + d * h)
        if layout == "train":
            self.w_aq, self.w_ak, self.w_av = by_head(a.q_rank), by_head(a.rank), by_head(a.rank)
            self.w_bq, self.w_bk, self.w_bv = by_width(a.q_rank), by_width(a.rank), by_width(a.rank)
        else:
            fan = n * a.rank + d * a.rank
            self.w_aq = new((n, a.q_rank, d), ("heads", None, "embed"), n * a.q_rank + d * a.q_rank)
            kv = (2, self.shards.count, a.rank, d), (None, "kv_head_shards", None, "embed")
            self.w_akv = new(*kv, fan)
            self.w_b = new((a.q_rank + 2 * a.rank, h, d), (None, None, "embed"), a.rank * h + d * h)
        self.output = Output(config, h, rngs=rngs, rules=rules, layout=layout)

    @classmethod
    def decode_leaves(cls, config: ModelConfig, rules: AxisRules) -> DecodeLeaves:
        shards = HeadShards.of(config, rules)
        last = lambda w: w.transpose(1, 2, 0)  # D, which products sum over
        by_shard = lambda w_DNr: last(shards.to_shards(w_DNr, axis=1))
        return {
            "w_aq": Relayout(("w_aq",), last),
            "w_akv": Relayout(("w_ak", "w_av"), lambda k, v: jnp.stack([by_shard(k), by_shard(v)])),
            "w_b": Relayout(("w_bq", "w_bk", "w_bv"), lambda *ws: jnp.concatenate([last(w) for w in ws])),
            **nested("output", Output.decode_leaves(config)),
        }

    def _project(
        self, x_BTD: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
        """The rotated q [B, T, N, H], and A_k, rotated B_k, A_v, B_v: [B, T, N (or U), r] and [B, T, r, H].

        The head factors are already divided by the number of products.
        """
        rules, rotated = self.rules, lambda b: rotate(b, positions, self.frequencies)
        q_rank, rank = self.sizes.q_rank, self.sizes.rank
        whole = ("batch", "length", None, None)
        project = lambda equation, w, names: product(rules, equation, x_BTD, w, out=names)
        if self.layout == "train":
            by_head = lambda w: project("BTD,DNr->BTNr", w, HEADS)
            by_width = lambda w: project("BTD,DrH->BTrH", w, whole)
            a_q, a_k, a_v = map(by_head, (self.w_aq, self.w_ak, self.w_av))
            b_q, b_k, b_v = map(by_width, (self.w_bq, self.w_bk, self.w_bv))
        else:
            a_q = project("BTD,NrD->BTNr", self.w_aq, HEADS)
            kv_names = (None, "batch", "length", "kv_head_shards", None)
            a_k, a_v = project("BTD,ZUrD->ZBTUr", self.w_akv, kv_names)
            b = project("BTD,rHD->BTrH", self.w_b, whole)
            b_q, b_k, b_v = jnp.split(b, [q_rank, q_rank + rank], axis=2)
        q = rules.einsum("BTNr,BTrH->BTNH", a_q / q_rank, rotated(b_q), out=HEADS)
        return q, a_k / rank, rotated(b_k), a_v / rank, b_v

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        self.require_layout("train")
        x_BTD = x_BTD.astype(self.compute_dtype)
        inputs = self._project(x_BTD, self.rules.positions(x_BTD.shape[1]))
        b = ("batch", "length", None, None)
        attend = self.rules.shard_map(self._attend, (HEADS, HEADS, b, HEADS, b), HEADS)
        return self.output(x_BTD, attend(*inputs))

    def _attend(
        self, q: jax.Array, a_k: jax.Array, b_k: jax.Array, a_v: jax.Array, b_v: jax.Array
    ) -> jax.Array:
        a_k, b_k, a_v, b_v = map(self.rules.all_tokens, (a_k, b_k, a_v, b_v))
        k, v = (jnp.einsum("BSNr,BSrH->BSNH", a, b) for a, b in ((a_k, b_k), (a_v, b_v)))
        return attend_own(
            self.rules, functools.partial(causal_attention, k=k, v=v, scale=self.softmax_scale), q
        )

    def _project_new(
        self, x_BTD: jax.Array, positions_BT: jax.Array
    ) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        q, a_k, b_k, a_v, b_v = self._project(x_BTD, positions_BT)
        b_k, b_v = (b.reshape(*b.shape[:2], -1) for b in (b_k, b_v))
        return [q], {"a_k": a_k, "b_k": b_k, "a_v": a_v, "b_v": b_v}

    def _attend_shards(
        self, cache: LayerCache, visible_BT: jax.Array, queries: list[jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        [q] = queries
        a_k, b_k, a_v, b_v = (cache[name] for name in ("a_k", "b_k", "a_v", "b_v"))
        return factored_decode_attention(
            q, a_k, b_k, a_v, b_v, visible_BT, scale=self.softmax_scale, layout=cache.layout
        )
