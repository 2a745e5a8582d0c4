"""Grouped-tied attention (GTA): a KV head is cached once, for keys and values (Zadouri, Strauss and Dao, 2025).

q           = W_q x                                    N heads of [q_nope | q_rope], each half H wide
kv          = W_kv x                                   K heads of [tied half | value half]
k_rope      = rope(W_kr x)                             one for all heads, half a head wide
k_k, v_k    = [tied half ; k_rope], [tied half ; value half]
y_n         = softmax([q_nope_n ; rope(q_rope_n)] . k_k / sqrt(H), causal) v_k          k = n // M
out         = W_o concat_n(y_n)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from mlra_jax.attention.base import HEADS, Attention
from mlra_jax.attention.grouped import attend_grouped
from mlra_jax.attention.head_shards import HeadShards
from mlra_jax.attention.kv_cache import LayerCache
from mlra_jax.attention.output import Output
from mlra_jax.config import AttentionConfig, CacheArray, ModelConfig, Positive, uneven
from mlra_jax.model.layers import DecodeLeaves, Relayout, nested, product, rotary_frequencies, softmax_scale
from mlra_jax.ops.decode import latent_decode_attention
from mlra_jax.ops.rotary import rotate
from mlra_jax.sharding import AxisRules


@dataclasses.dataclass(frozen=True)
class TiedAttentionConfig(AttentionConfig):
    """GTA: the first half of a KV head is key and value at once; all heads share the rotary half of the key."""

    n_tied_heads: Positive = 6
    """K: key-value heads; head k serves the contiguous query heads k*N/n_tied_heads onwards."""
    d_head: Positive = 128
    """H: width of a query, key and value head; the second half of query and key is rotary."""

    cached_heads_field: ClassVar[str] = "attention.n_tied_heads"

    @classmethod
    def module(cls) -> type[TiedAttention]:
        return TiedAttention

    @property
    def d_rope(self) -> int:
        """R: width of the rotary half."""
        return self.d_head // 2

    def cached_heads(self, n_heads: int) -> int:
        return self.n_tied_heads

    def cache_arrays(self) -> dict[str, CacheArray]:
        return {"kv_latent": CacheArray(self.d_head), "k_rope": CacheArray(self.d_rope, by_head=False)}

    def train_flops(self, n_heads: int, keys: float) -> float:
        """2 * (H + H) for each query head and key."""
        return n_heads * 2 * 2 * self.d_head * keys

    def decode_flops(self, n_heads: int) -> int:
        """2 * (H + R + H) for each query head: queries are as wide as the cached arrays."""
        return 2 * n_heads * (2 * self.d_head + self.d_rope)

    def activation_bytes(self, n_heads: int, itemsize: int) -> int:
        return itemsize * n_heads * (3 * self.d_head + self.d_rope)

    def share(self, cached_heads: int) -> Self:
        return dataclasses.replace(self, n_tied_heads=cached_heads)

    def conflicts(self) -> list[str]:
        return uneven(self, "d_head", 4)


class TiedAttention(Attention):
    """Attention of N query heads over K tied KV heads; head k serves the query heads kM to (k+1)M - 1, M = N / K.

    A tied KV head is a latent head whose first half is the key's content and which as a whole is the value. So decoding
    is absorbed latent attention over [tied half | value half] without absorption: queries are zero on the value half.

    The training layout has w_q [D, N, H], w_kv [D, K, H] and w_kr [D, R], R = H / 2; the decode layout w_q [N, H, D],
    w_kv by KV-head shard [U, H, D], and w_kr [R, D].
    """

    def build(self, rngs: nnx.Rngs) -> None:
        config, rules, layout = self.config, self.rules, self.layout
        a = config.attention
        assert isinstance(a, TiedAttentionConfig)
        d, n, h = config.d_model, config.n_heads, a.d_head
        self.d_rope = a.d_rope
        self.softmax_scale = softmax_scale(config, h)
        self.frequencies = rotary_frequencies(config, a.d_rope)
        new = functools.partial(self._parameter, rngs)
        if layout == "train":  # where tensor does not divide the KV heads, every device holds all of them
            self.kv_axis = rules.fitting("kv_heads", a.n_tied_heads)
            self.w_q = new((d, n, h), ("embed", "heads", None))
            self.w_kv = new((d, a.n_tied_heads, h), ("embed", self.kv_axis, None))
            self.w_kr = new((d, a.d_rope), ("embed", None))
        else:
            self.kv_axis = "kv_head_shards"
            self.w_q = new((n, h, d), ("heads", None, "embed"))
            self.w_kv = new((self.shards.count, h, d), ("kv_head_shards", None, "embed"))
            self.w_kr = new((a.d_rope, d), (None, "embed"))
        self.output = Output(config, h, rngs=rngs, rules=rules, layout=layout)

    @classmethod
    def decode_leaves(cls, config: ModelConfig, rules: AxisRules) -> DecodeLeaves:
        shards = HeadShards.of(config, rules)
        return {
            "w_q": Relayout(("w_q",), lambda w_DNH: w_DNH.transpose(1, 2, 0)),
            "w_kv": Relayout(("w_kv",), lambda w_DKH: shards.to_shards(w_DKH, axis=1).transpose(1, 2, 0)),
            "w_kr": Relayout(("w_kr",), jnp.transpose),
            **nested("output", Output.decode_leaves(config)),
        }

    def _project(
        self, x_BTD: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """q_nope and rotated q_rope [B, T, N, R], kv [B, T, K (or U), H], rotated k_rope [B, T, R]."""
        rules, r = self.rules, self.d_rope
        row = ("batch", "length")

        def project(w: nnx.Param, axes: str, *names: str | None) -> jax.Array:
            equation = f"BTD,{f'D{axes}' if self.layout == 'train' else f'{axes}D'}->BT{axes}"
            return product(rules, equation, x_BTD, w, out=(*row, *names))

        q = project(self.w_q, "NH", "heads", None)
        kv = project(self.w_kv, "KH", self.kv_axis, None)
        k_rope = project(self.w_kr, "R", None)
        rotated = lambda x: rotate(x, positions, self.frequencies)
        return q[..., :r], rotated(q[..., r:]), kv, rotated(k_rope)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        self.require_layout("train")
        x_BTD = x_BTD.astype(self.compute_dtype)
        inputs = self._project(x_BTD, self.rules.positions(x_BTD.shape[1]))
        row = ("batch", "length")
        in_names = (HEADS, HEADS, (*row, self.kv_axis, None), (*row, None))
        return self.output(x_BTD, self.rules.shard_map(self._attend, in_names, HEADS)(*inputs))

    def _attend(self, q_nope: jax.Array, q_rope: jax.Array, kv: jax.Array, k_rope: jax.Array) -> jax.Array:
        kv, k_rope, r = self.rules.all_tokens(kv), self.rules.all_tokens(k_rope), k_rope.shape[-1]
        k_rope_BSKR = jnp.broadcast_to(k_rope[:, :, None], (*kv.shape[:3], r))
        return attend_grouped(
            self.rules,
            self.shards.heads_per_latent,
            jnp.concatenate([q_nope, q_rope], axis=-1),
            jnp.concatenate([kv[..., :r], k_rope_BSKR], axis=-1),
            kv,
            scale=self.softmax_scale,
        )

    def _project_new(
        self, x_BTD: jax.Array, positions_BT: jax.Array
    ) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        q_nope, q_rope, kv, k_rope = self._project(x_BTD, positions_BT)
        q_nope = jnp.pad(q_nope, [(0, 0)] * 3 + [(0, kv.shape[-1] - q_nope.shape[-1])])
        return [q_nope, q_rope], {"kv_latent": kv, "k_rope": k_rope}

    def _attend_shards(
        self, cache: LayerCache, visible_BT: jax.Array, queries: list[jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        q_nope, q_rope = queries
        kv_latent, k_rope = cache["kv_latent"], cache["k_rope"]
        return latent_decode_attention(
            q_nope, q_rope, kv_latent, k_rope, visible_BT, scale=self.softmax_scale, layout=cache.layout
        )
