"""The KV cache: arrays, their layout, and pages. `AttentionConfig.cache_arrays` says what an attention caches.

A layer's cache holds per-head arrays [B, U, S, W], with U KV-head shards (`head_shards`), and arrays that all heads
share, [B, S, W]. Shards are split over `tensor`, sequences over `data`, and the S positions over `context`, striped by
page: page p of the tokens is on device p mod n, so that short sequences are spread too.

In the feature-major layout, which TPUs use, W comes before S; `create` takes the layout of the current device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp

from mlra_jax.attention.head_shards import HeadShards
from mlra_jax.config import ConfigError, MeshConfig, ModelConfig
from mlra_jax.ops.append import append, normalize_and_append
from mlra_jax.ops.decode import latent_decode_attention
from mlra_jax.ops.decode.api import Layout
from mlra_jax.ops.device import current_device
from mlra_jax.ops.rotary import Frequencies, rotary_tables
from mlra_jax.sharding import AxisRules, abstract_mesh, cached_head_faults, decode_rules

PAGE_SIZE: dict[Layout, int] = {"token_major": 64, "feature_major": 512}
"""Tokens per page: what the kernels read as one block."""

_AXES: dict[tuple[Layout, int], tuple[str | None, ...]] = {
    ("token_major", 4): ("batch", "kv_head_shards", "cache_length", None),
    ("token_major", 3): ("batch", "cache_length", None),
    ("feature_major", 4): ("batch", "kv_head_shards", None, "cache_length"),
    ("feature_major", 3): ("batch", None, "cache_length"),
}
"""Logical axes of a per-head array, and of one that all heads share."""


def preferred_layout() -> Layout:
    """The layout that the attention kernels of the current device read: on TPUs, tokens are the lanes."""
    return "feature_major" if current_device()[0] == "tpu" else "token_major"


def take_rows(rules: AxisRules, x: jax.Array, row_P: jax.Array, *names: str | None) -> jax.Array:
    """Rows of axis 0, which the table's `batch` splits; each device takes from its own rows, so nothing moves.

    Args:
      rules: the decoding table.
      x: the array.
      row_P: which rows, split as those of `x`, each numbered among the rows of its device; the last one stands for any
        number past the end.
      *names: logical names of the axes of `x`.
    """
    take = lambda x, row_P: jnp.take(x, row_P, axis=0, mode="clip")
    return rules.shard_map(take, (names, ("batch",)), names)(x, row_P)


def put_rows(
    rules: AxisRules, x: jax.Array, row_P: jax.Array, new: jax.Array, *names: str | None
) -> jax.Array:
    """`x` with the rows `new` in the places that `take_rows` takes; a number past the end drops its row."""
    put = lambda x, row_P, new: x.at[row_P].set(new, mode="drop")
    return rules.shard_map(put, (names, ("batch",), names), names)(x, row_P, new)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """The cache of one attention layer."""

    arrays: dict[str, Any]
    rules: AxisRules = dataclasses.field(metadata={"static": True})
    page_size: int = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(
        cls, config: ModelConfig, rules: AxisRules, batch: int, max_len: int, page_size: int, layout: Layout
    ) -> Self:
        """An empty cache of one layer; see `Cache.create`."""
        stripe = page_size * rules.size("cache_length")
        length = -(-max_len // stripe) * stripe
        shards = HeadShards.of(config, rules).count
        arrays = {}
        for name, (width, by_head) in config.attention.cache_arrays().items():
            last = (length, width) if layout == "token_major" else (width, length)
            shape = (batch, shards, *last) if by_head else (batch, *last)
            zeros = jnp.zeros(shape, config.compute_dtype)
            arrays[name] = rules.constrain(zeros, *_AXES[layout, zeros.ndim])
        return cls(arrays, rules, page_size, layout)

    def __getitem__(self, name: str) -> Any:
        """One of the arrays."""
        return self.arrays[name]

    @property
    def capacity(self) -> int:
        """Tokens that each row can hold."""
        return next(iter(self.arrays.values())).shape[-2 if self.layout == "token_major" else -1]

    def _axes(self, array: Any) -> tuple[str | None, ...]:
        return _AXES[self.layout, array.ndim]

    def specs(self) -> Self:
        """This cache with each array's `PartitionSpec` in its place."""
        specs = {k: self.rules.spec(*self._axes(v)) for k, v in self.arrays.items()}
        return dataclasses.replace(self, arrays=specs)

    def take(self, row_P: jax.Array) -> Self:
        """The cache of some rows; see `take_rows`."""
        arrays = {k: take_rows(self.rules, v, row_P, *self._axes(v)) for k, v in self.arrays.items()}
        return dataclasses.replace(self, arrays=arrays)

    def put(self, row_P: jax.Array, rows: Self) -> Self:
        """The cache with some rows replaced; see `put_rows`."""
        arrays = {
            k: put_rows(self.rules, v, row_P, rows.arrays[k], *self._axes(v)) for k, v in self.arrays.items()
        }
        return dataclasses.replace(self, arrays=arrays)

    def append(self, new: Mapping[str, jax.Array], start_B: jax.Array, n_new_B: jax.Array) -> Self:
        """The cache with T new tokens (per-head arrays [B, T, U, W], shared [B, T, W]) written from `start_B` on.

        The first `n_new_B[b]` tokens of row b are written; tokens past the end of the cache are dropped.
        """
        by_head, shared, rows = ("batch", None, "kv_head_shards", None), ("batch", None, None), ("batch",)
        names = {name: by_head if x.ndim == 4 else shared for name, x in new.items()}
        with jax.named_scope("append"):
            append = self.rules.shard_map(
                type(self).append_local, (self.specs(), names, rows, rows), self.specs()
            )
            return append(self, dict(new), start_B, n_new_B)

    # Inside `shard_map`:

    @property
    def n_shards(self) -> int:
        """Number of KV-head shards on this device."""
        return next(x.shape[1] for x in self.arrays.values() if x.ndim == 4)

    def append_local(self, new: Mapping[str, jax.Array], start_B: jax.Array, n_new_B: jax.Array) -> Self:
        """`append` for this device's part."""
        position_BT = self.positions(start_B, n_new_B, next(iter(new.values())).shape[1])
        arrays = {
            name: append(array, new[name], position_BT, layout=self.layout)
            for name, array in self.arrays.items()
        }
        return dataclasses.replace(self, arrays=arrays)

    def append_latents(
        self,
        a_BTE: jax.Array,
        q_gain_A: jax.Array,
        kv_gain_UC: jax.Array,
        start_B: jax.Array,
        n_new_B: jax.Array,
        *,
        eps: float,
        q_scale: float,
        kv_scale: float,
        frequencies: Frequencies,
    ) -> tuple[jax.Array, Self]:
        """Normalises queries and latents of T new tokens, rotates their keys, and appends latents and keys.

        Args:
          a_BTE: queries, latents and rotary keys side by side; see `mlra_jax.ops.append.normalize_and_append`.
          q_gain_A: of the queries' norm.
          kv_gain_UC: of the latents' norms.
          start_B: see `append`.
          n_new_B: see `append`.
          eps: of the norms.
          q_scale: of the queries.
          kv_scale: of the latents.
          frequencies: of the rotation.

        Returns:
          The normalised queries [B, T, A], and the cache.
        """
        t = a_BTE.shape[1]
        q_BTA, kv_latent, k_rope = normalize_and_append(
            a_BTE,
            q_gain_A,
            kv_gain_UC,
            start_B[:, None] + jnp.arange(t),
            self.positions(start_B, n_new_B, t),
            self["kv_latent"],
            self["k_rope"],
            eps=eps,
            q_scale=q_scale,
            kv_scale=kv_scale,
            frequencies=frequencies,
            layout=self.layout,
        )
        return q_BTA, dataclasses.replace(self, arrays={"kv_latent": kv_latent, "k_rope": k_rope})

    def attend_latents(
        self,
        q_nope: jax.Array,
        q_rope: jax.Array,
        start_B: jax.Array,
        n_new_B: jax.Array,
        *,
        scale: float,
        frequencies: Frequencies,
    ) -> jax.Array:
        """Attention of T new tokens, which have been appended, over all tokens of their rows: [B, T, U, M, C].

        Args:
          q_nope: absorbed content queries [B, T, U, M, C]; see `mlra_jax.ops.decode.latent_decode_attention`.
          q_rope: rotary queries, not yet rotated.
          start_B: see `append`.
          n_new_B: see `append`.
          scale: of the scores.
          frequencies: of the rotation.
        """
        t = q_nope.shape[1]
        out, lse = latent_decode_attention(
            q_nope,
            q_rope,
            self["kv_latent"],
            self["k_rope"],
            self.visible(start_B, n_new_B, t),
            scale=scale,
            rotary=rotary_tables(start_B[:, None] + jnp.arange(t), frequencies),
            layout=self.layout,
        )
        return self.merge(out, lse)

    def positions(self, start_B: jax.Array, n_new_B: jax.Array, t: int) -> jax.Array:
        """This device's positions [B, T] of the T tokens from `start_B` on; past its end for other devices' tokens."""
        n, me = self.rules.size("cache_length"), self.rules.axis_index("cache_length")
        offset_T = jnp.arange(t)
        token_BT = start_B[:, None] + offset_T
        page_BT = token_BT // self.page_size
        position_BT = page_BT // n * self.page_size + token_BT % self.page_size
        mine_BT = (page_BT % n == me) & (offset_T < n_new_B[:, None])
        return jnp.where(mine_BT, position_BT, self.capacity).astype(jnp.int32)

    def visible(self, start_B: jax.Array, n_new_B: jax.Array, t: int) -> jax.Array:
        """The number of this device's leading positions that each of the T new queries attends to, [B, T]."""
        n, me = self.rules.size("cache_length"), self.rules.axis_index("cache_length")
        seen_BT = start_B[:, None] + jnp.minimum(jnp.arange(t) + 1, n_new_B[:, None])
        pages_BT, rest_BT = seen_BT // self.page_size, seen_BT % self.page_size
        whole_BT = (pages_BT - me + n - 1) // n * self.page_size
        return (whole_BT + jnp.where(pages_BT % n == me, rest_BT, 0)).astype(jnp.int32)

    def merge(self, out: jax.Array, lse: jax.Array) -> jax.Array:
        """Attention over all tokens, from each device's output and log-sum-exp over its own tokens."""
        if self.rules.size("cache_length") == 1:
            return self.rules.psum(out, "cache_length")
        top = self.rules.pmax(lse, "cache_length")
        share = jnp.exp(lse - jnp.where(jnp.isfinite(top), top, 0.0))
        total = self.rules.psum(share, "cache_length")
        summed = self.rules.psum(out.astype(jnp.float32) * share[..., None], "cache_length")
        return (summed / jnp.where(total > 0, total, 1.0)[..., None]).astype(out.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The caches of all layers, and the number of tokens in each row of the batch."""

    layers: tuple[LayerCache, ...]
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
          config: the model's configuration.
          rules: the decoding table.
          batch: rows; a multiple of the size of the mesh axes that split `batch`.
          max_len: tokens per row, rounded up to whole pages on every device.
          page_size: tokens per page; None: `PAGE_SIZE` of the layout.
          layout: the arrays' layout; None: the one that the current device's kernels read (`preferred_layout`).
        """
        layout = layout or preferred_layout()
        sizes = config, rules, batch, max_len, page_size or PAGE_SIZE[layout], layout
        lengths = rules.constrain(jnp.zeros(batch, jnp.int32), "batch")
        return cls(tuple(LayerCache.create(*sizes) for _ in range(config.n_layers)), lengths)

    @property
    def capacity(self) -> int:
        """Tokens that each row can hold."""
        return self.layers[0].capacity

    def take(self, row_P: jax.Array, length_P: jax.Array) -> Cache:
        """The cache of some rows (`take_rows`), of each only the first `length_P` tokens."""
        return Cache(tuple(layer.take(row_P) for layer in self.layers), length_P)

    def repeat(self, n: int) -> Cache:
        """The cache with `n` consecutive copies of each row, on the devices that hold the row."""
        rules = self.layers[0].rules
        copies = lambda lengths: jnp.repeat(jnp.arange(len(lengths)), n)
        row_P = rules.shard_map(copies, (("batch",),), ("batch",))(self.lengths)
        return self.take(row_P, take_rows(rules, self.lengths, row_P, "batch"))

    def put(self, row_P: jax.Array, rows: Cache) -> Cache:
        """The cache with some rows replaced (`put_rows`)."""
        layers = zip(self.layers, rows.layers, strict=True)
        lengths = put_rows(self.layers[0].rules, self.lengths, row_P, rows.lengths, "batch")
        return Cache(tuple(mine.put(row_P, theirs) for mine, theirs in layers), lengths)

    def bytes_per_device(self) -> int:
        """Bytes of the cache's arrays on the device that holds most, read off their shards."""
        held: dict[Any, int] = {}
        for layer in self.layers:
            for array in layer.arrays.values():
                for shard in array.addressable_shards:
                    held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
        return max(held.values())


def values_per_token(config: ModelConfig, tensor: int = 1) -> int:
    """Values that each of `tensor` devices caches per token and layer.

    Read off the abstract cache under the decoding table, so it is what decoding allocates: where there are fewer heads
    than devices, several devices hold the same head.

    Args:
      config: the model's configuration.
      tensor: size of the mesh axis over which cached heads are split.

    Raises:
      ConfigError: the cached heads cannot be laid out over that many devices; the message says which sizes fit.
    """
    if faults := cached_head_faults(config, tensor):
        raise ConfigError(faults)
    one_layer = dataclasses.replace(config, n_layers=1)
    with jax.sharding.use_abstract_mesh(abstract_mesh(MeshConfig(1, 1, tensor, 1))):
        cache = jax.eval_shape(functools.partial(Cache.create, one_layer, decode_rules(), 1, 1))
    arrays = cache.layers[0].arrays.values()
    return sum(math.prod(x.sharding.shard_shape(x.shape)) for x in arrays) // cache.capacity
