"""Grouped-tied attention (GTA): a KV head is cached once, for keys and values (Zadouri, Strauss and Dao, 2025).

q           = W_q x                                    N heads of [q_nope | q_rope], each half H wide
kv          = W_kv x                                   K heads of [tied half | value half]
k_rope      = rope(W_kr x)                             one for all heads, half a head wide
k_k, v_k    = [tied half ; k_rope], [tied half ; value half]
y_n         = softmax([q_nope_n ; rope(q_rope_n)] . k_k / sqrt(H), causal) v_k          k = n // M
out         = W_o concat_n(y_n)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from mlra_jax.config import ModelConfig, TiedAttentionConfig
from mlra_jax.models.attention.grouped import attend_grouped
from mlra_jax.models.attention.output import Output
from mlra_jax.models.attention.slots import Slots
from mlra_jax.models.layers import (
    DecodeLeaves,
    Layout,
    Relayout,
    check,
    nested,
    normal,
    parameter,
    product,
    require_layout,
    rotary_frequencies,
)
from mlra_jax.ops.rotary import rotate
from mlra_jax.sharding import TRAIN_RULES, AxisRules

if TYPE_CHECKING:
    from mlra_jax.decoding.cache import LatentCache


class TiedAttention(nnx.Module):
    """Attention of N query heads over K tied KV heads; head k serves the query heads kM to (k+1)M - 1, M = N / K.

    A tied KV head is a latent head whose first half is the key's content and all of which is the value. So decoding is
    absorbed latent attention over [tied half | value half] with nothing to absorb: the query of the value half is zero.

    Args:
      config: of the model; `config.attention` is a `TiedAttentionConfig`.
      rngs: for the initial parameters.
      rules: table of logical axis names. Without a mesh nothing is split.
      layout: `train` has w_q [D, N, H], w_kv [D, K, H] and w_kr [D, R], R = H / 2; `decode` has w_q [N, H, D], w_kv by
        slot (`Slots`) [U, H, D], and w_kr [R, D].
    """

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, rules: AxisRules = TRAIN_RULES, layout: Layout = "train"
    ):
        check(config, layout)
        a = config.attention
        assert isinstance(a, TiedAttentionConfig)
        self.config, self.rules, self.layout = config, rules, layout
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        d, n, dtype, init = config.d_model, config.n_heads, config.param_dtype, normal(config)
        h, self.d_rope = a.d_head, a.d_rope
        self.softmax_scale = 1 / math.sqrt(h)
        self.frequencies = rotary_frequencies(config, a.d_rope)
        self.slots = Slots.of(config, rules)
        new = lambda shape, names: parameter(rngs, rules, shape, names, init, dtype)
        if layout == "train":  # where tensor does not divide the KV heads, every device holds them all
            self.kv_axis = rules.fitting("kv_heads", a.n_tied_heads)
            self.w_q = new((d, n, h), ("embed", "heads", None))
            self.w_kv = new((d, a.n_tied_heads, h), ("embed", self.kv_axis, None))
            self.w_kr = new((d, a.d_rope), ("embed", None))
        else:
            self.kv_axis = "latent_slots"
            self.w_q = new((n, h, d), ("heads", None, "embed"))
            self.w_kv = new((self.slots.count, h, d), ("latent_slots", None, "embed"))
            self.w_kr = new((a.d_rope, d), (None, "embed"))
        self.output = Output(config, h, rngs=rngs, rules=rules, layout=layout)

    @staticmethod
    def decode_leaves(config: ModelConfig, rules: AxisRules) -> DecodeLeaves:
        """What decoding keeps in another way."""
        slots = Slots.of(config, rules)
        return {
            "w_q": Relayout(("w_q",), lambda w_DNH: w_DNH.transpose(1, 2, 0)),
            "w_kv": Relayout(("w_kv",), lambda w_DKH: slots.to_slots(w_DKH, axis=1).transpose(1, 2, 0)),
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
        turned = lambda x: rotate(x, positions, self.frequencies)
        return q[..., :r], turned(q[..., r:]), kv, turned(k_rope)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Causal attention of whole sequences at positions 0 to T - 1, in the training layout.

        Args:
          x_BTD: the normalised input of the block, [B, T, D].

        Returns:
          [B, T, D] in the compute type.
        """
        require_layout(self.layout, "train")
        x_BTD = x_BTD.astype(self.compute_dtype)
        inputs = self._project(x_BTD, self.rules.constrain(jnp.arange(x_BTD.shape[1]), "length"))

        def attend(q_nope: jax.Array, q_rope: jax.Array, kv: jax.Array, k_rope: jax.Array) -> jax.Array:
            kv, k_rope, r = self.rules.all_tokens(kv), self.rules.all_tokens(k_rope), k_rope.shape[-1]
            k_rope_BSKR = jnp.broadcast_to(k_rope[:, :, None], (*kv.shape[:3], r))
            return attend_grouped(
                self.rules,
                self.slots.heads_per_latent,
                jnp.concatenate([q_nope, q_rope], axis=-1),
                jnp.concatenate([kv[..., :r], k_rope_BSKR], axis=-1),
                kv,
                scale=self.softmax_scale,
            )

        row, heads = ("batch", "length"), ("batch", "length", "heads", None)
        in_names = (heads, heads, (*row, self.kv_axis, None), (*row, None))
        return self.output(x_BTD, self.rules.shard_map(attend, in_names, heads)(*inputs))

    def decode(
        self, x_BTD: jax.Array, cache: LatentCache, start_B: jax.Array, n_new_B: jax.Array
    ) -> tuple[jax.Array, LatentCache]:
        """Appends T tokens to the cache and attends over it; see `LatentAttention.decode`."""
        require_layout(self.layout, "decode")
        slots = self.slots
        x_BTD = x_BTD.astype(self.compute_dtype)
        with jax.named_scope("queries"):
            q_nope, q_rope, kv, k_rope = self._project(x_BTD, start_B[:, None] + jnp.arange(x_BTD.shape[1]))
            q_nope = jnp.pad(q_nope, [(0, 0)] * 3 + [(0, kv.shape[-1] - q_nope.shape[-1])])
        cache = cache.add({"kv_latent": kv, "k_rope": k_rope}, start_B, n_new_B)

        def attend(cache: LatentCache, start: jax.Array, n_new: jax.Array, *queries: jax.Array) -> jax.Array:
            with jax.named_scope("attend"):
                q_nope, q_rope = (slots.gather(q, cache.n_slots) for q in queries)
                return cache.attend(q_nope, q_rope, start, n_new, scale=self.softmax_scale)

        heads = ("batch", None, slots.query_axis, None)
        inputs = ((q_nope, heads), (q_rope, heads))
        return self.output.over_slots(x_BTD, slots, attend, cache, inputs, start_B, n_new_B), cache
