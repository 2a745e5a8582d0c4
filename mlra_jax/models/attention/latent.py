"""Latent attention: MLA, GLA and MLRA are one module (docs/architecture.md; paper, section 3).

q             = W_qb (q_scale * RMSNorm(W_qa x))               q_scale  = sqrt(D / A)
[kv | k_rope] = W_kva x, W_kr x                                kv: L heads C wide; k_rope: R, one for all heads
kv_latent_l   = kv_scale * RMSNorm_l(kv_l)                     kv_scale = sqrt(D / C)
k_l,n         = [W_UK_l,n kv_latent_l ; rope(k_rope)]          v_l,n = W_UV_l,n kv_latent_l
y_n           = 1/sqrt(J) * sum over l that serve n of softmax(q_n . k_l,n / sqrt(H + R), causal) v_l,n
out           = W_o concat_n(y_n)
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mlra_jax.config import LatentAttentionConfig, ModelConfig
from mlra_jax.models.attention.output import Output
from mlra_jax.models.attention.slots import Slots
from mlra_jax.models.layers import (
    DecodeLeaves,
    Layout,
    Relayout,
    RMSNorm,
    check,
    decode_product,
    nested,
    normal,
    parameter,
    products,
    require_layout,
    rotary_frequencies,
    stored,
    weight,
)
from mlra_jax.ops.attention import causal_attention_parts
from mlra_jax.ops.remat import HEADS, PRODUCT, QUERIES
from mlra_jax.ops.rotary import rotate
from mlra_jax.sharding import TRAIN_RULES, AxisRules

if TYPE_CHECKING:
    from mlra_jax.decoding.cache import LatentCache


def _by_head(a: jax.Array, b: jax.Array, contracted: str, names: tuple[str, str]) -> jax.Array:
    """For each head (K, E) the product of `a` and `b` over the axes `contracted`; `names` are of their axes.

    The result has (K, E), then what is left of `a`, then what is left of `b`. So the order of the operands decides what
    lies together in memory: here all lies as attention and the products before and after want it.
    """
    first, second = names
    at = lambda axes: ([first.index(axis) for axis in axes], [second.index(axis) for axis in axes])
    return jax.lax.dot_general(a, b, (at(contracted), at("KE")))


@jax.custom_vjp
def _to_latents(x_BTKEH: jax.Array, w_JKECH: jax.Array) -> jax.Array:
    """[K, E, B, T, J, C]: each head's x times its matrices."""
    return _by_head(x_BTKEH, w_JKECH, "H", ("BTKEH", "JKECH"))


@jax.custom_vjp
def _from_latents(z_KEBTJC: jax.Array, w_JKECH: jax.Array) -> jax.Array:
    """[B, T, K, E, H]: the transpose of `_to_latents`."""
    return _by_head(w_JKECH, z_KEBTJC, "JC", ("JKECH", "KEBTJC")).transpose(3, 4, 0, 1, 2)


def _of_weights(z_KEBTJC: jax.Array, x_BTKEH: jax.Array) -> jax.Array:
    """[J, K, E, C, H]: the gradient of the matrices of both."""
    return _by_head(z_KEBTJC, x_BTKEH, "BT", ("KEBTJC", "BTKEH")).transpose(2, 0, 1, 3, 4)


_save = lambda f: lambda x, w: (f(x, w), (x, w))
_to_latents.defvjp(_save(_to_latents), lambda xw, g: (_from_latents(g, xw[1]), _of_weights(g, xw[0])))
_from_latents.defvjp(_save(_from_latents), lambda zw, g: (_to_latents(g, zw[1]), _of_weights(zw[0], g)))


class LatentAttention(nnx.Module):
    """Attention over L latent heads, J of which each query head reads and sums.

    Query head n lies in group g = n // M of G = L / J groups, M = N / G heads each, and its branch j reads the latent
    head j*G + g. Each branch has its own softmax. MLA is (L, J) = (1, 1), GLA-2 (2, 1), MLRA-2 (4, 2), MLRA-4 (4, 4).

    Args:
      config: of the model; `config.attention` is a `LatentAttentionConfig`.
      rngs: for the initial parameters.
      rules: table of logical axis names. Without a mesh nothing is split.
      layout: `train` keeps W_UK and W_UV as [J, N, C, H], so that N can be split whatever G is, and w_qa [D, A],
        w_kva [D, L, C], w_kr [D, R], w_qb [A, N, H + R]. `decode`, for cached decoding over devices, keeps by slot, as
        `Slots.join_branches` gives them, W_UK [X, U', M, J', C, H] and W_UV [X, U', M, H, J', C], and as w_a
        [X, A + U/X*C + R, D] what makes the latents: one matrix for each of the X devices over which slots are split,
        with W_qa, its own part of W_kva, and W_kr. w_qb is [N, H + R, A].
    """

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, rules: AxisRules = TRAIN_RULES, layout: Layout = "train"
    ):
        check(config, layout)
        a = config.attention
        assert isinstance(a, LatentAttentionConfig)
        self.config, self.rules, self.layout = config, rules, layout
        self.sizes: LatentAttentionConfig = a
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        d, n, dtype, init = config.d_model, config.n_heads, config.param_dtype, normal(config)
        rank, latent, h, r = a.q_lora_rank, a.d_latent, a.d_nope, a.d_rope
        self.softmax_scale = 1 / math.sqrt(h + r)  # of the expanded form, whatever C is
        self.frequencies = rotary_frequencies(config, r)
        self.q_scale = math.sqrt(d / rank) if a.scale_latents else 1.0
        self.kv_scale = math.sqrt(d / latent) if a.scale_latents else 1.0
        self.branch_scale = 1 / math.sqrt(a.n_branches) if a.scale_latents else 1.0
        self.slots = Slots.of(config, rules)

        new = lambda shape, names: parameter(rngs, rules, shape, names, init, dtype)
        self.q_norm = RMSNorm(config, (rank,), (None,), rngs=rngs, rules=rules)
        if layout == "train":
            heads, axis = a.n_latent_heads, None
            self.w_qa = new((d, rank), ("embed", None))
            self.w_qb = new((rank, n, h + r), (rules.fitting("rank", rank), "heads", None))
            self.w_kva = new((d, heads, latent), ("embed", None, None))
            self.w_kr = new((d, r), ("embed", None))
            up_names = (None, "heads", rules.fitting("rank", latent), None)
            self.w_uk = new((a.n_branches, n, latent, h), up_names)
            self.w_uv = new((a.n_branches, n, latent, h), up_names)
        else:
            heads, axis = self.slots.count, "latent_slots"
            parts, rows = rules.size(axis), self.slots.heads_per_slot
            self.w_a = new((parts, rank + heads // parts * latent + r, d), (axis, None, "embed"))
            self.w_qb = new((n, h + r, rank), ("heads", None, "rank"))
            branches = self.slots.local_branches
            by_row = (parts, heads // (parts * branches), rows)
            self.w_uk = new((*by_row, branches, latent, h), (axis, *[None] * 5))
            self.w_uv = new((*by_row, h, branches, latent), (axis, *[None] * 5))
        self.kv_norm = RMSNorm(config, (heads, latent), (axis, None), rngs=rngs, rules=rules)
        self.output = Output(config, h, rngs=rngs, rules=rules, layout=layout)

    @staticmethod
    def decode_leaves(config: ModelConfig, rules: AxisRules) -> DecodeLeaves:
        """What decoding keeps in another way."""
        a = config.attention
        assert isinstance(a, LatentAttentionConfig)
        slots = Slots.of(config, rules)

        def join(w_DA: jax.Array, w_DLC: jax.Array, w_DR: jax.Array) -> jax.Array:
            flat = lambda w: w.reshape(w.shape[0], -1).T
            by_device = lambda *ws: jnp.concatenate([flat(w) for w in ws])[None]
            whole, by_slot = (None, None), (None, "latent_slots", None)
            joined = rules.shard_map(by_device, (whole, by_slot, whole), ("latent_slots", None, None))
            return joined(w_DA, slots.to_slots(w_DLC, axis=1), w_DR)

        return {
            "w_a": Relayout(("w_qa", "w_kva", "w_kr"), join),
            "w_qb": Relayout(("w_qb",), lambda w_ANE: w_ANE.transpose(1, 2, 0)),
            "kv_norm.gain": Relayout(("kv_norm.gain",), lambda gain_LC: slots.to_slots(gain_LC, axis=0)),
            "w_uk": Relayout(("w_uk",), lambda w: slots.join_branches(slots.heads_to_slots(w), axis=3)),
            "w_uv": Relayout(
                ("w_uv",), lambda w: slots.join_branches(slots.heads_to_slots(w).swapaxes(2, 3), axis=4)
            ),
            **nested("output", Output.decode_leaves(config)),
        }

    @property
    def absorbs(self) -> bool:
        """Whether full-sequence attention runs in the absorbed form (docs/architecture.md)."""
        a = self.sizes
        if a.form == "auto":
            return 2 * a.d_latent + a.d_rope <= 2 * a.d_nope + a.d_rope
        return a.form == "absorbed"

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Causal attention of whole sequences at positions 0 to T - 1, in the training layout.

        Args:
          x_BTD: the normalised input of the block, [B, T, D].

        Returns:
          [B, T, D] in the compute type.
        """
        require_layout(self.layout, "train")
        x_BTD = x_BTD.astype(self.compute_dtype)
        positions = self.rules.constrain(jnp.arange(x_BTD.shape[1]), "length")
        rules, dtype = self.rules, self.compute_dtype
        row = ("batch", "length", None)
        q_BTA, kv_BTLC, k_rope_BTR = products(
            rules,
            x_BTD,
            ("BTD,DA->BTA", self.w_qa, row),
            ("BTD,DLC->BTLC", self.w_kva, (*row, None)),
            ("BTD,DR->BTR", self.w_kr, row),
        )
        q_BTA = (self.q_norm(q_BTA) * self.q_scale).astype(dtype)
        heads, h = ("batch", "length", "heads", None), self.sizes.d_nope
        w_qb = weight(rules, self.w_qb, dtype)
        # Two products: cutting the matrix costs less than cutting what it gives.
        q_nope, q_rope = (
            rules.einsum("BTA,ANE->BTNE", q_BTA, w, out=heads) for w in (w_qb[..., :h], w_qb[..., h:])
        )
        # Kept as it is used, for the rotation needs nothing to be differentiated.
        q_rope = checkpoint_name(rotate(q_rope, positions, self.frequencies), PRODUCT)
        kv_latent = (self.kv_norm(kv_BTLC) * self.kv_scale).astype(dtype)
        k_rope = rotate(k_rope_BTR, positions, self.frequencies)
        up = (None, "heads", self._stored_rank, None)
        attend = rules.shard_map(self._attend, (heads, heads, (*row, None), row, up, up), heads)
        w_uk, w_uv = (stored(w, dtype) for w in (self.w_uk, self.w_uv))
        return self.output(x_BTD, attend(q_nope, q_rope, kv_latent, k_rope, w_uk, w_uv))

    @property
    def _stored_rank(self) -> str | None:
        """How C of W_UK and W_UV comes into `_attend`."""
        rank = self.rules.fitting("rank", self.sizes.d_latent)
        return rank and self.rules.within(rank, "batch")

    def _attend(
        self,
        q_nope: jax.Array,  # [B, T, N, H], T and N this device's own
        q_rope: jax.Array,  # [B, T, N, R]
        kv_latent: jax.Array,  # [B, T, L, C]
        k_rope: jax.Array,  # [B, T, R]
        w_uk: jax.Array,  # [J, N, C, H], C in parts
        w_uv: jax.Array,  # [J, N, C, H]
    ) -> jax.Array:
        """The heads' output y [B, T, N, H]."""
        a, rules = self.sizes, self.rules
        whole = lambda w: rules.all_gather(rules.vary(w, "batch", "length"), self._stored_rank, axis=2)
        w_uk, w_uv = whole(w_uk), whole(w_uv)
        kv_latent, k_rope = self.rules.all_tokens(kv_latent), self.rules.all_tokens(k_rope)
        (b, t, n, h), s = q_nope.shape, kv_latent.shape[1]
        j, g, c, m = a.n_branches, a.n_groups, a.d_latent, self.slots.heads_per_latent
        # The device's heads fall into k blocks of e heads that share their group (and so their latents).
        e = math.gcd(n, m)
        k = n // e
        kv_BSJKC = kv_latent.reshape(b, s, j, g, c)
        if g > 1:
            groups = (self.rules.axis_index("heads") * n + e * jnp.arange(k)) // m
            kv_BSJKC = jnp.take(kv_BSJKC, groups, axis=3)
        w_uk, w_uv = (w.reshape(j, k, e, c, h) for w in (w_uk, w_uv))
        q_nope_BTKEH, q_rope_BTKER = (q.reshape(b, t, k, e, -1) for q in (q_nope, q_rope))
        attend = functools.partial(
            causal_attention_parts, scale=self.softmax_scale, q_start=self.rules.axis_index("length") * t
        )
        if self.absorbs:
            # Heads (J, K): what all branches share, or all heads, is given once.
            q_KEBTJC = checkpoint_name(_to_latents(q_nope_BTKEH, w_uk), QUERIES)
            q_BTJKEC = q_KEBTJC.transpose(2, 3, 4, 0, 1, 5).reshape(b, t, j * k, e, c)
            parts = [(q_BTJKEC, kv_BSJKC.reshape(b, s, j * k, c)), (q_rope_BTKER, k_rope[:, :, None])]
            z_BTJKEC = attend(parts[: 1 + bool(a.d_rope)], None).reshape(b, t, j, k, e, c)
            y = _from_latents(z_BTJKEC.transpose(3, 4, 0, 1, 2, 5), self.branch_scale * w_uv)
        else:
            k_BSJKEH, v_BSJKEH = (jnp.einsum("BSJKC,JKECH->BSJKEH", kv_BSJKC, w) for w in (w_uk, w_uv))
            by_head = lambda x: x.reshape(b, -1, x.size // (b * x.shape[1] * x.shape[-1]), 1, x.shape[-1])
            parts = [
                (by_head(q_nope_BTKEH), by_head(k_BSJKEH).squeeze(3)),
                (by_head(q_rope_BTKER), k_rope[:, :, None]),
            ]
            y = attend(parts[: 1 + bool(a.d_rope)], by_head(v_BSJKEH).squeeze(3))
            y = self.branch_scale * y.reshape(b, t, j, n, h).astype(jnp.float32).sum(axis=2)
        y = y.astype(self.compute_dtype).reshape(b, t, n, h)
        return checkpoint_name(y, HEADS)

    def decode(
        self, x_BTD: jax.Array, cache: LatentCache, start_B: jax.Array, n_new_B: jax.Array
    ) -> tuple[jax.Array, LatentCache]:
        """Appends T tokens to the cache and attends over it, in the absorbed form; needs the decode layout.

        Args:
          x_BTD: the normalised input of the block, [B, T, D]; row b's first `n_new_B[b]` tokens count.
          cache: of this layer; donate it to the compiled function.
          start_B: tokens already in the cache, so the position of the first new one.
          n_new_B: new tokens of each row, 0 to T. What the others give is meaningless and is not cached.

        Returns:
          [B, T, D] in the compute type, and the cache with the new tokens.
        """
        require_layout(self.layout, "decode")
        rules, dtype, slots = self.rules, self.compute_dtype, self.slots
        x_BTD = x_BTD.astype(dtype)
        by_slot, row, by_row = ("batch", None, "latent_slots", None), ("batch", None, None), ("batch",)
        with jax.named_scope("latents"):
            a_BTXE = decode_product(rules, x_BTD, weight(rules, self.w_a, dtype), by_slot)
        gains = (weight(rules, norm.gain, norm.gain.dtype) for norm in (self.q_norm, self.kv_norm))

        def enter(
            cache: LatentCache,
            a_BTXE: jax.Array,
            q_gain: jax.Array,
            kv_gain: jax.Array,
            start: jax.Array,
            n_new: jax.Array,
        ) -> tuple[jax.Array, LatentCache]:
            with jax.named_scope("append"):
                return cache.enter(
                    a_BTXE.squeeze(2),
                    q_gain,
                    kv_gain,
                    start,
                    n_new,
                    eps=self.config.norm_eps,
                    q_scale=self.q_scale,
                    kv_scale=self.kv_scale,
                    frequencies=self.frequencies,
                )

        # All devices have computed the same q_BTA and k_rope, which is what the check wants to be told.
        entered = (cache.specs(), by_slot, (None,), ("latent_slots", None), by_row, by_row)
        q_BTA, cache = rules.shard_map(enter, entered, (row, cache.specs()), check_vma=False)(
            cache, a_BTXE, *gains, start_B, n_new_B
        )
        with jax.named_scope("queries"):
            w_qb, names = weight(rules, self.w_qb, dtype), ("batch", "length", "heads", None)
            q_BTNE = decode_product(rules, q_BTA, w_qb, names)

        def attend(
            cache: LatentCache,
            start: jax.Array,
            n_new: jax.Array,
            q_BTNE: jax.Array,
            w_uk: jax.Array,
            w_uv: jax.Array,
        ) -> jax.Array:
            w_UMJCH, w_UMHJC = w_uk.squeeze(0), w_uv.squeeze(0)
            u, m, j, c, h = w_UMJCH.shape
            b, t = q_BTNE.shape[:2]
            with jax.named_scope("absorb"):
                q_BTUME = slots.gather(q_BTNE, j * u)[:, :, :u]  # all branches have the same
                q_BTJUMC = jnp.einsum("BTUMH,UMJCH->BTJUMC", q_BTUME[..., :h], w_UMJCH)
            with jax.named_scope("attend"):
                z_BTUMC = cache.attend(
                    q_BTJUMC.reshape(b, t, j * u, m, c),
                    q_BTUME,
                    start,
                    n_new,
                    scale=self.softmax_scale,
                    frequencies=self.frequencies,
                )
            z_BTJUMC = z_BTUMC.reshape(b, t, j, u, m, c)
            # Batch axes first: einsum would make of "->BTUMH" a bfloat16 product that XLA lacks on the CPU.
            with jax.named_scope("values"):
                y_UMBTH = jnp.einsum(
                    "BTJUMC,UMHJC->UMBTH", z_BTJUMC, w_UMHJC, preferred_element_type=jnp.float32
                )
            return y_UMBTH.transpose(2, 3, 0, 1, 4)

        q_names = ("batch", None, slots.query_axis, None)  # not aligned: gathers q
        inputs = (
            (q_BTNE, q_names),
            (weight(rules, self.w_uk, dtype), ("latent_slots", *[None] * 5)),
            (weight(rules, self.w_uv, dtype), ("latent_slots", *[None] * 5)),
        )
        scale = self.branch_scale
        return self.output.over_slots(x_BTD, slots, attend, cache, inputs, start_B, n_new_B, scale), cache
