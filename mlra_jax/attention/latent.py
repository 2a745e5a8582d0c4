"""Latent attention: MLA, GLA and MLRA are one module (docs/architecture.md; paper, section 3).

q             = W_qb (q_scale * RMSNorm(W_qa x))               q_scale  = sqrt(D / A)
[kv | k_rope] = W_kva x, W_kr x                                kv: L heads C wide; k_rope: R, one for all heads
kv_latent_l   = kv_scale * RMSNorm_l(kv_l)                     kv_scale = sqrt(D / C)
k_l,n         = [W_UK_l,n kv_latent_l ; rope(k_rope)]          v_l,n = W_UV_l,n kv_latent_l
y_n           = 1/sqrt(J) * sum over l that serve n of softmax(q_n . k_l,n / sqrt(H + R), causal) v_l,n
out           = W_o concat_n(y_n)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mlra_jax.attention.base import HEADS, ROWS, Attention, attend_own
from mlra_jax.attention.head_shards import HeadShards
from mlra_jax.attention.kv_cache import LayerCache
from mlra_jax.attention.output import Output
from mlra_jax.config import (
    AttentionConfig,
    CacheArray,
    ConfigError,
    ModelConfig,
    NotNegative,
    Positive,
    uneven,
)
from mlra_jax.model.layers import (
    DecodeLeaves,
    Initializer,
    Relayout,
    RMSNorm,
    decode_product,
    nested,
    parameter,
    products,
    rotary_frequencies,
    softmax_scale,
    stored,
    weight,
)
from mlra_jax.ops.attention import causal_attention_parts
from mlra_jax.ops.remat import HEADS as HEADS_OUTPUT
from mlra_jax.ops.remat import PRODUCT, QUERIES
from mlra_jax.ops.rotary import rotate
from mlra_jax.sharding import AxisRules, Names


@dataclasses.dataclass(frozen=True)
class LatentAttentionConfig(AttentionConfig):
    """MLA, GLA and MLRA: attention over `n_latent_heads` low-rank latent heads (paper, section 3).

    MLA is (1, 1), GLA-2 (2, 1), GLA-4 (4, 1), MLRA-2 (4, 2), MLRA-4 (4, 4) as (n_latent_heads, n_branches).
    """

    n_latent_heads: Positive = 4
    """L: latent heads in the KV cache; the axis that tensor parallelism splits when decoding."""
    n_branches: Positive = 4
    """J: latent heads whose outputs each query head sums; the number in MLRA-2 and MLRA-4."""
    q_lora_rank: Positive = 1024
    """A: width of the compressed query."""
    kv_lora_rank: Positive = 512
    """Width of all latent heads together, L * C."""
    d_nope: Positive = 128
    """H: per-head width of the position-free part of query and key, and of the value."""
    d_rope: NotNegative = 64
    """R: width of the rotary part of the query, and of the one rotary key shared by all heads."""
    scale_latents: bool = True
    """Variance-preserving scales: sqrt(D/A) on the query, sqrt(D/C) on the latents, 1/sqrt(J) on the branch sum.
    False is the paper's "no scaling" ablation: all three are 1."""

    cached_heads_field: ClassVar[str] = "attention.n_latent_heads"

    @classmethod
    def module(cls) -> type[LatentAttention]:
        return LatentAttention

    @property
    def d_latent(self) -> int:
        """C: width of one latent head."""
        return self.kv_lora_rank // self.n_latent_heads

    @property
    def n_groups(self) -> int:
        """G: contiguous groups of query heads; group g reads the latent heads l with l mod G == g."""
        return self.n_latent_heads // self.n_branches

    def cached_heads(self, n_heads: int) -> int:
        return self.n_latent_heads

    def cache_arrays(self) -> dict[str, CacheArray]:
        return {"kv_latent": CacheArray(self.d_latent), "k_rope": CacheArray(self.d_rope, by_head=False)}

    def train_flops(self, n_heads: int, keys: float) -> float:
        """Expanded: 2 * (H + R + H) for each query head, branch and key."""
        return n_heads * 2 * self.n_branches * (self.d_nope + self.d_rope + self.d_nope) * keys

    def decode_flops(self, n_heads: int) -> int:
        """Absorbed: 2 * (C + R + C) for each query head and branch."""
        return 2 * n_heads * self.n_branches * (2 * self.d_latent + self.d_rope)

    def activation_bytes(self, n_heads: int, itemsize: int) -> int:
        absorbed = n_heads * self.n_branches * (2 * self.d_latent + self.d_rope)
        return itemsize * (absorbed + n_heads * (2 * self.d_nope + self.d_rope)) + 4 * n_heads * self.d_nope

    def gathered_values(self, n_heads: int, tensor: int) -> int:
        """Every device computes all latents."""
        return self.kv_lora_rank + self.d_rope

    def share(self, cached_heads: int) -> Self:
        branches = max(1, cached_heads // self.n_groups) if self.n_branches > 1 else 1
        return dataclasses.replace(
            self, n_latent_heads=cached_heads, n_branches=branches, kv_lora_rank=cached_heads * self.d_latent
        )

    def split(self, n_latent_heads: int, n_branches: int) -> Self:
        """The sizes with each latent head cut into several (`mlra-convert split-latents`).

        Raises:
          ConfigError: the latent cannot be cut so.
        """
        new = dataclasses.replace(self, n_latent_heads=n_latent_heads, n_branches=n_branches)
        new.validate()
        if n_latent_heads % self.n_latent_heads or n_latent_heads == self.n_latent_heads:
            raise ConfigError(
                f"n_latent_heads={n_latent_heads} must be twice, or another multiple of, the "
                f"{self.n_latent_heads} of the model; each is cut into equal pieces."
            )
        if n_branches % self.n_branches or new.n_groups % self.n_groups:
            raise ConfigError(
                f"n_branches={n_branches} must be a multiple of the {self.n_branches} that the model has, and "
                f"n_latent_heads/n_branches={new.n_groups} of its {self.n_groups} groups of query heads."
            )
        return new

    def conflicts(self) -> list[str]:
        at, faults = self.at, []
        if self.n_latent_heads % self.n_branches:
            faults.append(
                f"{at}n_branches={self.n_branches} does not divide n_latent_heads={self.n_latent_heads}; "
                "each query head must read the same number of latent heads."
            )
        if self.kv_lora_rank % self.n_latent_heads:
            faults.append(
                f"{at}kv_lora_rank={self.kv_lora_rank} is not divisible by n_latent_heads={self.n_latent_heads}; "
                "the latent is cut into heads of equal width."
            )
        return faults + uneven(self, "d_rope")


def _by_head(a: jax.Array, b: jax.Array, contracted: str, names: tuple[str, str]) -> jax.Array:
    """The product of `a` and `b` over the axes `contracted`, for each head (G, M); `names` are their axes' letters.

    The result has axes (G, M), then the rest of `a`, then the rest of `b`: the order of the operands decides the layout
    in memory, which below is the one that attention and the products around it read.
    """
    first, second = names
    at = lambda axes: ([first.index(axis) for axis in axes], [second.index(axis) for axis in axes])
    return jax.lax.dot_general(a, b, (at(contracted), at("GM")))


@jax.custom_vjp
def _to_latents(x_BTGMH: jax.Array, w_JGMCH: jax.Array) -> jax.Array:
    """[G, M, B, T, J, C]: each head's x times its matrices."""
    return _by_head(x_BTGMH, w_JGMCH, "H", ("BTGMH", "JGMCH"))


@jax.custom_vjp
def _from_latents(z_GMBTJC: jax.Array, w_JGMCH: jax.Array) -> jax.Array:
    """[B, T, G, M, H]: the transpose of `_to_latents`."""
    return _by_head(w_JGMCH, z_GMBTJC, "JC", ("JGMCH", "GMBTJC")).transpose(3, 4, 0, 1, 2)


def _of_weights(z_GMBTJC: jax.Array, x_BTGMH: jax.Array) -> jax.Array:
    """[J, G, M, C, H]: the gradient of the matrices of both."""
    return _by_head(z_GMBTJC, x_BTGMH, "BT", ("GMBTJC", "BTGMH")).transpose(2, 0, 1, 3, 4)


_save = lambda f: lambda x, w: (f(x, w), (x, w))
_to_latents.defvjp(_save(_to_latents), lambda xw, g: (_from_latents(g, xw[1]), _of_weights(g, xw[0])))
_from_latents.defvjp(_save(_from_latents), lambda zw, g: (_to_latents(g, zw[1]), _of_weights(zw[0], g)))


class LatentAttention(Attention):
    """Attention over L latent heads; each query head reads J of them and sums their outputs.

    Query head n belongs to group g = n // M of G = L / J groups with M = N / G heads each, and its branch j reads
    latent head j*G + g. Each branch has its own softmax. MLA is (L, J) = (1, 1), GLA-2 (2, 1), MLRA-2 (4, 2), MLRA-4
    (4, 4).

    The training layout keeps W_UK and W_UV as [J, N, C, H], so that N can be split whatever G is, and w_qa [D, A],
    w_kva [D, L, C], w_kr [D, R], w_qb [A, N, H + R]. The decode layout has W_UK [X, U', M, J', C, H] and W_UV
    [X, U', M, H, J', C] by KV-head shard (`HeadShards.join_branches`), w_qb [N, H + R, A], and w_a
    [X, A + U/X*C + R, D]: for each of the X devices over which shards are split, one matrix of W_qa, the device's part
    of W_kva, and W_kr.
    """

    branch_weights = ("w_uk", "w_uv")
    branch_parameters: ClassVar[tuple[str, ...]] = ()
    """Names of a variant's own parameters [J], one number per branch, made by `branch_parameter`."""

    def build(self, rngs: nnx.Rngs) -> None:
        config, rules, layout = self.config, self.rules, self.layout
        a = config.attention
        assert isinstance(a, LatentAttentionConfig)
        self.sizes = a
        d, n = config.d_model, config.n_heads
        rank, latent, h, r = a.q_lora_rank, a.d_latent, a.d_nope, a.d_rope
        self.softmax_scale = softmax_scale(config, h + r)  # of the expanded form, whatever C is
        self.q_scale = math.sqrt(d / rank) if a.scale_latents else 1.0
        self.kv_scale = math.sqrt(d / latent) if a.scale_latents else 1.0
        self.frequencies = rotary_frequencies(config, r)
        self.branch_scale = 1 / math.sqrt(a.n_branches) if a.scale_latents else 1.0

        new = functools.partial(self._parameter, rngs)
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
            heads, axis = self.shards.count, "kv_head_shards"
            parts, rows = rules.size(axis), self.shards.heads_per_shard
            self.w_a = new((parts, rank + heads // parts * latent + r, d), (axis, None, "embed"))
            self.w_qb = new((n, h + r, rank), ("heads", None, "rank"))
            branches = self.shards.local_branches
            by_row = (parts, heads // (parts * branches), rows)
            self.w_uk = new((*by_row, branches, latent, h), (axis, *[None] * 5))
            self.w_uv = new((*by_row, h, branches, latent), (axis, *[None] * 5))
        self.kv_norm = RMSNorm(config, (heads, latent), (axis, None), rngs=rngs, rules=rules)
        self.output = Output(config, h, rngs=rngs, rules=rules, layout=layout)

    @classmethod
    def decode_leaves(cls, config: ModelConfig, rules: AxisRules) -> DecodeLeaves:
        shards = HeadShards.of(config, rules)

        def join(w_DA: jax.Array, w_DLC: jax.Array, w_DR: jax.Array) -> jax.Array:
            flat = lambda w: w.reshape(w.shape[0], -1).T
            by_device = lambda *ws: jnp.concatenate([flat(w) for w in ws])[None]
            whole, by_shard = (None, None), (None, "kv_head_shards", None)
            joined = rules.shard_map(by_device, (whole, by_shard, whole), ("kv_head_shards", None, None))
            return joined(w_DA, shards.to_shards(w_DLC, axis=1), w_DR)

        each = shards.count // config.attention.n_branches  # shards of a branch
        by_shard = lambda value_J: jnp.broadcast_to(value_J[:, None], (len(value_J), each)).reshape(-1)
        return {
            "w_a": Relayout(("w_qa", "w_kva", "w_kr"), join),
            "w_qb": Relayout(("w_qb",), lambda w_ANE: w_ANE.transpose(1, 2, 0)),
            "kv_norm.gain": Relayout(("kv_norm.gain",), lambda gain_LC: shards.to_shards(gain_LC, axis=0)),
            "w_uk": Relayout(("w_uk",), lambda w: shards.join_branches(shards.heads_to_shards(w), axis=3)),
            "w_uv": Relayout(
                ("w_uv",), lambda w: shards.join_branches(shards.heads_to_shards(w).swapaxes(2, 3), axis=4)
            ),
            **{name: Relayout((name,), by_shard) for name in cls.branch_parameters},
            **nested("output", Output.decode_leaves(config)),
        }

    # What a variant may override:

    def branch_parameter(self, rngs: nnx.Rngs, init: Initializer) -> nnx.Param:
        """A parameter [J] with one number per branch; in the decode layout [U], one per KV-head shard."""
        train = self.layout == "train"
        shape, names = (
            (self.sizes.n_branches if train else self.shards.count,),
            (None if train else "kv_head_shards",),
        )
        return parameter(rngs, self.rules, shape, names, init, self.config.param_dtype, self.layout)

    def head_queries(self, q_nope: jax.Array, q_rope: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Transforms the query heads [B, T, N, H] and [B, T, N, R] before rotation; the identity by default."""
        return q_nope, q_rope

    def branch_queries(self, q: jax.Array, *branch_parameters: jax.Array) -> jax.Array:
        """Transforms one part of the queries by branch, [B, T, J or 1, ..., heads, width]; the identity by default.

        Args:
          q: rotary, content or absorbed content queries; the third axis is 1 where all branches are still the same.
          *branch_parameters: the values of the attribute of this name, shaped to broadcast against `q`.
        """
        return q

    def _branch_inputs(self) -> tuple[list[jax.Array], list[Names]]:
        """The branch parameters and their logical axes, as arguments of a function that runs on each device."""
        values = [weight(self.rules, getattr(self, name)) for name in self.branch_parameters]
        return values, [(None,) if self.layout == "train" else ("kv_head_shards",)] * len(values)

    @property
    def absorbs(self) -> bool:
        """Whether full-sequence attention runs in the absorbed form (docs/architecture.md)."""
        a, form = self.sizes, self.execution.attention_form
        if form == "auto":
            return 2 * a.d_latent + a.d_rope <= 2 * a.d_nope + a.d_rope
        return form == "absorbed"

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        self.require_layout("train")
        rules, dtype = self.rules, self.compute_dtype
        x_BTD = x_BTD.astype(dtype)
        positions = rules.positions(x_BTD.shape[1])
        q_BTA, kv_BTLC, k_rope_BTR = products(
            rules,
            x_BTD,
            ("BTD,DA->BTA", self.w_qa, ROWS),
            ("BTD,DLC->BTLC", self.w_kva, (*ROWS, None)),
            ("BTD,DR->BTR", self.w_kr, ROWS),
        )
        q_BTA = (self.q_norm(q_BTA) * self.q_scale).astype(dtype)
        w_qb, h = weight(rules, self.w_qb, dtype), self.sizes.d_nope
        # Two products, because slicing the matrix costs less than slicing the result.
        q_nope, q_rope = self.head_queries(
            *(rules.einsum("BTA,ANE->BTNE", q_BTA, w, out=HEADS) for w in (w_qb[..., :h], w_qb[..., h:]))
        )
        # Saved after the rotation, whose derivative needs no inputs.
        q_rope = checkpoint_name(rotate(q_rope, positions, self.frequencies), PRODUCT)
        kv_latent = (self.kv_norm(kv_BTLC) * self.kv_scale).astype(dtype)
        k_rope = rotate(k_rope_BTR, positions, self.frequencies)
        w_uk, w_uv = (stored(w, dtype) for w in (self.w_uk, self.w_uv))
        up = (None, "heads", self._stored_rank, None)
        branch, branch_names = self._branch_inputs()
        in_names = (HEADS, HEADS, (*ROWS, None), ROWS, up, up, *branch_names)
        attend = rules.shard_map(self._attend, in_names, HEADS)
        return self.output(x_BTD, attend(q_nope, q_rope, kv_latent, k_rope, w_uk, w_uv, *branch))

    @property
    def _stored_rank(self) -> str | None:
        """Logical axis that splits C of W_UK and W_UV when they enter `_attend`."""
        rank = self.rules.fitting("rank", self.sizes.d_latent)
        return rank and self.rules.within(rank, "batch")

    def _attend(
        self,
        q_nope: jax.Array,  # [B, T, N, H], this device's T and N
        q_rope: jax.Array,  # [B, T, N, R]
        kv_latent: jax.Array,  # [B, T, L, C]
        k_rope: jax.Array,  # [B, T, R]
        w_uk: jax.Array,  # [J, N, C, H], C in parts
        w_uv: jax.Array,  # [J, N, C, H]
        *branch: jax.Array,  # [J]
    ) -> jax.Array:
        """On each device: the heads' output y [B, T, N, H]."""
        a, rules = self.sizes, self.rules
        whole = lambda w: rules.all_gather(rules.vary(w, "batch", "length"), self._stored_rank, axis=2)
        w_uk, w_uv = whole(w_uk), whole(w_uv)
        kv_latent, k_rope = rules.all_tokens(kv_latent), rules.all_tokens(k_rope)
        (b, t, n, h), s = q_nope.shape, kv_latent.shape[1]
        j, c, heads_per_latent = a.n_branches, a.d_latent, self.shards.heads_per_latent
        # The device's query heads fall into g runs of m heads that belong to one group, and so read the same latents.
        m = math.gcd(n, heads_per_latent)
        g = n // m
        kv_BSJGC = kv_latent.reshape(b, s, j, a.n_groups, c)
        if a.n_groups > 1:
            groups = (rules.axis_index("heads") * n + m * jnp.arange(g)) // heads_per_latent
            kv_BSJGC = jnp.take(kv_BSJGC, groups, axis=3)
        w_uk, w_uv = (w.reshape(j, g, m, c, h) for w in (w_uk, w_uv))
        q_nope_BTGMH, q_rope_BTGMR = (q.reshape(b, t, g, m, -1) for q in (q_nope, q_rope))

        def attend(parts: list[tuple[jax.Array, jax.Array]], v: jax.Array | None) -> jax.Array:
            queries, keys = zip(*parts, strict=True)
            of_run = lambda *queries, q_start: causal_attention_parts(
                list(zip(queries, keys, strict=True)), v, scale=self.softmax_scale, q_start=q_start
            )
            return attend_own(rules, of_run, *queries)

        branch_queries = lambda q: self.branch_queries(q, *(value.reshape(j, 1, 1, 1) for value in branch))
        q_rope_BTJGMR = branch_queries(q_rope_BTGMR[:, :, None])  # J is 1 if all branches have the same
        if self.absorbs:
            # Heads (J, G): what all branches or heads share is passed once.
            q_GMBTJC = checkpoint_name(_to_latents(q_nope_BTGMH, w_uk), QUERIES)
            q_BTJGMC = branch_queries(q_GMBTJC.transpose(2, 3, 4, 0, 1, 5)).reshape(b, t, j * g, m, c)
            rope = (jax.lax.collapse(q_rope_BTJGMR, 2, 4), k_rope[:, :, None])
            parts = [(q_BTJGMC, kv_BSJGC.reshape(b, s, j * g, c)), rope]
            z_BTJGMC = attend(parts[: 1 + bool(a.d_rope)], None).reshape(b, t, j, g, m, c)
            y = _from_latents(z_BTJGMC.transpose(3, 4, 0, 1, 2, 5), self.branch_scale * w_uv)
        else:
            k_BSJGMH, v_BSJGMH = (jnp.einsum("BSJGC,JGMCH->BSJGMH", kv_BSJGC, w) for w in (w_uk, w_uv))
            by_head = lambda x: jax.lax.collapse(x, 2, 5)
            parts = [
                (by_head(branch_queries(q_nope_BTGMH[:, :, None]))[:, :, :, None], by_head(k_BSJGMH)),
                (by_head(q_rope_BTJGMR)[:, :, :, None], k_rope[:, :, None]),
            ]
            y = attend(parts[: 1 + bool(a.d_rope)], by_head(v_BSJGMH))
            y = self.branch_scale * y.reshape(b, t, j, n, h).astype(jnp.float32).sum(axis=2)
        y = y.astype(self.compute_dtype).reshape(b, t, n, h)
        return checkpoint_name(y, HEADS_OUTPUT)

    def decode(
        self,
        x_BTD: jax.Array,
        cache: LayerCache,
        start_B: jax.Array,
        n_new_B: jax.Array,
        *,
        reduce: bool = True,
    ) -> tuple[jax.Array, LayerCache]:
        """See `Attention.decode`; in the absorbed form."""
        self.require_layout("decode")
        rules, dtype, shards, h = self.rules, self.compute_dtype, self.shards, self.sizes.d_nope
        rows, by_shard = ("batch",), ("batch", None, "kv_head_shards", None)
        x_BTD = x_BTD.astype(dtype)
        with jax.named_scope("latents"):
            a_BTXE = decode_product(rules, x_BTD, weight(rules, self.w_a, dtype), by_shard)
        with jax.named_scope("append"):
            gains = (weight(rules, norm.gain) for norm in (self.q_norm, self.kv_norm))
            append_names = (cache.specs(), rows, rows, by_shard, (None,), ("kv_head_shards", None))
            # All devices compute the same queries and rotary keys; the check cannot infer that.
            q_BTA, cache = rules.shard_map(
                self._normalize_and_append, append_names, (ROWS, cache.specs()), check_vma=False
            )(cache, start_B, n_new_B, a_BTXE, *gains)
        with jax.named_scope("queries"):
            q_BTNE = decode_product(rules, q_BTA, weight(rules, self.w_qb, dtype), HEADS)
            q_BTNE = jnp.concatenate(self.head_queries(q_BTNE[..., :h], q_BTNE[..., h:]), axis=-1)
        branch, branch_names = self._branch_inputs()
        in_names = (
            cache.specs(),
            rows,
            rows,
            ("batch", None, shards.query_axis, None),  # gathers q unless aligned
            *[("kv_head_shards", *[None] * 5)] * 2,
            *self.output.shard_input_names(shards),
            *branch_names,
        )
        attend = functools.partial(self._attend_absorbed, reduce=reduce)
        summed = rules.shard_map(attend, in_names, self.output.shard_output_names(shards, reduce))(
            cache,
            start_B,
            n_new_B,
            q_BTNE,
            *(weight(rules, w, dtype) for w in (self.w_uk, self.w_uv)),
            *self.output.shard_inputs(x_BTD, shards),
            *branch,
        )
        return self.output.finish(x_BTD, summed, shards, reduce), cache

    def _attend_absorbed(
        self,
        cache: LayerCache,
        start_B: jax.Array,
        n_new_B: jax.Array,
        q_BTNE: jax.Array,
        w_uk: jax.Array,  # [1, U', M, J', C, H]
        w_uv: jax.Array,  # [1, U', M, H, J', C]
        gate_BTNH: jax.Array | None,
        w_o_DNH: jax.Array | None,
        *branch: jax.Array,  # [U]
        reduce: bool,
    ) -> jax.Array:
        """On each device: absorbs W_UK, attends over its KV-head shards, applies W_UV, sums branches and devices."""
        shards = self.shards
        w_UMJCH, w_UMHJC = w_uk.squeeze(0), w_uv.squeeze(0)
        u, m, j, c, h = w_UMJCH.shape
        b, t = q_BTNE.shape[:2]
        branch_queries = lambda q: self.branch_queries(q, *(value.reshape(j, u, 1, 1) for value in branch))
        with jax.named_scope("absorb"):
            q_BTUME = shards.gather(q_BTNE, j * u)[:, :, :u]  # the same for all branches
            q_BTJUMC = branch_queries(jnp.einsum("BTUMH,UMJCH->BTJUMC", q_BTUME[..., :h], w_UMJCH))
            q_rope = branch_queries(q_BTUME[:, :, None])
        with jax.named_scope("attend"):
            z_BTJUMC = cache.attend_latents(
                q_BTJUMC.reshape(b, t, j * u, m, c),
                jax.lax.collapse(q_rope, 2, 4),
                start_B,
                n_new_B,
                scale=self.softmax_scale,
                frequencies=self.frequencies,
            ).reshape(b, t, j, u, m, c)
        # Batch axes first: with "->BTUMH", einsum would emit a bfloat16 product that XLA lacks on the CPU.
        with jax.named_scope("values"):
            y_UMBTH = jnp.einsum("BTJUMC,UMHJC->UMBTH", z_BTJUMC, w_UMHJC, preferred_element_type=jnp.float32)
        y_BTUMH = y_UMBTH.transpose(2, 3, 0, 1, 4)
        return self.output.sum_shards(shards, y_BTUMH, gate_BTNH, w_o_DNH, self.branch_scale, reduce)

    def _normalize_and_append(
        self,
        cache: LayerCache,
        start_B: jax.Array,
        n_new_B: jax.Array,
        a_BTXE: jax.Array,  # [B, T, 1, A + U*C + R]
        q_gain_A: jax.Array,
        kv_gain_UC: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        """On each device: the normalised queries [B, T, A], and the cache with the new latents and rotary keys."""
        return cache.append_latents(
            a_BTXE.squeeze(2),
            q_gain_A,
            kv_gain_UC,
            start_B,
            n_new_B,
            eps=self.config.norm_eps,
            q_scale=self.q_scale,
            kv_scale=self.kv_scale,
            frequencies=self.frequencies,
        )
