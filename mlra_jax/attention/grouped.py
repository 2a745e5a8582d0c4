"""Grouped-query attention: MHA (as many KV heads as query heads), GQA, MQA (one KV head), and MFA.

q     = W_q x                          or, in MFA,   W_q RMSNorm(W_qa x)
k, v  = W_k x, W_v x                   K heads
y_n   = softmax(rope(q_n) . rope(k_k) / sqrt(H), causal) v_k          k = n // M
out   = W_o concat_n(y_n)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx

from mlra_jax.attention.base import HEADS, ROWS, Attention, attend_own
from mlra_jax.attention.head_shards import HeadShards
from mlra_jax.attention.kv_cache import LayerCache
from mlra_jax.attention.output import Output
from mlra_jax.config import AttentionConfig, CacheArray, ModelConfig, NotNegative, Positive, uneven
from mlra_jax.model.layers import (
    DecodeLeaves,
    Relayout,
    RMSNorm,
    nested,
    product,
    rotary_frequencies,
    softmax_scale,
)
from mlra_jax.ops.attention import causal_attention
from mlra_jax.ops.decode import grouped_decode_attention
from mlra_jax.ops.rotary import rotate
from mlra_jax.sharding import AxisRules


@dataclasses.dataclass(frozen=True)
class GroupedAttentionConfig(AttentionConfig):
    """MHA (n_kv_heads = n_heads), GQA, MQA (n_kv_heads = 1), and MFA (n_kv_heads = 1, wide, with a low-rank query)."""

    n_kv_heads: Positive = 24
    """K: key-value heads; KV head k serves the contiguous query heads k*N/n_kv_heads onwards."""
    d_head: Positive = 128
    """H: width of a query, key and value head; all of it is rotary."""
    q_lora_rank: NotNegative = 0
    """A: width of the compressed, normalised input from which MFA projects queries; 0: they are projected from x."""

    @classmethod
    def module(cls) -> type[GroupedAttention]:
        return GroupedAttention

    def cached_heads(self, n_heads: int) -> int:
        return self.n_kv_heads

    def cache_arrays(self) -> dict[str, CacheArray]:
        return {"k": CacheArray(self.d_head), "v": CacheArray(self.d_head)}

    def train_flops(self, n_heads: int, keys: float) -> float:
        """2 * (H + H) for each query head and key."""
        return n_heads * 2 * 2 * self.d_head * keys

    def decode_flops(self, n_heads: int) -> int:
        """2 * (H + H) for each query head."""
        return 2 * n_heads * 2 * self.d_head

    def activation_bytes(self, n_heads: int, itemsize: int) -> int:
        return itemsize * (3 * n_heads * self.d_head + self.q_lora_rank)

    def share(self, cached_heads: int) -> Self:
        return dataclasses.replace(self, n_kv_heads=cached_heads)

    def conflicts(self) -> list[str]:
        return uneven(self, "d_head")


def attend_grouped(
    rules: AxisRules, heads_per_kv: int, q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float
) -> jax.Array:
    """Inside `shard_map`: causal attention of a device's own query heads and tokens.

    Args:
      rules: the training table.
      heads_per_kv: M, the query heads that read one KV head.
      q: [B, T, N, H], the device's own tokens and heads.
      k: [B, S, K, H], all tokens of the KV heads that the device's query heads read, or of all KV heads.
      v: [B, S, K, V], likewise.
      scale: multiplies the scores.

    Returns:
      [B, T, N, V].
    """
    n = q.shape[2]
    if k.shape[2] * heads_per_kv != n:
        # Query heads are split and KV heads are not: take one KV head for each run of heads that share it.
        run = math.gcd(n, heads_per_kv)
        read = (rules.axis_index("heads") * n + run * jnp.arange(n // run)) // heads_per_kv
        k, v = jnp.take(k, read, axis=2), jnp.take(v, read, axis=2)
    return attend_own(rules, functools.partial(causal_attention, k=k, v=v, scale=scale), q)


class GroupedAttention(Attention):
    """Attention of N query heads over K KV heads; KV head k serves the query heads kM to (k+1)M - 1, M = N / K.

    The training layout has w_q [D, N, H], w_k and w_v [D, K, H]; the decode layout w_q [N, H, D], and w_kv [2, U, H, D]
    with keys and values by KV-head shard. With a low-rank query, w_q has A in place of D, and there is w_qa [D, A], or
    [A, D] in the decode layout.
    """

    def build(self, rngs: nnx.Rngs) -> None:
        config, rules, layout = self.config, self.rules, self.layout
        a = config.attention
        assert isinstance(a, GroupedAttentionConfig)
        d, n, h, rank = config.d_model, config.n_heads, a.d_head, a.q_lora_rank
        self.softmax_scale = softmax_scale(config, h)
        self.frequencies = rotary_frequencies(config, h)
        new = functools.partial(self._parameter, rngs)
        q_in, q_axis = (rank, rules.fitting("rank", rank)) if rank else (d, "embed")
        self.q_norm = RMSNorm(config, (rank,), (None,), rngs=rngs, rules=rules) if rank else None
        if layout == "train":  # where tensor does not divide the KV heads, every device holds all of them
            self.kv_axis = rules.fitting("kv_heads", a.n_kv_heads)
            self.w_qa = new((d, rank), ("embed", None)) if rank else None
            self.w_q = new((q_in, n, h), (q_axis, "heads", None))
            self.w_k = new((d, a.n_kv_heads, h), ("embed", self.kv_axis, None))
            self.w_v = new((d, a.n_kv_heads, h), ("embed", self.kv_axis, None))
        else:
            self.kv_axis = "kv_head_shards"
            self.w_qa = new((rank, d), (None, "embed")) if rank else None
            self.w_q = new((n, h, q_in), ("heads", None, q_axis))
            self.w_kv = new((2, self.shards.count, h, d), (None, "kv_head_shards", None, "embed"))
        self.output = Output(config, h, rngs=rngs, rules=rules, layout=layout)

    @classmethod
    def decode_leaves(cls, config: ModelConfig, rules: AxisRules) -> DecodeLeaves:
        a = config.attention
        assert isinstance(a, GroupedAttentionConfig)
        shards = HeadShards.of(config, rules)
        by_shard = lambda w_DKH: shards.to_shards(w_DKH, axis=1).transpose(1, 2, 0)
        leaves = {
            "w_q": Relayout(("w_q",), lambda w_DNH: w_DNH.transpose(1, 2, 0)),
            "w_kv": Relayout(("w_k", "w_v"), lambda k, v: jnp.stack([by_shard(k), by_shard(v)])),
            **nested("output", Output.decode_leaves(config)),
        }
        if a.q_lora_rank:
            leaves["w_qa"] = Relayout(("w_qa",), jnp.transpose)
        return leaves

    def _project(self, x_BTD: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries [B, T, N, H], rotated keys and values [B, T, K, H]."""
        rules, dtype = self.rules, self.compute_dtype
        train = self.layout == "train"
        kv_names = ("batch", "length", self.kv_axis, None)
        project = lambda equation, x, w, names: product(rules, equation, x, w, out=names)
        q_in = x_BTD
        if self.q_norm is not None:
            q_BTA = project("BTD,DA->BTA" if train else "BTD,AD->BTA", x_BTD, self.w_qa, ROWS)
            q_in = self.q_norm(q_BTA).astype(dtype)
        if train:
            q = project("BTD,DNH->BTNH", q_in, self.w_q, HEADS)
            k, v = (project("BTD,DNH->BTNH", x_BTD, w, kv_names) for w in (self.w_k, self.w_v))
        else:
            q = project("BTD,NHD->BTNH", q_in, self.w_q, HEADS)
            k, v = project("BTD,ZUHD->ZBTUH", x_BTD, self.w_kv, (None, *kv_names))
        return rotate(q, positions, self.frequencies), rotate(k, positions, self.frequencies), v

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        self.require_layout("train")
        x_BTD = x_BTD.astype(self.compute_dtype)
        q, k, v = self._project(x_BTD, self.rules.positions(x_BTD.shape[1]))
        kv = ("batch", "length", self.kv_axis, None)
        return self.output(x_BTD, self.rules.shard_map(self._attend, (HEADS, kv, kv), HEADS)(q, k, v))

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = self.rules.all_tokens(k), self.rules.all_tokens(v)
        return attend_grouped(self.rules, self.shards.heads_per_latent, q, k, v, scale=self.softmax_scale)

    def _project_new(
        self, x_BTD: jax.Array, positions_BT: jax.Array
    ) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        q, k, v = self._project(x_BTD, positions_BT)
        return [q], {"k": k, "v": v}

    def _attend_shards(
        self, cache: LayerCache, visible_BT: jax.Array, queries: list[jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        [q], k, v = queries, cache["k"], cache["v"]
        return grouped_decode_attention(q, k, v, visible_BT, scale=self.softmax_scale, layout=cache.layout)
