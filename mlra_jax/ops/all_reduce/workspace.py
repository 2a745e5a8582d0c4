"""The memory through which devices exchange partial sums."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlra_jax.sharding import AxisRules

ROWS = 64
"""Most rows of a call. A workspace takes 2 * P * 64 * 8 * D bytes on each of P devices: 6 MB for two and D = 3072."""
DEVICES = range(2, 9)
"""Numbers of devices between which the kernels exchange."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Workspace:
    """Memory of each device that its peers write to, behind the back of XLA.

    It must be the same buffer in every call: make it once, and pass it as an argument that is neither donated nor
    returned. An array that a compiled function closes over is a constant, of which there may be several copies.
    """

    epochs: Any
    """Calls so far, for each row: int32 [P, R], P devices."""
    words: Any
    """Values with the epoch of their call, in two halves, from each device: int32 [P, 2, P, R, 2 * D]."""

    @property
    def rows(self) -> int:
        """Most rows of a call (R)."""
        return self.epochs.shape[-1]

    @property
    def width(self) -> int:
        """Elements of a row (D)."""
        return self.words.shape[-1] // 2

    @classmethod
    def shapes(cls, mesh: Mesh, rules: AxisRules, width: int) -> Workspace | None:
        """A workspace as `jax.ShapeDtypeStruct`s; None where no kernel would use it.

        Args:
          mesh: its devices are GPUs of one process, in the order of their ids.
          rules: the decoding table: one mesh axis of 2 to 8 devices splits MLP, vocabulary, and KV-head shards or query
            heads, whose sums go through the workspace.
          width: of a row (D).
        """
        axes, vocab, shards, heads = (
            dict(rules.table).get(name, ()) for name in ("mlp", "vocab", "kv_head_shards", "heads")
        )
        sums_attention = {shards, heads} in ({axes}, {axes, ()})
        if len(axes) != 1 or vocab != axes or not sums_attention:
            return None
        devices, n = list(mesh.devices.flat), mesh.shape.get(axes[0], 1)
        in_order = [d.id for d in devices] == sorted(d.id for d in devices)
        on_one_host = devices[0].platform in ("gpu", "cuda") and len({d.process_index for d in devices}) == 1
        if not (on_one_host and in_order and n in DEVICES):
            return None
        split = NamedSharding(mesh, PartitionSpec(*axes))
        shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split)
        return cls(shape(n, ROWS), shape(n, 2, n, ROWS, 2 * width))

    @classmethod
    def create(cls, mesh: Mesh, rules: AxisRules, width: int) -> Workspace | None:
        """A workspace of zeros; see `shapes`."""
        shapes = cls.shapes(mesh, rules, width)
        zeros = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        with jax.set_mesh(mesh):
            return shapes and jax.jit(zeros, out_shardings=jax.tree.map(lambda s: s.sharding, shapes))()
