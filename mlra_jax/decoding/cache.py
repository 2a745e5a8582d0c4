"""The KV cache: create, append, attend, bytes. Its array layout is known here and nowhere else.

A layer's cache holds arrays by cached head, [B, U, S, W] with U slots (`models.attention.slots`), and arrays shared by
all heads, [B, S, W]. Slots of heads are split over `tensor`, sequences over `data`, and the S token slots over
`context`, striped by page: page p of the tokens lies on device p mod n, so that short sequences spread too.

In the feature-major layout, the one for TPU, W comes before S; `Cache.create` takes the layout of the current device.

`append` and `attend` run inside `shard_map`, on each device's own part.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp

from mlra_jax.config import (
    ConfigError,
    GroupedAttentionConfig,
    LatentAttentionConfig,
    MeshConfig,
    ModelConfig,
    TensorProductAttentionConfig,
    TiedAttentionConfig,
)
from mlra_jax.models.attention.slots import Slots
from mlra_jax.ops.append import append_latents, append_tokens
from mlra_jax.ops.decode import (
    factored_decode_attention,
    grouped_decode_attention,
    latent_decode_attention,
)
from mlra_jax.ops.decode.api import Layout
from mlra_jax.ops.device import current_device
from mlra_jax.ops.rotary import Frequencies, rotary_tables
from mlra_jax.sharding import AxisRules, abstract_mesh, cached_head_faults, decode_rules

PAGE_SIZE: dict[Layout, int] = {"token_major": 64, "feature_major": 512}
"""Tokens in a page: a block of the kernels that read them."""

_AXES: dict[tuple[Layout, int], tuple[str | None, ...]] = {
    ("token_major", 4): ("batch", "latent_slots", "cache_length", None),
    ("token_major", 3): ("batch", "cache_length", None),
    ("feature_major", 4): ("batch", "latent_slots", None, "cache_length"),
    ("feature_major", 3): ("batch", None, "cache_length"),
}
"""Logical axes of an array by cached head, and of one shared by all heads."""


def preferred_layout() -> Layout:
    """The layout that the attention kernels of the device that is compiled for read: on TPU the lanes are tokens."""
    return "feature_major" if current_device()[0] == "tpu" else "token_major"


def repeat_rows(rules: AxisRules, n: int, x: jax.Array, *names: str | None) -> jax.Array:
    """Each row of axis 0 `n` times in a row; the copies stay on the devices that hold it, so that nothing moves.

    Args:
      rules: the decoding table.
      n: copies.
      x: the array.
      *names: logical names of its axes.
    """
    return rules.shard_map(lambda x: jnp.repeat(x, n, axis=0), (names,), names)(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What one attention layer has cached."""

    arrays: dict[str, Any]
    rules: AxisRules = dataclasses.field(metadata={"static": True})
    page_size: int = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})

    def _axes(self, array: Any) -> tuple[str | None, ...]:
        return _AXES[self.layout, array.ndim]

    def specs(self) -> Self:
        """This cache with `PartitionSpec`s for arrays."""
        specs = {k: self.rules.spec(*self._axes(v)) for k, v in self.arrays.items()}
        return dataclasses.replace(self, arrays=specs)

    def repeat(self, n: int) -> Self:
        """The cache with `n` copies of each row, one after the other."""
        arrays = {k: repeat_rows(self.rules, n, v, *self._axes(v)) for k, v in self.arrays.items()}
        return dataclasses.replace(self, arrays=arrays)

    def add(self, new: Mapping[str, jax.Array], start_B: jax.Array, n_new_B: jax.Array) -> Self:
        """`append` on every device, of arrays that are laid out by the table or will be."""
        by_head, shared, rows = ("batch", None, "latent_slots", None), ("batch", None, None), ("batch",)
        names = {name: by_head if x.ndim == 4 else shared for name, x in new.items()}
        append = lambda cache, *args: cache.append(*args)
        with jax.named_scope("append"):
            add = self.rules.shard_map(append, (self.specs(), names, rows, rows), self.specs())
            return add(self, dict(new), start_B, n_new_B)

    # Inside `shard_map`:

    @property
    def n_slots(self) -> int:
        """Slots of this device."""
        return next(x.shape[1] for x in self.arrays.values() if x.ndim == 4)

    def append(self, new: Mapping[str, jax.Array], start_B: jax.Array, n_new_B: jax.Array) -> Self:
        """The cache with the tokens `new` (by head [B, T, U, W], shared [B, T, W]) at positions from `start_B` on.

        Of row b the first `n_new_B[b]` tokens are written; tokens past the end of the cache are dropped.
        """
        arrays = {}
        for name, array in self.arrays.items():
            capacity = array.shape[self._axes(array).index("cache_length")]
            slot_BT = self._slots(capacity, start_B, n_new_B, new[name].shape[1])
            arrays[name] = append_tokens(array, new[name], slot_BT, layout=self.layout)
        return dataclasses.replace(self, arrays=arrays)

    def _slots(self, capacity: int, start_B: jax.Array, n_new_B: jax.Array, t: int) -> jax.Array:
        """Where this device keeps the T tokens from `start_B` on, [B, T]: past its end if they are not its own."""
        n, me = self.rules.size("cache_length"), self.rules.axis_index("cache_length")
        offset_T = jnp.arange(t)
        position_BT = start_B[:, None] + offset_T
        page_BT = position_BT // self.page_size
        slot_BT = page_BT // n * self.page_size + position_BT % self.page_size
        mine_BT = (page_BT % n == me) & (offset_T < n_new_B[:, None])
        return jnp.where(mine_BT, slot_BT, capacity).astype(jnp.int32)

    def _visible(self, start_B: jax.Array, n_new_B: jax.Array, t: int) -> jax.Array:
        """How many of this device's leading slots each of the T new queries sees, [B, T]."""
        n, me = self.rules.size("cache_length"), self.rules.axis_index("cache_length")
        seen_BT = start_B[:, None] + jnp.minimum(jnp.arange(t) + 1, n_new_B[:, None])
        pages_BT, rest_BT = seen_BT // self.page_size, seen_BT % self.page_size
        whole_BT = (pages_BT - me + n - 1) // n * self.page_size
        return (whole_BT + jnp.where(pages_BT % n == me, rest_BT, 0)).astype(jnp.int32)

    def _merge(self, out: jax.Array, lse: jax.Array) -> jax.Array:
        """Attention over all tokens, from what each device gives for its own."""
        if self.rules.size("cache_length") == 1:
            return self.rules.psum(out, "cache_length")
        top = self.rules.pmax(lse, "cache_length")
        share = jnp.exp(lse - jnp.where(jnp.isfinite(top), top, 0.0))
        total = self.rules.psum(share, "cache_length")
        summed = self.rules.psum(out.astype(jnp.float32) * share[..., None], "cache_length")
        return (summed / jnp.where(total > 0, total, 1.0)[..., None]).astype(out.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache(LayerCache):
    """`kv_latent` [B, U, S, C] and `k_rope` [B, S, R]; features before tokens in the feature-major layout."""

    def enter(
        self,
        a_BTE: jax.Array,
        q_gain: jax.Array,
        kv_gain: jax.Array,
        start_B: jax.Array,
        n_new_B: jax.Array,
        *,
        eps: float,
        q_scale: float,
        kv_scale: float,
        frequencies: Frequencies,
    ) -> tuple[jax.Array, Self]:
        """Normalises queries and latents, rotates keys, and appends latents and keys.

        Args:
          a_BTE: products of the new tokens with W_qa, this device's part of W_kva, and W_kr: [B, T, A + U*C + R].
          q_gain: of the queries' norm, [A].
          kv_gain: of the latents' norms, [U, C].
          start_B: see `append`.
          n_new_B: see `append`.
          eps: of the norms.
          q_scale: multiplies the normalised queries.
          kv_scale: multiplies the normalised latents.
          frequencies: of the rotation, see `mlra_jax.ops.rotary.rotary_tables`.

        Returns:
          The normalised, scaled queries [B, T, A], and the cache.
        """
        kv_latent, k_rope = self.arrays["kv_latent"], self.arrays["k_rope"]
        t = a_BTE.shape[1]
        capacity = kv_latent.shape[self._axes(kv_latent).index("cache_length")]
        q_BTA, kv_latent, k_rope = append_latents(
            a_BTE,
            q_gain,
            kv_gain,
            start_B[:, None] + jnp.arange(t),
            self._slots(capacity, start_B, n_new_B, t),
            kv_latent,
            k_rope,
            eps=eps,
            q_scale=q_scale,
            kv_scale=kv_scale,
            frequencies=frequencies,
            layout=self.layout,
        )
        return q_BTA, dataclasses.replace(self, arrays={"kv_latent": kv_latent, "k_rope": k_rope})

    def attend(
        self,
        q_nope: jax.Array,
        q_rope: jax.Array,
        start_B: jax.Array,
        n_new_B: jax.Array,
        *,
        scale: float,
        frequencies: Frequencies | None = None,
    ) -> jax.Array:
        """Absorbed attention of the new queries over the cache.

        Args:
          q_nope: [B, T, U, M, C].
          q_rope: by slot, or shared by several of them: [B, T, G, M, E], see `latent_decode_attention`.
          start_B: see `append`.
          n_new_B: see `append`.
          scale: of the scores.
          frequencies: by which `q_rope` is rotated first; None: it has been.

        Returns:
          z [B, T, U, M, C].
        """
        t = q_nope.shape[1]
        kv_latent, k_rope = self.arrays["kv_latent"], self.arrays["k_rope"]
        rotary = None
        if frequencies is not None:
            rotary = rotary_tables(start_B[:, None] + jnp.arange(t), frequencies)
        seen = self._visible(start_B, n_new_B, t)
        out, lse = latent_decode_attention(
            q_nope, q_rope, kv_latent, k_rope, seen, scale=scale, rotary=rotary, layout=self.layout
        )
        return self._merge(out, lse)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupedCache(LayerCache):
    """`k` and `v` [B, U, S, H]; features before tokens in the feature-major layout."""

    def attend(self, q: jax.Array, start_B: jax.Array, n_new_B: jax.Array, *, scale: float) -> jax.Array:
        """Attention of the new queries [B, T, U, M, H] over the cache; [B, T, U, M, H]."""
        seen = self._visible(start_B, n_new_B, q.shape[1])
        k, v = self.arrays["k"], self.arrays["v"]
        return self._merge(*grouped_decode_attention(q, k, v, seen, scale=scale, layout=self.layout))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactoredCache(LayerCache):
    """`a_k`, `a_v` [B, U, S, r], `b_k`, `b_v` [B, S, r * H]; features before tokens in the feature-major layout."""

    def attend(self, q: jax.Array, start_B: jax.Array, n_new_B: jax.Array, *, scale: float) -> jax.Array:
        """Attention of the new queries [B, T, U, M, H] over the cache; [B, T, U, M, H]."""
        seen = self._visible(start_B, n_new_B, q.shape[1])
        a_k, b_k, a_v, b_v = (self.arrays[name] for name in ("a_k", "b_k", "a_v", "b_v"))
        out, lse = factored_decode_attention(q, a_k, b_k, a_v, b_v, seen, scale=scale, layout=self.layout)
        return self._merge(out, lse)


def _layer_arrays(
    config: ModelConfig, rules: AxisRules
) -> tuple[type[LayerCache], dict[str, tuple[int, ...]]]:
    """The kind of a layer's cache, and for each of its arrays slots and width, or the width that all heads share."""
    u = Slots.of(config, rules).count
    match config.attention:
        case LatentAttentionConfig() as a:
            return LatentCache, {"kv_latent": (u, a.d_latent), "k_rope": (a.d_rope,)}
        case TiedAttentionConfig() as a:
            return LatentCache, {"kv_latent": (u, a.d_head), "k_rope": (a.d_rope,)}
        case GroupedAttentionConfig() as a:
            return GroupedCache, {"k": (u, a.d_head), "v": (u, a.d_head)}
        case TensorProductAttentionConfig() as a:
            by_head, shared = (u, a.rank), (a.rank * a.d_head,)
            return FactoredCache, {"a_k": by_head, "b_k": shared, "a_v": by_head, "b_v": shared}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The caches of all layers, and how many tokens each row of the batch holds."""

    layers: tuple[Any, ...]
    """`LatentCache`, `GroupedCache` or `FactoredCache`."""
    lengths: Any  # int32 [B]

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        rules: AxisRules,
        batch: int,
        max_len: int,
        *,
        page_size: int | None = None,
        layout: Layout | None = None,
    ) -> Cache:
        """An empty cache for `batch` rows of at least `max_len` tokens, laid out over the current mesh.

        Args:
          config: of the model.
          rules: the decoding table.
          batch: rows; a multiple of the mesh axes that split `batch`.
          max_len: tokens; rounded up to whole pages on every device.
          page_size: tokens in a page; None: `PAGE_SIZE` of the layout.
          layout: of the arrays; None: what the kernels of the current device read (`preferred_layout`).
        """
        layout = layout or preferred_layout()
        page_size = page_size or PAGE_SIZE[layout]
        stripe = page_size * rules.size("cache_length")
        length = -(-max_len // stripe) * stripe
        dtype = jnp.dtype(config.compute_dtype)
        kind, shapes = _layer_arrays(config, rules)

        def layer() -> LayerCache:
            arrays = {}
            for name, (*heads, width) in shapes.items():
                last = (length, width) if layout == "token_major" else (width, length)
                zeros = jnp.zeros((batch, *heads, *last), dtype)
                arrays[name] = rules.constrain(zeros, *_AXES[layout, zeros.ndim])
            return kind(arrays, rules, page_size, layout)

        lengths = rules.constrain(jnp.zeros(batch, jnp.int32), "batch")
        return cls(tuple(layer() for _ in range(config.n_layers)), lengths)

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        first = self.layers[0]
        return next(iter(first.arrays.values())).shape[-2 if first.layout == "token_major" else -1]

    def repeat(self, n: int) -> Cache:
        """The cache with `n` copies of each row, one after the other, on the devices that hold the row."""
        lengths = repeat_rows(self.layers[0].rules, n, self.lengths, "batch")
        return Cache(tuple(layer.repeat(n) for layer in self.layers), lengths)

    def bytes_per_device(self) -> int:
        """Bytes of keys, values or latents that the fullest device holds, read off the arrays' shards."""
        held: dict[Any, int] = {}
        for layer in self.layers:
            for array in layer.arrays.values():
                for shard in array.addressable_shards:
                    held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
        return max(held.values())


def values_per_token(config: ModelConfig, tensor: int = 1) -> int:
    """Values that each of `tensor` devices caches for one token in one layer.

    Read off the abstract cache under the decoding table, so that it is what decoding allocates: heads are held by
    several devices where there are fewer of them than devices.

    Args:
      config: of the model.
      tensor: size of the mesh axis over which cached heads are split.

    Raises:
      ConfigError: the cached heads cannot be laid out over so many devices; says which sizes fit.
    """
    if faults := cached_head_faults(config, tensor):
        raise ConfigError(faults)
    one_layer = dataclasses.replace(config, n_layers=1)
    with jax.sharding.use_abstract_mesh(abstract_mesh(MeshConfig(1, 1, tensor, 1))):
        cache = jax.eval_shape(functools.partial(Cache.create, one_layer, decode_rules(), 1, 1))
    arrays = cache.layers[0].arrays.values()
    return sum(math.prod(x.sharding.shard_shape(x.shape)) for x in arrays) // cache.capacity
