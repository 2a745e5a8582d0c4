"""The interface of an attention family, which is all that the model, decoding, the planner and the commands use.

A family is a module of this package or of a user's (docs/extending.md): a configuration derived from
`config.AttentionConfig`, with its sizes and costs, and an `Attention` with its parameters, its form for whole sequences
and its cached step. Whatever a family does not define, it inherits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from mlra_jax.attention.head_shards import HeadShards
from mlra_jax.attention.kv_cache import Cache, LayerCache
from mlra_jax.attention.output import Output
from mlra_jax.config import ExecutionConfig, ModelConfig
from mlra_jax.model.layers import (
    DecodeLeaves,
    Layout,
    WithLayout,
    check,
    lay_out_for_decoding,
    normal,
    parameter,
)
from mlra_jax.sharding import TRAIN_RULES, AxisRules, Names, decode_rules

ROWS: Names = ("batch", "length", None)
"""Logical axes of activations [B, T, D]."""
HEADS: Names = ("batch", "length", "heads", None)
"""Logical axes of activations by query head, [B, T, N, H]."""


def attend_own(rules: AxisRules, attend: Callable[..., jax.Array], *queries: jax.Array) -> jax.Array:
    """Inside `shard_map`: causal attention of the queries of a device's own tokens.

    Args:
      rules: the training table.
      attend: a function of queries and `q_start`, the position of the first, which follow one another.
      *queries: [B, T, ...], the device's own tokens.
    """
    runs = rules.runs(queries[0].shape[1])
    outputs = [attend(*(q[:, where] for q in queries), q_start=start) for start, where in runs]
    return outputs[0] if len(runs) == 1 else jnp.concatenate(outputs, axis=1)


class Attention(WithLayout):
    """One attention layer, for whole sequences and for cached decoding.

    Args:
      config: the model's configuration; `config.attention` is the family's own.
      rngs: for the initial parameters.
      rules: the table of logical axis names; without a mesh nothing is split.
      layout: `train` for whole sequences, `decode` for cached decoding.
      execution: how whole sequences are computed.
    """

    output: Output

    branch_weights: ClassVar[tuple[str, ...]] = ()
    """Names of parameters [J, N, ...] with a matrix for each branch and query head. Attention itself gathers them where
    their storage is split, and decoding regroups their leading axes by cached head."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        rules: AxisRules = TRAIN_RULES,
        layout: Layout = "train",
        execution: ExecutionConfig = ExecutionConfig(),
    ):
        check(config, layout)
        self.config, self.rules, self.layout, self.execution = config, rules, layout, execution
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        self.shards = HeadShards.of(config, rules)
        self.build(rngs)

    def build(self, rngs: nnx.Rngs) -> None:
        """Makes the parameters of the layer's layout, including `output`, and derives constants from its sizes."""
        raise NotImplementedError

    def _parameter(self, rngs: nnx.Rngs, shape: tuple[int, ...], names: Names) -> nnx.Param:
        """A parameter with the model's normal initialisation."""
        config = self.config
        return parameter(rngs, self.rules, shape, names, normal(config), config.param_dtype, self.layout)

    @classmethod
    def decode_leaves(cls, config: ModelConfig, rules: AxisRules) -> DecodeLeaves:
        """How the decode layout makes the parameters that differ from the training layout's."""
        raise NotImplementedError

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Causal attention of whole sequences at positions 0 to T - 1, in the training layout.

        Args:
          x_BTD: the normalised input of the block, [B, T, D].

        Returns:
          [B, T, D] in the compute type.
        """
        raise NotImplementedError

    def decode(
        self,
        x_BTD: jax.Array,
        cache: LayerCache,
        start_B: jax.Array,
        n_new_B: jax.Array,
        *,
        reduce: bool = True,
    ) -> tuple[jax.Array, LayerCache]:
        """Appends T tokens of each row to the cache and attends over it, in the decode layout.

        Args:
          x_BTD: the normalised input of the block, [B, T, D]; the first `n_new_B[b]` tokens of row b count.
          cache: this layer's (`init_cache`); donate it to the compiled function.
          start_B: tokens already in the cache, which is the position of the first new one.
          n_new_B: new tokens of each row, 0 to T. The others are not cached, and their outputs are meaningless.
          reduce: whether the outputs of the devices that split the KV heads are summed; if not, the result holds each
            device's part, [P, B, T, D] in float32.

        Returns:
          [B, T, D] in the compute type, and the cache with the new tokens.
        """
        self.require_layout("decode")
        shards, rows = self.shards, ("batch",)
        x_BTD = x_BTD.astype(self.compute_dtype)
        with jax.named_scope("queries"):
            queries, new = self._project_new(x_BTD, start_B[:, None] + jnp.arange(x_BTD.shape[1]))
        cache = cache.append(new, start_B, n_new_B)
        q_names: list[Names] = [("batch", None, shards.query_axis, None)] * len(queries)
        in_names = (cache.specs(), rows, rows, q_names, *self.output.shard_input_names(shards))
        attend = self.rules.shard_map(
            functools.partial(self._attend_cached, reduce=reduce),
            in_names,
            self.output.shard_output_names(shards, reduce),
        )
        summed = attend(cache, start_B, n_new_B, queries, *self.output.shard_inputs(x_BTD, shards))
        return self.output.finish(x_BTD, summed, shards, reduce), cache

    def _attend_cached(
        self,
        cache: LayerCache,
        start_B: jax.Array,
        n_new_B: jax.Array,
        queries: list[jax.Array],
        gate_BTNH: jax.Array | None,
        w_o_DNH: jax.Array | None,
        *,
        reduce: bool,
    ) -> jax.Array:
        """On each device: attends over the device's KV-head shards, and sums over devices."""
        with jax.named_scope("attend"):
            visible_BT = cache.visible(start_B, n_new_B, queries[0].shape[1])
            queries = [self.shards.gather(q_BTNE, cache.n_shards) for q_BTNE in queries]
            out, lse = self._attend_shards(cache, visible_BT, queries)
            y_BTUMH = cache.merge(out, lse)
        return self.output.sum_shards(self.shards, y_BTUMH, gate_BTNH, w_o_DNH, reduce=reduce)

    def _project_new(
        self, x_BTD: jax.Array, positions_BT: jax.Array
    ) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        """Queries [B, T, N, *] of the new tokens, and their arrays for the cache by name, in the decode layout."""
        raise NotImplementedError

    def _attend_shards(
        self, cache: LayerCache, visible_BT: jax.Array, queries: list[jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """On each device: a decode op over the device's part of the cache; queries are [B, T, U, M / r, *]."""
        raise NotImplementedError

    def to_decode(self, rules: AxisRules | None = None) -> Self:
        """This layer in the decode layout, on the current mesh, with the same parameters.

        Args:
          rules: the decoding table; None: `decode_rules()`.

        Raises:
          ValueError: the layer is already in the decode layout.
        """
        if self.layout == "decode":
            raise ValueError(f"This {type(self).__name__} is already in the decode layout.")
        config, rules = self.config, rules or decode_rules()
        make = lambda: type(self)(
            config, rngs=nnx.Rngs(0), rules=rules, layout="decode", execution=self.execution
        )
        graph, state = jax.eval_shape(lambda: nnx.split(make()))
        given = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(self, nnx.Param)))
        leaves = lay_out_for_decoding(rules, state, given, self.decode_leaves(config, rules))
        nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(leaves))
        return nnx.merge(graph, state)

    def init_cache(self, batch: int, max_len: int) -> LayerCache:
        """An empty cache for this layer, laid out over the current mesh by the layer's table.

        Args:
          batch: rows.
          max_len: tokens per row, rounded up to whole pages on every device.
        """
        one_layer = dataclasses.replace(self.config, n_layers=1)
        return Cache.create(one_layer, self.rules, batch, max_len).layers[0]
