"""The static sizes of a call of the training kernels for Hopper GPUs, and how they are tiled."""

from __future__ import annotations

import dataclasses

import jax

from mlra_jax.ops.attention.qk_parts import Parts, heads_of
from mlra_jax.ops.hopper import ROWS

TILE = 128
"""Tokens are padded to a multiple of it."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of a call, padded to whole tiles."""

    batch: int
    heads: int
    """KV heads (L). Part i of the queries has `q_heads[i]`, and head l reads l modulo that; keys likewise."""
    q_heads: tuple[int, ...]
    k_heads: tuple[int, ...]
    widths: tuple[int, ...]
    v_width: int
    latent: bool
    """Whether the value is the first part of the key."""
    heads_per_kv: int
    """Query heads that read a KV head (M)."""
    queries: int
    """T."""
    tokens: int
    """S."""
    keys: int
    """Tokens that are not padding."""

    @classmethod
    def of(cls, parts: Parts, v: jax.Array | None) -> Shape:
        """The sizes of a call of `mlra_jax.ops.attention.causal_attention_parts`."""
        (b, t, _, m, _), s = parts[0][0].shape, parts[0][1].shape[1]
        pad = lambda n: -(-n // TILE) * TILE
        return cls(
            batch=b,
            heads=heads_of(parts, v),
            q_heads=tuple(q.shape[2] for q, _ in parts),
            k_heads=tuple(k.shape[2] for _, k in parts),
            widths=tuple(k.shape[-1] for _, k in parts),
            v_width=(parts[0][1] if v is None else v).shape[-1],
            latent=v is None,
            heads_per_kv=m,
            queries=pad(t),
            tokens=pad(s),
            keys=s,
        )

    @property
    def key_widths(self) -> tuple[int, ...]:
        """Widths of the parts of a key, and of its value if that is not one of them."""
        return self.widths if self.latent else (*self.widths, self.v_width)


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiling of a call.

    Attributes:
      row_groups: warpgroups of a program of the forward kernel, each with a tile of 64 tokens of a query head.
      block: tokens that the forward kernel takes at a time.
      stages: of its ring.
      dq_block: tokens that the kernel for the queries' gradients takes at a time.
      dq_stages: of its ring.
      dk_stages: of the ring of the kernel for the keys' gradients, which takes 64 rows at a time.
      dk_shares: programs among which the rows that see a block of keys are divided; their sums are added afterwards.
    """

    row_groups: int
    block: int
    stages: int
    dq_block: int = 64
    dq_stages: int = 4
    dk_stages: int = 4
    dk_shares: int = 1

    @classmethod
    def heuristic(cls, shape: Shape, processors: int) -> Config:
        """A tiling that fits the GPU."""
        tiles = shape.queries // ROWS * shape.heads_per_kv
        wide = sum(shape.key_widths) > 192
        programs = shape.tokens // TILE * shape.heads * shape.batch
        return cls(
            row_groups=3 if tiles % 3 == 0 else 2,
            block=64,
            stages=3 if wide else 4,
            dq_stages=3 if wide else 4,
            dk_stages=3 if wide else 4,
            # The first block of keys is seen by twice as many rows as the average one: with many programs a processor
            # the last ones end together. Half as many took a tenth longer, and spared half of that in sums (mlra_4).
            dk_shares=max(1, min(12 * processors // programs, tiles // 8)),
        )
