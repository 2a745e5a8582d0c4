"""Grouped-query attention: MHA (as many KV heads as query heads), GQA, MQA (one KV head), and MFA.

q     = W_q x                          or, in MFA,   W_q RMSNorm(W_qa x)
k, v  = W_k x, W_v x                   K heads
y_n   = softmax(rope(q_n) . rope(k_k) / sqrt(H), causal) v_k          k = n // M
out   = W_o concat_n(y_n)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from mlra_jax.config import GroupedAttentionConfig, ModelConfig
from mlra_jax.models.attention.output import Output
from mlra_jax.models.attention.slots import Slots
from mlra_jax.models.layers import (
    DecodeLeaves,
    Layout,
    Relayout,
    RMSNorm,
    check,
    nested,
    normal,
    parameter,
    product,
    require_layout,
    rotary_frequencies,
)
from mlra_jax.ops.attention import causal_attention
from mlra_jax.ops.rotary import rotate
from mlra_jax.sharding import TRAIN_RULES, AxisRules

if TYPE_CHECKING:
    from mlra_jax.decoding.cache import GroupedCache


def attend_grouped(
    rules: AxisRules, heads_per_kv: int, q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float
) -> jax.Array:
    """Inside `shard_map`: causal attention of a device's own query heads and tokens.

    Args:
      rules: the training table.
      heads_per_kv: M, query heads that read one KV head.
      q: [B, T, N, H], T and N the device's own.
      k: [B, S, K, H], all tokens; the KV heads that its query heads read, or all of them.
      v: [B, S, K, V], the same.
      scale: multiplies the scores.

    Returns:
      [B, T, N, V].
    """
    n = q.shape[2]
    if k.shape[2] * heads_per_kv != n:
        # The KV heads are whole, the query heads split: one KV head for each run of heads that share it.
        run = math.gcd(n, heads_per_kv)
        read = (rules.axis_index("heads") * n + run * jnp.arange(n // run)) // heads_per_kv
        k, v = jnp.take(k, read, axis=2), jnp.take(v, read, axis=2)
    q_start = rules.axis_index("length") * q.shape[1]
    return causal_attention(q, k, v, scale=scale, q_start=q_start)


class GroupedAttention(nnx.Module):
    """Attention of N query heads over K KV heads; KV head k serves the query heads kM to (k+1)M - 1, M = N / K.

    Args:
      config: of the model; `config.attention` is a `GroupedAttentionConfig`.
      rngs: for the initial parameters.
      rules: table of logical axis names. Without a mesh nothing is split.
      layout: `train` has w_q [D, N, H], w_k and w_v [D, K, H]; `decode` has w_q [N, H, D], and keys and values by slot
        (`Slots`), for cached decoding over devices, as w_kv [2, U, H, D]. A low-rank query has A in place of D in w_q,
        and w_qa [D, A], or [A, D] to decode.
    """

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, rules: AxisRules = TRAIN_RULES, layout: Layout = "train"
    ):
        check(config, layout)
        a = config.attention
        assert isinstance(a, GroupedAttentionConfig)
        self.config, self.rules, self.layout = config, rules, layout
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        d, n, dtype, init = config.d_model, config.n_heads, config.param_dtype, normal(config)
        h, rank = a.d_head, a.q_lora_rank
        self.softmax_scale = 1 / math.sqrt(h)
        self.frequencies = rotary_frequencies(config, h)
        self.slots = Slots.of(config, rules)
        new = lambda shape, names: parameter(rngs, rules, shape, names, init, dtype)
        q_in, q_axis = (rank, rules.fitting("rank", rank)) if rank else (d, "embed")
        self.q_norm = RMSNorm(config, (rank,), (None,), rngs=rngs, rules=rules) if rank else None
        if layout == "train":  # where tensor does not divide the KV heads, every device holds them all
            self.kv_axis = rules.fitting("kv_heads", a.n_kv_heads)
            self.w_qa = new((d, rank), ("embed", None)) if rank else None
            self.w_q = new((q_in, n, h), (q_axis, "heads", None))
            self.w_k = new((d, a.n_kv_heads, h), ("embed", self.kv_axis, None))
            self.w_v = new((d, a.n_kv_heads, h), ("embed", self.kv_axis, None))
        else:
            self.kv_axis = "latent_slots"
            self.w_qa = new((rank, d), (None, "embed")) if rank else None
            self.w_q = new((n, h, q_in), ("heads", None, q_axis))
            self.w_kv = new((2, self.slots.count, h, d), (None, "latent_slots", None, "embed"))
        self.output = Output(config, h, rngs=rngs, rules=rules, layout=layout)

    @staticmethod
    def decode_leaves(config: ModelConfig, rules: AxisRules) -> DecodeLeaves:
        """What decoding keeps in another way."""
        a = config.attention
        assert isinstance(a, GroupedAttentionConfig)
        slots = Slots.of(config, rules)
        by_slot = lambda w_DKH: slots.to_slots(w_DKH, axis=1).transpose(1, 2, 0)
        leaves = {
            "w_q": Relayout(("w_q",), lambda w_DNH: w_DNH.transpose(1, 2, 0)),
            "w_kv": Relayout(("w_k", "w_v"), lambda k, v: jnp.stack([by_slot(k), by_slot(v)])),
            **nested("output", Output.decode_leaves(config)),
        }
        if a.q_lora_rank:
            leaves["w_qa"] = Relayout(("w_qa",), jnp.transpose)
        return leaves

    def _project(self, x_BTD: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries [B, T, N, H], rotated keys and values [B, T, K, H]."""
        rules, dtype = self.rules, self.compute_dtype
        train = self.layout == "train"
        q_names, kv_names = ("batch", "length", "heads", None), ("batch", "length", self.kv_axis, None)
        project = lambda equation, x, w, names: product(rules, equation, x, w, out=names)
        q_in = x_BTD
        if self.q_norm is not None:
            row = ("batch", "length", None)
            q_BTA = project("BTD,DA->BTA" if train else "BTD,AD->BTA", x_BTD, self.w_qa, row)
            q_in = self.q_norm(q_BTA).astype(dtype)
        if train:
            q = project("BTD,DNH->BTNH", q_in, self.w_q, q_names)
            k, v = (project("BTD,DNH->BTNH", x_BTD, w, kv_names) for w in (self.w_k, self.w_v))
        else:
            q = project("BTD,NHD->BTNH", q_in, self.w_q, q_names)
            k, v = project("BTD,GUHD->GBTUH", x_BTD, self.w_kv, (None, *kv_names))
        return rotate(q, positions, self.frequencies), rotate(k, positions, self.frequencies), v

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Causal attention of whole sequences at positions 0 to T - 1, in the training layout.

        Args:
          x_BTD: the normalised input of the block, [B, T, D].

        Returns:
          [B, T, D] in the compute type.
        """
        require_layout(self.layout, "train")
        x_BTD = x_BTD.astype(self.compute_dtype)
        q, k, v = self._project(x_BTD, self.rules.constrain(jnp.arange(x_BTD.shape[1]), "length"))

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            k, v = self.rules.all_tokens(k), self.rules.all_tokens(v)
            return attend_grouped(self.rules, self.slots.heads_per_latent, q, k, v, scale=self.softmax_scale)

        heads, kv = ("batch", "length", "heads", None), ("batch", "length", self.kv_axis, None)
        return self.output(x_BTD, self.rules.shard_map(attend, (heads, kv, kv), heads)(q, k, v))

    def decode(
        self, x_BTD: jax.Array, cache: GroupedCache, start_B: jax.Array, n_new_B: jax.Array
    ) -> tuple[jax.Array, GroupedCache]:
        """Appends T tokens to the cache and attends over it; see `LatentAttention.decode`."""
        require_layout(self.layout, "decode")
        slots = self.slots
        x_BTD = x_BTD.astype(self.compute_dtype)
        with jax.named_scope("queries"):
            q, k, v = self._project(x_BTD, start_B[:, None] + jnp.arange(x_BTD.shape[1]))
        cache = cache.add({"k": k, "v": v}, start_B, n_new_B)

        def attend(cache: GroupedCache, start: jax.Array, n_new: jax.Array, q: jax.Array) -> jax.Array:
            with jax.named_scope("attend"):
                q_BTUMH = slots.gather(q, cache.n_slots)
                return cache.attend(q_BTUMH, start, n_new, scale=self.softmax_scale)

        inputs = ((q, ("batch", None, slots.query_axis, None)),)
        return self.output.over_slots(x_BTD, slots, attend, cache, inputs, start_B, n_new_B), cache
