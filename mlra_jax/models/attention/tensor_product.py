"""Tensor product attention (TPA): factors of queries, keys and values, of which the cache holds the last two's.

A_q, B_q    = W_Aq x, W_Bq x                           q_rank factors for each head, and q_rank of width H
A_k, B_k    = W_Ak x, W_Bk x                           the same with rank; A_v, B_v likewise
q_n         = 1/q_rank * sum over r of A_q,n,r rope(B_q,r)
k_n, v_n    = 1/rank * sum over r of A_k,n,r rope(B_k,r),      1/rank * sum over r of A_v,n,r B_v,r
y_n         = softmax(q_n . k_n / sqrt(H), causal) v_n
out         = W_o concat_n(y_n)

Source: Zhang et al., Tensor Product Attention Is All You Need, 2025.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from mlra_jax.config import ModelConfig, TensorProductAttentionConfig
from mlra_jax.models.attention.output import Output
from mlra_jax.models.attention.slots import Slots
from mlra_jax.models.layers import (
    DecodeLeaves,
    Layout,
    Relayout,
    check,
    nested,
    parameter,
    product,
    require_layout,
    rotary_frequencies,
    uniform,
)
from mlra_jax.ops.attention import causal_attention
from mlra_jax.ops.rotary import rotate
from mlra_jax.sharding import TRAIN_RULES, AxisRules

if TYPE_CHECKING:
    from mlra_jax.decoding.cache import FactoredCache


class TensorProductAttention(nnx.Module):
    """Attention of N query heads, each with its own key and value, that are products of few factors.

    Decoding never builds a key or value of the past: the scores are sums over r of A_k,n,r (q_n . B_k,r), and so the
    values (`ops.decode.factored_decode_attention`). The cached heads are the query heads.

    Args:
      config: of the model; `config.attention` is a `TensorProductAttentionConfig`.
      rngs: for the initial parameters.
      rules: table of logical axis names. Without a mesh nothing is split.
      layout: `train` has for each of q, k and v, with r factors, w_a* [D, N, r] and w_b* [D, r, H]; `decode` has w_aq
        [N, r, D], and w_ak and w_av, by slot (`Slots`), as w_akv [2, U, r, D], and all of w_b* as w_b [sum of r, H, D].
    """

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, rules: AxisRules = TRAIN_RULES, layout: Layout = "train"
    ):
        check(config, layout)
        a = config.attention
        assert isinstance(a, TensorProductAttentionConfig)
        self.config, self.rules, self.layout = config, rules, layout
        self.sizes: TensorProductAttentionConfig = a
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        d, n, h = config.d_model, config.n_heads, a.d_head
        self.softmax_scale = 1 / math.sqrt(h)
        self.frequencies = rotary_frequencies(config, h)
        self.slots = Slots.of(config, rules)

        def new(shape: tuple[int, ...], names: tuple[str | None, ...], fan: int) -> nnx.Param:
            # Glorot's bound of an array [D, fan axes], as the official code has it.
            return parameter(rngs, rules, shape, names, uniform(math.sqrt(6 / fan)), config.param_dtype)

        by_head = lambda r: new((d, n, r), ("embed", "heads", None), n * r + d * r)
        by_width = lambda r: new((d, r, h), ("embed", None, None), r * h + d * h)
        if layout == "train":
            self.w_aq, self.w_ak, self.w_av = by_head(a.q_rank), by_head(a.rank), by_head(a.rank)
            self.w_bq, self.w_bk, self.w_bv = by_width(a.q_rank), by_width(a.rank), by_width(a.rank)
        else:
            fan = n * a.rank + d * a.rank
            self.w_aq = new((n, a.q_rank, d), ("heads", None, "embed"), n * a.q_rank + d * a.q_rank)
            kv = (2, self.slots.count, a.rank, d), (None, "latent_slots", None, "embed")
            self.w_akv = new(*kv, fan)
            self.w_b = new((a.q_rank + 2 * a.rank, h, d), (None, None, "embed"), a.rank * h + d * h)
        self.output = Output(config, h, rngs=rngs, rules=rules, layout=layout)

    @staticmethod
    def decode_leaves(config: ModelConfig, rules: AxisRules) -> DecodeLeaves:
        """What decoding keeps in another way."""
        slots = Slots.of(config, rules)
        turn = lambda w_DXY: w_DXY.transpose(1, 2, 0)
        by_slot = lambda w_DNr: turn(slots.to_slots(w_DNr, axis=1))
        return {
            "w_aq": Relayout(("w_aq",), turn),
            "w_akv": Relayout(("w_ak", "w_av"), lambda k, v: jnp.stack([by_slot(k), by_slot(v)])),
            "w_b": Relayout(("w_bq", "w_bk", "w_bv"), lambda *ws: jnp.concatenate([turn(w) for w in ws])),
            **nested("output", Output.decode_leaves(config)),
        }

    def _project(
        self, x_BTD: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
        """The rotated q [B, T, N, H], and A_k, rotated B_k, A_v, B_v: [B, T, N (or U), r] and [B, T, r, H].

        The head factors are divided by the number of products that they take part in.
        """
        rules, turned = self.rules, lambda b: rotate(b, positions, self.frequencies)
        q_rank, rank = self.sizes.q_rank, self.sizes.rank
        heads, whole = ("batch", "length", "heads", None), ("batch", "length", None, None)
        project = lambda equation, w, names: product(rules, equation, x_BTD, w, out=names)
        if self.layout == "train":
            by_head = lambda w: project("BTD,DNr->BTNr", w, heads)
            by_width = lambda w: project("BTD,DrH->BTrH", w, whole)
            a_q, a_k, a_v = map(by_head, (self.w_aq, self.w_ak, self.w_av))
            b_q, b_k, b_v = map(by_width, (self.w_bq, self.w_bk, self.w_bv))
        else:
            a_q = project("BTD,NrD->BTNr", self.w_aq, heads)
            kv_names = (None, "batch", "length", "latent_slots", None)
            a_k, a_v = project("BTD,GUrD->GBTUr", self.w_akv, kv_names)
            b = project("BTD,rHD->BTrH", self.w_b, whole)
            b_q, b_k, b_v = jnp.split(b, [q_rank, q_rank + rank], axis=2)
        q = rules.einsum("BTNr,BTrH->BTNH", a_q / q_rank, turned(b_q), out=heads)
        return q, a_k / rank, turned(b_k), a_v / rank, b_v

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

        def attend(q: jax.Array, a_k: jax.Array, b_k: jax.Array, a_v: jax.Array, b_v: jax.Array) -> jax.Array:
            a_k, b_k, a_v, b_v = map(self.rules.all_tokens, (a_k, b_k, a_v, b_v))
            k, v = (jnp.einsum("BSNr,BSrH->BSNH", a, b) for a, b in ((a_k, b_k), (a_v, b_v)))
            q_start = self.rules.axis_index("length") * q.shape[1]
            return causal_attention(q, k, v, scale=self.softmax_scale, q_start=q_start)

        heads, b = ("batch", "length", "heads", None), ("batch", "length", None, None)
        return self.output(x_BTD, self.rules.shard_map(attend, (heads, heads, b, heads, b), heads)(*inputs))

    def decode(
        self, x_BTD: jax.Array, cache: FactoredCache, start_B: jax.Array, n_new_B: jax.Array
    ) -> tuple[jax.Array, FactoredCache]:
        """Appends T tokens to the cache and attends over it; see `LatentAttention.decode`."""
        require_layout(self.layout, "decode")
        slots = self.slots
        x_BTD = x_BTD.astype(self.compute_dtype)
        with jax.named_scope("queries"):
            q, a_k, b_k, a_v, b_v = self._project(x_BTD, start_B[:, None] + jnp.arange(x_BTD.shape[1]))
        b_k, b_v = (b.reshape(*b.shape[:2], -1) for b in (b_k, b_v))
        cache = cache.add({"a_k": a_k, "b_k": b_k, "a_v": a_v, "b_v": b_v}, start_B, n_new_B)

        def attend(cache: FactoredCache, start: jax.Array, n_new: jax.Array, q: jax.Array) -> jax.Array:
            with jax.named_scope("attend"):
                q_BTUMH = slots.gather(q, cache.n_slots)
                return cache.attend(q_BTUMH, start, n_new, scale=self.softmax_scale)

        inputs = ((q, ("batch", None, slots.query_axis, None)),)
        return self.output.over_slots(x_BTD, slots, attend, cache, inputs, start_B, n_new_B), cache
