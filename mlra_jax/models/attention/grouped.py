"""Grouped-query attention: MHA (as many KV heads as query heads), GQA, and MQA (one KV head)."""

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
    nested,
    normal,
    parameter,
    require_layout,
    rotate,
    weight,
)
from mlra_jax.ops.attention import causal_attention
from mlra_jax.sharding import TRAIN_RULES, AxisRules

if TYPE_CHECKING:
    from mlra_jax.decoding.cache import GroupedCache


class GroupedAttention(nnx.Module):
    """Attention of N query heads over K KV heads; KV head k serves the query heads kM to (k+1)M - 1, M = N / K.

    Args:
      config: of the model; `config.attention` is a `GroupedAttentionConfig`.
      rngs: for the initial parameters.
      rules: table of logical axis names. Without a mesh nothing is split.
      layout: `train` has w_q [D, N, H], w_k and w_v [D, K, H]; `decode` has w_q [N, H, D], and keys and values by slot
        (`Slots`), for cached decoding over devices, as w_kv [2, U, H, D].
    """

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, rules: AxisRules = TRAIN_RULES, layout: Layout = "train"
    ):
        a = config.attention
        assert isinstance(a, GroupedAttentionConfig)
        self.config, self.rules, self.layout = config, rules, layout
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        d, n, dtype, init = config.d_model, config.n_heads, config.param_dtype, normal(config)
        self.softmax_scale = 1 / math.sqrt(a.d_head)
        self.slots = Slots(rules, n, a.n_kv_heads, n_branches=1)
        h = a.d_head
        if layout == "train":  # where tensor does not divide the KV heads, every device holds them all
            self.kv_axis = rules.fitting("kv_heads", a.n_kv_heads)
            kv = (d, a.n_kv_heads, h), ("embed", self.kv_axis, None)
            self.w_q = parameter(rngs, rules, (d, n, h), ("embed", "heads", None), init, dtype)
            self.w_k = parameter(rngs, rules, *kv, init, dtype)
            self.w_v = parameter(rngs, rules, *kv, init, dtype)
        else:
            self.kv_axis = "latent_slots"
            joined, names = (2, self.slots.count, h, d), (None, "latent_slots", None, "embed")
            self.w_q = parameter(rngs, rules, (n, h, d), ("heads", None, "embed"), init, dtype)
            self.w_kv = parameter(rngs, rules, joined, names, init, dtype)
        self.output = Output(config, h, rngs=rngs, rules=rules, layout=layout)

    @staticmethod
    def decode_leaves(config: ModelConfig, rules: AxisRules) -> DecodeLeaves:
        """What decoding keeps in another way."""
        a = config.attention
        assert isinstance(a, GroupedAttentionConfig)
        slots = Slots(rules, config.n_heads, a.n_kv_heads, n_branches=1)
        by_slot = lambda w_DKH: slots.to_slots(w_DKH, axis=1).transpose(1, 2, 0)
        return {
            "w_q": Relayout(("w_q",), lambda w_DNH: w_DNH.transpose(1, 2, 0)),
            "w_kv": Relayout(("w_k", "w_v"), lambda k, v: jnp.stack([by_slot(k), by_slot(v)])),
            **nested("output", Output.decode_leaves(config)),
        }

    def _project(self, x_BTD: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries [B, T, N, H], rotated keys and values [B, T, K, H]."""
        rules, dtype, base = self.rules, self.compute_dtype, self.config.rope_base
        q_names, kv_names = ("batch", "length", "heads", None), ("batch", "length", self.kv_axis, None)
        project = lambda equation, w, names: rules.einsum(equation, x_BTD, weight(rules, w, dtype), out=names)
        if self.layout == "train":
            q = project("BTD,DNH->BTNH", self.w_q, q_names)
            k, v = (project("BTD,DNH->BTNH", w, kv_names) for w in (self.w_k, self.w_v))
        else:
            q = project("BTD,NHD->BTNH", self.w_q, q_names)
            k, v = project("BTD,GUHD->GBTUH", self.w_kv, (None, *kv_names))
        return rotate(q, positions, base), rotate(k, positions, base), v

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
            n, m = q.shape[2], self.slots.heads_per_latent
            if (
                k.shape[2] * m != n
            ):  # the KV heads are whole, the query heads split: one KV head for each query head
                heads = (self.rules.axis_index("heads") * n + jnp.arange(n)) // m
                k, v = jnp.take(k, heads, axis=2), jnp.take(v, heads, axis=2)
            q_start = self.rules.axis_index("length") * q.shape[1]
            return causal_attention(q, k, v, scale=self.softmax_scale, q_start=q_start)

        heads, kv = ("batch", "length", "heads", None), ("batch", None, self.kv_axis, None)
        return self.output(x_BTD, self.rules.shard_map(attend, (heads, kv, kv), heads)(q, k, v))

    def decode(
        self, x_BTD: jax.Array, cache: GroupedCache, start_B: jax.Array, n_new_B: jax.Array
    ) -> tuple[jax.Array, GroupedCache]:
        """Appends T tokens to the cache and attends over it; see `LatentAttention.decode`."""
        require_layout(self.layout, "decode")
        rules, slots = self.rules, self.slots
        x_BTD = x_BTD.astype(self.compute_dtype)
        with jax.named_scope("queries"):
            q, k, v = self._project(x_BTD, start_B[:, None] + jnp.arange(x_BTD.shape[1]))
        gate = self.output.gate(x_BTD) if slots.projected else None
        w_o = weight(rules, self.output.w_o, self.compute_dtype) if slots.projected else None

        def attend(
            cache: GroupedCache,
            q: jax.Array,
            k: jax.Array,
            v: jax.Array,
            gate: jax.Array | None,
            w_o: jax.Array | None,
            start: jax.Array,
            n_new: jax.Array,
        ) -> tuple[jax.Array, GroupedCache]:
            with jax.named_scope("append"):
                cache = cache.append({"k": k, "v": v}, start, n_new)
            with jax.named_scope("attend"):
                y = cache.attend(slots.gather(q, k.shape[2]), start, n_new, scale=self.softmax_scale)
            return self.output.from_slots(slots, y, gate, w_o), cache

        heads, kv = ("batch", None, slots.query_axis, None), ("batch", None, "latent_slots", None)
        y_names = ("batch", None, None) if slots.projected else ("batch", None, "heads", None)
        gate_names = None if gate is None else ("batch", None, None, None)
        w_o_names = None if w_o is None else (None, None, None)
        in_names = (cache.specs(), heads, kv, kv, gate_names, w_o_names, ("batch",), ("batch",))
        y, cache = rules.shard_map(attend, in_names, (y_names, cache.specs()))(
            cache, q, k, v, gate, w_o, start_B, n_new_B
        )
        with jax.named_scope("output"):
            return (y if slots.projected else self.output(x_BTD, y)), cache
