"""The assignment of query heads to cached heads when decoding is split over devices.

A *KV-head shard* is a cached head on one device, with the query heads that it serves there. With at most as many
devices as cached heads (L), the shards are the heads. With r times as many, r devices hold each head, and each copy
serves an r-th of its M query heads: shard u = (j*G + g)*r + i holds head j*G + g and serves the M/r query heads
from gM + i*M/r on.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mlra_jax.config import ModelConfig
from mlra_jax.sharding import AxisRules, current_mesh


@dataclasses.dataclass(frozen=True)
class HeadShards:
    """The assignment of N query heads to L cached heads with J branches, under a decoding table."""

    rules: AxisRules
    n_heads: int
    n_cached: int
    n_branches: int

    @classmethod
    def of(cls, config: ModelConfig, rules: AxisRules) -> HeadShards:
        """The assignment of a model's heads."""
        return cls(rules, config.n_heads, config.cached_heads, config.attention.n_branches)

    @property
    def copies(self) -> int:
        """r: number of devices that hold the same cached head."""
        return max(1, self.rules.size("kv_head_shards") // self.n_cached)

    @property
    def count(self) -> int:
        """U = L * r: number of shards over all devices."""
        return self.n_cached * self.copies

    @property
    def heads_per_latent(self) -> int:
        """M: query heads that read one cached head."""
        return self.n_heads * self.n_branches // self.n_cached

    @property
    def heads_per_shard(self) -> int:
        """M / r: query heads that one shard serves."""
        return self.heads_per_latent // self.copies

    @property
    def aligned(self) -> bool:
        """Whether a device's part of the split query heads is exactly what its shards serve, so that nothing moves."""
        return self.n_branches == 1 and self.rules.mesh_axes("heads") == self.rules.mesh_axes(
            "kv_head_shards"
        )

    @property
    def scattered(self) -> bool:
        """Whether the devices among which shards are summed are those that split the query heads of W_o."""
        axes = self.rules.mesh_axes("heads")
        return not self.aligned and bool(axes) and axes == self.rules.mesh_axes("kv_head_shards")

    @property
    def query_axis(self) -> str | None:
        """Logical name of the head axis of attention's queries: split only if aligned."""
        return "heads" if self.aligned else None

    @property
    def projected(self) -> bool:
        """Whether the output projection is applied to each device's summands before they are summed."""
        return not self.aligned and not self.rules.mesh_axes("heads")

    def to_shards(self, w: jax.Array, axis: int) -> jax.Array:
        """Repeats each cached head along `axis` for its copies: [..., L, ...] to [..., U, ...]."""
        return jnp.repeat(w, self.copies, axis=axis) if self.copies > 1 else w

    def heads_to_shards(self, w: jax.Array) -> jax.Array:
        """Lays out the per-head weights of each branch by shard: [J, N, ...] to [U, M / r, ...]."""
        shape = (self.count, self.heads_per_shard, *w.shape[2:])
        mesh = current_mesh()
        if mesh is None or not mesh.are_all_axes_explicit:
            return w.reshape(shape)
        kept = jax.typeof(w).sharding.spec[2:]  # J and N become whole; how the rest is split stays
        return jax.lax.reshape(w, shape, out_sharding=PartitionSpec(None, None, *kept))

    @property
    def local_branches(self) -> int:
        """Number of a device's shards that serve the same query heads: J where it holds all cached heads."""
        n_local, groups = self.count // self.rules.size("kv_head_shards"), self.n_cached // self.n_branches
        return n_local // groups if n_local % groups == 0 else 1

    def join_branches(self, w: jax.Array, axis: int) -> jax.Array:
        """Puts a device's shards that serve the same query heads side by side: [U, M / r, ...] to [X, U', M / r, ...].

        A new axis J' is inserted before `axis`: X are the devices over which shards are split, J' the `local_branches`,
        and U' = U / (X J').
        """
        parts, branches = self.rules.size("kv_head_shards"), self.local_branches
        shape = (parts, branches, self.count // (parts * branches), *w.shape[1:])
        return jnp.moveaxis(w.reshape(shape), 1, axis)

    # Inside `shard_map`:

    def _first_heads(self, n_local: int) -> list[jax.Array | int]:
        """The first query head of each local shard, counted among the heads that this device has."""
        if self.aligned:
            return [k * self.heads_per_shard for k in range(n_local)]
        first_shard = self.rules.axis_index("kv_head_shards") * n_local
        groups = self.n_cached // self.n_branches
        shards = [first_shard + k for k in range(n_local)]
        return [
            u // self.copies % groups * self.heads_per_latent + u % self.copies * self.heads_per_shard
            for u in shards
        ]

    def gather(self, q_BTNH: jax.Array, n_local: int) -> jax.Array:
        """The queries of each local shard: [B, T, N, H] to [B, T, U, M / r, H]."""
        b, t, n, h = q_BTNH.shape
        rows = self.heads_per_shard
        if self.n_branches == 1:  # then shards serve heads in order
            first, *_ = self._first_heads(n_local)
            mine = jax.lax.dynamic_slice_in_dim(q_BTNH, first, n_local * rows, axis=2)
            return mine.reshape(b, t, n_local, rows, h)
        if rows == n:
            parts = [q_BTNH] * n_local
        else:
            cut = lambda first: jax.lax.dynamic_slice_in_dim(q_BTNH, first, rows, axis=2)
            parts = [cut(first) for first in self._first_heads(n_local)]
        return jnp.stack(parts, axis=2)

    def scatter(self, y_BTUMH: jax.Array) -> jax.Array:
        """Sums the outputs of the local shards by query head: [B, T, U, M / r, H] to [B, T, N, H], or this device's N.

        Shards that serve the same heads may be summed already (`join_branches`).
        """
        b, t, n_local, rows, h = y_BTUMH.shape
        if self.aligned:
            return y_BTUMH.reshape(b, t, n_local * rows, h)
        if rows == self.n_heads:
            return y_BTUMH.sum(axis=2)
        if self.n_branches == 1:
            y_BTUMH = y_BTUMH.reshape(b, t, 1, n_local * rows, h)
        total = jnp.zeros((b, t, self.n_heads, h), y_BTUMH.dtype)
        for k, first in enumerate(self._first_heads(n_local)[: y_BTUMH.shape[2]]):
            place = jnp.zeros_like(total)
            total = total + jax.lax.dynamic_update_slice_in_dim(place, y_BTUMH[:, :, k], first, axis=2)
        return total
