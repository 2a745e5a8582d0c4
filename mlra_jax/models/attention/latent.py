"""Latent attention: MLA, GLA and MLRA are one module (docs/architecture.md; paper, section 3).

q             = W_qb (q_scale * RMSNorm(W_qa x))               q_scale  = sqrt(D / A)
[kv | k_rope] = W_kva x, W_kr x                                kv: L heads C wide; k_rope: R, one for all heads
kv_latent_l   = kv_scale * RMSNorm_l(kv_l)                     kv_scale = sqrt(D / C)
k_l,n         = [W_UK_l,n kv_latent_l ; rope(k_rope)]          v_l,n = W_UV_l,n kv_latent_l
y_n           = 1/sqrt(J) * sum over l that serve n of softmax(q_n . k_l,n / sqrt(H + R), causal) v_l,n
out           = W_o concat_n(y_n)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from mlra_jax.config import LatentAttentionConfig, ModelConfig
from mlra_jax.models.attention.output import Output
from mlra_jax.models.attention.slots import Slots
from mlra_jax.models.layers import Layout, RMSNorm, normal, parameter, require_layout, rotate, weight
from mlra_jax.ops.attention import causal_attention
from mlra_jax.sharding import TRAIN_RULES, AxisRules

if TYPE_CHECKING:
    from mlra_jax.decoding.cache import LatentCache


class LatentAttention(nnx.Module):
    """Attention over L latent heads, J of which each query head reads and sums.

    Query head n lies in group g = n // M of G = L / J groups, M = N / G heads each, and its branch j reads the latent
    head j*G + g. Each branch has its own softmax. MLA is (L, J) = (1, 1), GLA-2 (2, 1), MLRA-2 (4, 2), MLRA-4 (4, 4).

    Args:
      config: of the model; `config.attention` is a `LatentAttentionConfig`.
      rngs: for the initial parameters.
      rules: table of logical axis names. Without a mesh nothing is split.
      layout: `train` keeps W_UK and W_UV as [J, N, C, H], so that N can be split whatever G is; `decode` keeps them,
        and what makes the latents, by slot (`Slots`), for cached decoding over devices.
    """

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, rules: AxisRules = TRAIN_RULES, layout: Layout = "train"
    ):
        a = config.attention
        assert isinstance(a, LatentAttentionConfig)
        self.config, self.rules, self.layout = config, rules, layout
        self.sizes: LatentAttentionConfig = a
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        d, n, dtype, init = config.d_model, config.n_heads, config.param_dtype, normal(config)
        rank, latent, h, r = a.q_lora_rank, a.d_latent, a.d_nope, a.d_rope
        self.softmax_scale = 1 / math.sqrt(h + r)  # of the expanded form, whatever C is
        self.q_scale = math.sqrt(d / rank) if a.scale_latents else 1.0
        self.kv_scale = math.sqrt(d / latent) if a.scale_latents else 1.0
        self.branch_scale = 1 / math.sqrt(a.n_branches) if a.scale_latents else 1.0
        self.slots = Slots(rules, n, a.n_latent_heads, a.n_branches)

        self.w_qa = parameter(rngs, rules, (d, rank), ("embed", None), init, dtype)
        self.q_norm = RMSNorm(config, (rank,), (None,), rngs=rngs, rules=rules)
        q_names = (rules.fitting("rank", rank), "heads", None)
        self.w_qb = parameter(rngs, rules, (rank, n, h + r), q_names, init, dtype)
        if layout == "train":
            heads, axis = a.n_latent_heads, None
            up_shape = (a.n_branches, n, latent, h)
            up_names: tuple[str | None, ...] = (None, "heads", rules.fitting("rank", latent), None)
        else:
            heads, axis = self.slots.count, "latent_slots"
            up_shape = (heads, self.slots.heads_per_slot, latent, h)
            up_names = ("latent_slots", None, None, None)
        self.w_kva = parameter(rngs, rules, (d, heads, latent), ("embed", axis, None), init, dtype)
        self.w_kr = parameter(rngs, rules, (d, r), ("embed", None), init, dtype)
        self.kv_norm = RMSNorm(config, (heads, latent), (axis, None), rngs=rngs, rules=rules)
        self.w_uk = parameter(rngs, rules, up_shape, up_names, init, dtype)
        self.w_uv = parameter(rngs, rules, up_shape, up_names, init, dtype)
        self.output = Output(config, h, rngs=rngs, rules=rules)

    @staticmethod
    def to_decode_layout(config: ModelConfig, rules: AxisRules, name: str, value: jax.Array) -> jax.Array:
        """A parameter of the training layout, by its dotted name, laid out for decoding."""
        a = config.attention
        assert isinstance(a, LatentAttentionConfig)
        slots = Slots(rules, config.n_heads, a.n_latent_heads, a.n_branches)
        if name in ("w_uk", "w_uv"):
            return slots.heads_to_slots(value)
        if name == "w_kva":
            return slots.to_slots(value, axis=1)
        return slots.to_slots(value, axis=0) if name == "kv_norm.gain" else value

    @property
    def absorbs(self) -> bool:
        """Whether full-sequence attention runs in the absorbed form (docs/architecture.md)."""
        a = self.sizes
        if a.form == "auto":
            return 2 * a.d_latent + a.d_rope <= 2 * a.d_nope + a.d_rope
        return a.form == "absorbed"

    def _queries(self, x_BTD: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """q_nope [B, T, N, H] and the rotated q_rope [B, T, N, R], N split as the table says."""
        rules, dtype, h = self.rules, self.compute_dtype, self.sizes.d_nope
        q_BTA = rules.einsum(
            "BTD,DA->BTA", x_BTD, weight(rules, self.w_qa, dtype), out=("batch", "length", None)
        )
        q_BTA = (self.q_norm(q_BTA) * self.q_scale).astype(dtype)
        names = ("batch", "length", "heads", None)
        q_BTNE = rules.einsum("BTA,ANE->BTNE", q_BTA, weight(rules, self.w_qb, dtype), out=names)
        return q_BTNE[..., :h], rotate(q_BTNE[..., h:], positions, self.config.rope_base)

    def _latents(self, x_BTD: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What is cached: the normalised, scaled kv_latent [B, T, L (or U), C] and the rotated k_rope [B, T, R]."""
        rules, dtype = self.rules, self.compute_dtype
        axis = None if self.layout == "train" else "latent_slots"
        w_DLC, w_DR = weight(rules, self.w_kva, dtype), weight(rules, self.w_kr, dtype)
        kv_BTLC = rules.einsum("BTD,DLC->BTLC", x_BTD, w_DLC, out=("batch", "length", axis, None))
        k_rope_BTR = rules.einsum("BTD,DR->BTR", x_BTD, w_DR, out=("batch", "length", None))
        kv_latent_BTLC = (self.kv_norm(kv_BTLC) * self.kv_scale).astype(dtype)
        return kv_latent_BTLC, rotate(k_rope_BTR, positions, self.config.rope_base)

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
        q_nope, q_rope = self._queries(x_BTD, positions)
        kv_latent, k_rope = self._latents(x_BTD, positions)
        dtype = self.compute_dtype
        heads, whole = ("batch", "length", "heads", None), ("batch", None, None)
        up = (None, "heads", None, None)
        # Every query sees all earlier tokens: under context parallelism the latents are gathered, L*C + R a token.
        attend = self.rules.shard_map(self._attend, (heads, heads, (*whole, None), whole, up, up), heads)
        w_uk, w_uv = weight(self.rules, self.w_uk, dtype), weight(self.rules, self.w_uv, dtype)
        return self.output(x_BTD, attend(q_nope, q_rope, kv_latent, k_rope, w_uk, w_uv))

    def _attend(
        self,
        q_nope: jax.Array,  # [B, T, N, H], T and N this device's own
        q_rope: jax.Array,  # [B, T, N, R]
        kv_latent: jax.Array,  # [B, S, L, C]
        k_rope: jax.Array,  # [B, S, R]
        w_uk: jax.Array,  # [J, N, C, H]
        w_uv: jax.Array,  # [J, N, C, H]
    ) -> jax.Array:
        """The heads' output y [B, T, N, H]."""
        a = self.sizes
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
        q_nope_BTKEH = q_nope.reshape(b, t, k, e, h)
        q_rope_BTJKER = jnp.broadcast_to(q_rope.reshape(b, t, 1, k, e, -1), (b, t, j, k, e, q_rope.shape[-1]))
        q_start = self.rules.axis_index("length") * t
        if self.absorbs:
            q_BTJKEC = jnp.einsum("BTKEH,JKECH->BTJKEC", q_nope_BTKEH, w_uk)
            k_rope_BSJKR = jnp.broadcast_to(k_rope[:, :, None, None], (b, s, j, k, k_rope.shape[-1]))
            z = causal_attention(
                jnp.concatenate([q_BTJKEC, q_rope_BTJKER], axis=-1).reshape(b, t, j * n, -1),
                jnp.concatenate([kv_BSJKC, k_rope_BSJKR], axis=-1).reshape(b, s, j * k, -1),
                kv_BSJKC.reshape(b, s, j * k, c),
                scale=self.softmax_scale,
                q_start=q_start,
            )
            z_BTJKEC = z.reshape(b, t, j, k, e, c)
            y = jnp.einsum("BTJKEC,JKECH->BTKEH", z_BTJKEC, w_uv, preferred_element_type=jnp.float32)
        else:
            q_BTJKEH = jnp.broadcast_to(q_nope_BTKEH[:, :, None], (b, t, j, k, e, h))
            k_BSJKEH = jnp.einsum("BSJKC,JKECH->BSJKEH", kv_BSJKC, w_uk)
            v_BSJKEH = jnp.einsum("BSJKC,JKECH->BSJKEH", kv_BSJKC, w_uv)
            k_rope_BSJKER = jnp.broadcast_to(
                k_rope[:, :, None, None, None], (b, s, j, k, e, k_rope.shape[-1])
            )
            y = causal_attention(
                jnp.concatenate([q_BTJKEH, q_rope_BTJKER], axis=-1).reshape(b, t, j * n, -1),
                jnp.concatenate([k_BSJKEH, k_rope_BSJKER], axis=-1).reshape(b, s, j * n, -1),
                v_BSJKEH.reshape(b, s, j * n, h),
                scale=self.softmax_scale,
                q_start=q_start,
            )
            y = y.reshape(b, t, j, n, h).astype(jnp.float32).sum(axis=2)
        return (self.branch_scale * y).astype(self.compute_dtype).reshape(b, t, n, h)

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
        positions = start_B[:, None] + jnp.arange(x_BTD.shape[1])
        q_nope, q_rope = self._queries(x_BTD, positions)
        kv_latent, k_rope = self._latents(x_BTD, positions)
        gate = self.output.gate(x_BTD) if slots.projected else None
        w_o = weight(rules, self.output.w_o, dtype) if slots.projected else None

        def attend(
            cache: LatentCache,
            q_nope: jax.Array,
            q_rope: jax.Array,
            kv_latent: jax.Array,
            k_rope: jax.Array,
            w_uk: jax.Array,
            w_uv: jax.Array,
            gate: jax.Array | None,
            w_o: jax.Array | None,
            start: jax.Array,
            n_new: jax.Array,
        ) -> tuple[jax.Array, LatentCache]:
            u = w_uk.shape[0]
            cache = cache.append({"kv_latent": kv_latent, "k_rope": k_rope}, start, n_new)
            q_BTUMC = jnp.einsum("BTUMH,UMCH->BTUMC", slots.gather(q_nope, u), w_uk)
            z_BTUMC = cache.attend(q_BTUMC, slots.gather(q_rope, u), start, n_new, scale=self.softmax_scale)
            # Batch axes first: einsum would make of "->BTUMH" a bfloat16 product that XLA lacks on the CPU.
            y_UMBTH = jnp.einsum("BTUMC,UMCH->UMBTH", z_BTUMC, w_uv, preferred_element_type=jnp.float32)
            y_BTUMH = self.branch_scale * y_UMBTH.transpose(2, 3, 0, 1, 4)
            return self.output.from_slots(slots, y_BTUMH, gate, w_o), cache

        q_names = ("batch", None, slots.query_axis, None)  # not aligned: gathers q
        by_slot = ("latent_slots", None, None, None)
        latents, row = ("batch", None, "latent_slots", None), ("batch", None, None)
        y_names = row if slots.projected else ("batch", None, "heads", None)
        gate_names = None if gate is None else ("batch", None, None, None)
        w_o_names = None if w_o is None else (None, None, None)
        inputs = (
            q_names,
            q_names,
            latents,
            row,
            by_slot,
            by_slot,
            gate_names,
            w_o_names,
            ("batch",),
            ("batch",),
        )
        w_uk, w_uv = weight(rules, self.w_uk, dtype), weight(rules, self.w_uv, dtype)
        y, cache = rules.shard_map(attend, (cache.specs(), *inputs), (y_names, cache.specs()))(
            cache, q_nope, q_rope, kv_latent, k_rope, w_uk, w_uv, gate, w_o, start_B, n_new_B
        )
        return (y if slots.projected else self.output(x_BTD, y)), cache
