"""The paper's decoder-only transformer around any of the attentions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mlra_jax.attention.kv_cache import Cache
from mlra_jax.config import ExecutionConfig, ModelConfig, Remat, require
from mlra_jax.model.layers import (
    DecodeLeaves,
    Embedding,
    Layout,
    Relayout,
    RMSNorm,
    Summed,
    SwiGLU,
    WithLayout,
    check,
    nested,
)
from mlra_jax.ops.all_reduce import Workspace, fitting
from mlra_jax.ops.remat import ATTENTION, HEADS, HIDDEN, MLP, PRODUCT, QUERIES, RESIDUAL
from mlra_jax.sharding import TRAIN_RULES, AxisRules

LogitsOf = Literal["all", "last"]

_policies = jax.checkpoint_policies
REMAT_POLICIES: dict[Remat, Any] = {
    "none": _policies.everything_saveable,
    "products": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_only_these_names(ATTENTION, HEADS, PRODUCT, QUERIES, HIDDEN, RESIDUAL),
    ),
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(ATTENTION, HEADS, PRODUCT)
    ),
    "mlp": _policies.save_only_these_names(ATTENTION, MLP),
    "attention": _policies.save_only_these_names(ATTENTION),
    "full": _policies.nothing_saveable,
}
"""What is saved of a layer for the backward pass, besides its input (`ExecutionConfig.remat`)."""


@jax.custom_vjp
def _backward_together(*args: Any) -> Any:
    """`args`; none of their gradients is passed on before all have been computed."""
    return args


def _forward(*args: Any) -> tuple[Any, None]:
    return args, None


_backward_together.defvjp(_forward, lambda _, gradients: jax.lax.optimization_barrier(gradients))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); the residual stream is float32."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        rules: AxisRules,
        layout: Layout,
        execution: ExecutionConfig,
    ):
        norm = lambda: RMSNorm(config, (config.d_model,), (None,), rngs=rngs, rules=rules)
        self.attention_norm = norm()
        self.attention = config.attention.module()(
            config, rngs=rngs, rules=rules, layout=layout, execution=execution
        )
        self.mlp_norm = norm()
        self.mlp = SwiGLU(config, rngs=rngs, rules=rules, layout=layout)

    @staticmethod
    def decode_leaves(config: ModelConfig, rules: AxisRules) -> DecodeLeaves:
        """What decoding keeps in another way."""
        attention = nested("attention", config.attention.module().decode_leaves(config, rules))
        return {**attention, **nested("mlp", SwiGLU.decode_leaves(config, rules))}

    def __call__(self, x_BTD: jax.Array, y_BTD: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Whole sequences, [B, T, D].

        Residual sums are left to the next norm: the input is x + y (or x if y is None), and so is the output.
        """
        names = ("batch", "length", None)
        if y_BTD is None:
            h_BTD = self.attention_norm(x_BTD)
        else:
            x_BTD, h_BTD = self.attention_norm.of_sum(x_BTD, y_BTD, names)
        x_BTD, h_BTD = self.mlp_norm.of_sum(x_BTD, self.attention(h_BTD), names)
        return x_BTD, self.mlp(h_BTD)

    def decode(
        self,
        x_BTD: jax.Array,
        h_BTD: jax.Array,
        next_norm: RMSNorm,
        cache: Any,
        start_B: jax.Array,
        n_new_B: jax.Array,
        workspace: Workspace | None = None,
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Runs T new tokens of each row against the layer's cache, to which they are appended.

        Args:
          x_BTD: the residual stream, float32.
          h_BTD: its `attention_norm`.
          next_norm: of the layer that follows, or the final one.
          cache: of this layer.
          start_B: tokens of each row in the cache.
          n_new_B: new tokens of each row.
          workspace: through which devices exchange partial sums; None: `psum`.

        Returns:
          The residual stream, its `next_norm`, and the cache with the new tokens.
        """
        # The scopes name the parts of a step in profiles (benchmarks/decode_step.py).
        reduce = workspace is None
        y_BTD, cache = self.attention.decode(h_BTD, cache, start_B, n_new_B, reduce=reduce)
        with jax.named_scope("norm"):
            x_BTD, h_BTD = self.mlp_norm.of_sum(x_BTD, y_BTD, workspace=workspace)
        with jax.named_scope("mlp"):
            y_BTD = self.mlp(h_BTD, reduce=reduce)
        with jax.named_scope("norm"):
            x_BTD, h_BTD = next_norm.of_sum(x_BTD, y_BTD, workspace=workspace)
        return x_BTD, h_BTD, cache


class _Layers(nnx.List):
    """Layers that are not stacked; `nnx.update` with stacked ones says what to do instead."""

    def _graph_node_set_key(self, key: Any, value: Any) -> None:
        if isinstance(key, str):
            raise ValueError(
                "The state has stacked layers, this model a list of them; convert a trained model with `to_decode`, "
                "or parameters with `from_params`."
            )
        super()._graph_node_set_key(key, value)


class Transformer(WithLayout):
    """Tied embedding, layers, final norm.

    In the training layout, if `stacked`, the layers' parameters are stacked on a leading axis and scanned. Otherwise,
    and in the decode layout, layers are a list, so that no step slices or copies parameters.

    Args:
      config: sizes and options.
      rngs: for the initial parameters.
      rules: the table of logical axis names; without a mesh nothing is split.
      layout: `train`, or `decode` for cached decoding; `to_decode` converts the first into the second.
      stacked: whether layers are stacked in the training layout, so that a single one is compiled.
      execution: how whole sequences are computed.

    Raises:
      ConfigError: lists every fault of `config`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        rules: AxisRules = TRAIN_RULES,
        layout: Layout = "train",
        stacked: bool = True,
        execution: ExecutionConfig = ExecutionConfig(),
    ):
        check(config, layout)
        self.config, self.rules, self.layout, self.execution = config, rules, layout, execution
        self.embedding = Embedding(config, rngs=rngs, rules=rules)
        make = lambda rngs: Block(config, rngs=rngs, rules=rules, layout=layout, execution=execution)
        if layout == "train" and stacked:
            stack = nnx.vmap(make, transform_metadata={nnx.PARTITION_NAME: "layers"})
            self.layers: Any = nnx.split_rngs(splits=config.n_layers)(stack)(rngs)
        else:
            self.layers = _Layers([make(rngs) for _ in range(config.n_layers)])
        self.final_norm = RMSNorm(config, (config.d_model,), (None,), rngs=rngs, rules=rules)
        self.workspace: Workspace | None = nnx.data(None)
        """Through which GPUs that decode exchange partial sums; None: `psum`."""

    def hidden(self, tokens_BT: jax.Array, totals: Mapping[int, Any] | None = None) -> jax.Array:
        """The normalised last hidden states [B, T, D] (float32) of whole sequences, in the training layout.

        Args:
          tokens_BT: ids, at positions 0 to T - 1, in the table's order (`AxisRules.in_order`).
          totals: for layers that are not stacked, the float32 sums for each one's gradients (`Summed`).
        """
        self.require_layout("train")
        x_BTD = self.embedding.encode(tokens_BT)
        if isinstance(self.layers, nnx.List):
            y_BTD = None
            for i, block in enumerate(self.layers):
                graph, state = nnx.split(block)
                if totals is None:
                    (x_BTD, y_BTD), state = _backward_together((x_BTD, y_BTD), state)
                else:
                    (x_BTD, y_BTD), sums = _backward_together((x_BTD, y_BTD), totals[i])
                    summed = [
                        Summed(*pair)
                        for pair in zip(jax.tree.leaves(state), jax.tree.leaves(sums), strict=True)
                    ]
                    state = jax.tree.unflatten(jax.tree.structure(state), summed)
                x_BTD, y_BTD = self._recomputing(graph, prevent_cse=True)(x_BTD, y_BTD, state)
            assert y_BTD is not None
            x_BTD = x_BTD + y_BTD
        else:
            layer, stacked = self.scanned_layer()
            x_BTD, _ = jax.lax.scan(lambda x_BTD, state: (layer(x_BTD, state), None), x_BTD, stacked)
        return self.final_norm(x_BTD)

    def blocks(self) -> Iterator[Block]:
        """The layers one by one, whether they are stacked or not."""
        if isinstance(self.layers, nnx.List):
            yield from self.layers
            return
        graph, stacked = nnx.split(self.layers)
        for i in range(self.config.n_layers):
            yield nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], stacked))

    def scanned_layer(self) -> tuple[Callable[[jax.Array, nnx.State], jax.Array], nnx.State]:
        """A function of hidden states [B, T, D] and one layer's state, and the stacked states of all layers.

        Its backward pass recomputes what `execution.remat` does not save.
        """
        graph, stacked = nnx.split(self.layers)
        layer = self._recomputing(graph, prevent_cse=False, add=True)
        return lambda x_BTD, state: layer(x_BTD, None, state), stacked

    def _recomputing(
        self, graph: nnx.GraphDef, *, prevent_cse: bool, add: bool = False
    ) -> Callable[[jax.Array, jax.Array | None, nnx.State], Any]:
        """A layer as a function of (x, y), with input x + y; `add`: it takes x alone and returns the sum."""

        def layer(x_BTD: jax.Array, y_BTD: jax.Array | None, state: nnx.State) -> Any:
            x_BTD, y_BTD = nnx.merge(graph, state)(x_BTD, y_BTD)
            return x_BTD + y_BTD if add else (x_BTD, y_BTD)

        remat = "full" if self.execution.remat == "auto" else self.execution.remat
        if remat == "none":
            return layer
        return jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=prevent_cse)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V] of whole sequences of token ids [B, T] at positions 0 to T - 1."""
        return self.embedding.decode(self.hidden(tokens_BT))

    def _embed(self, tokens_BT: jax.Array, workspace: Workspace | None) -> tuple[jax.Array, jax.Array]:
        """The residual stream before the first layer, [B, T, D] in float32, and the first layer's norm of it."""
        embedding, norm = self.embedding, self.layers[0].attention_norm
        # A part of a sum is rounded to the compute type.
        exact = jnp.promote_types(embedding.compute_dtype, embedding.table.dtype) == embedding.compute_dtype
        if workspace is None or not exact:
            x_BTD = embedding.encode(tokens_BT)
            return x_BTD, norm(x_BTD).astype(embedding.compute_dtype)
        y_BTD = embedding.encode(tokens_BT, reduce=False)
        x_BTD = self.rules.constrain(jnp.zeros(y_BTD.shape[1:], jnp.float32), "batch", "length", None)
        return norm.of_sum(x_BTD, y_BTD, workspace=workspace)

    def decode_hidden(
        self, tokens_BT: jax.Array, caches: Sequence[Any], start_B: jax.Array, n_new_B: jax.Array
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """The normalised last hidden states [B, T, D] of T new tokens of each row, in the decode layout.

        Args:
          tokens_BT: ids; the first `n_new_B[b]` of row b count, the rest is padding.
          caches: of the layers: `LayerCache`, or another class with the methods that the model's attention calls.
          start_B: tokens of each row in the caches.
          n_new_B: new tokens of each row.

        Returns:
          Hidden states, meaningless where there is no token, and the layers' caches with the new tokens.
        """
        self.require_layout("decode")
        workspace = None
        if self.rules.size("mlp") > 1:
            workspace = fitting(self.workspace, tokens_BT.size // self.rules.size("batch"))
        with jax.named_scope("embed"):
            x_BTD, h_BTD = self._embed(tokens_BT, workspace)
        layers, norms = [], [*(layer.attention_norm for layer in self.layers), self.final_norm]
        # A function of its own is traced and lowered once for all layers.
        decode = jax.jit(lambda layer, *args: layer.decode(*args))
        for i, (layer, layer_cache) in enumerate(zip(self.layers, caches, strict=True)):
            args = x_BTD, h_BTD, norms[i + 1], layer_cache, start_B, n_new_B, workspace
            x_BTD, h_BTD, layer_cache = decode(layer, *args)
            layers.append(layer_cache)
        return h_BTD, tuple(layers)

    def decode(
        self, tokens_BT: jax.Array, cache: Cache, n_new_B: jax.Array, *, logits: LogitsOf = "all"
    ) -> tuple[jax.Array, Cache]:
        """Runs T new tokens of each row against the cache, in the decode layout.

        Args:
          tokens_BT: ids; the first `n_new_B[b]` of row b count, the rest is padding.
          cache: donate it to the compiled function; it is returned with the new tokens.
          n_new_B: new tokens of each row, 0 to T; `cache.lengths + n_new_B` must not exceed `cache.capacity`.
          logits: `all`: after every token, [B, T, V]; `last`: after each row's last new token, [B, 1, V].

        Returns:
          Float32 logits, meaningless where there is no token, and the cache.
        """
        self.require_layout("decode")
        require(LogitsOf, logits=logits)
        start_B = cache.lengths
        h_BTD, layers = self.decode_hidden(tokens_BT, cache.layers, start_B, n_new_B)
        if logits == "last":
            h_BTD = jnp.take_along_axis(h_BTD, jnp.maximum(n_new_B - 1, 0)[:, None, None], axis=1)
        with jax.named_scope("logits"):
            logits_BTV = self.embedding.decode(h_BTD)
        return logits_BTV, type(cache)(layers, start_B + n_new_B)


def _abstract(
    config: ModelConfig,
    rules: AxisRules,
    layout: Layout,
    *,
    stacked: bool = True,
    execution: ExecutionConfig = ExecutionConfig(),
) -> tuple[nnx.GraphDef, nnx.State]:
    """The split model without values. `nnx.eval_shape` would mistake our logical names for axes of an Auto mesh."""
    options: dict[str, Any] = {"rules": rules, "layout": layout, "stacked": stacked, "execution": execution}
    make = lambda: Transformer(config, rngs=nnx.Rngs(0), **options)
    return jax.eval_shape(lambda: nnx.split(make()))


def from_params(
    config: ModelConfig,
    params: dict[str, Any],
    *,
    rules: AxisRules = TRAIN_RULES,
    layout: Layout = "train",
    execution: ExecutionConfig = ExecutionConfig(),
) -> Transformer:
    """The model with these parameters, a nested dictionary of arrays as `nnx.to_pure_dict` returns for `layout`.

    In the training layout the layers may be stacked or not (`unstack_layers`).
    """
    stacked = 0 not in params["layers"]
    graph, state = _abstract(config, rules, layout, stacked=stacked, execution=execution)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def unstack_layers(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters with each layer's own under its number in `layers`."""
    layers = {i: jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(config.n_layers)}
    return {**params, "layers": layers}


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `unstack_layers`."""
    layers = [params["layers"][i] for i in range(len(params["layers"]))]
    return {**params, "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}


def cast_weights(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters, layers stacked or not, with the weights of products (`w_...`) cast to the compute type.

    The model computes the same with them as with `params`, which it casts where it uses them. But a step that uses them
    often (with several micro-batches, or recomputed layers) then casts them once and reads half the bytes. Gains and
    the token matrix, which are used in float32, stay as they are.
    """
    cast = lambda path, x: x.astype(config.compute_dtype) if path[-1].key.startswith("w_") else x
    return jax.tree_util.tree_map_with_path(cast, params)


def to_decode(
    config: ModelConfig, params: dict[str, Any], rules: AxisRules, *, donate: bool = False
) -> Transformer:
    """The decode-layout model on the current mesh, from the parameter tree of the training layout.

    Layers are unstacked, their matrices joined and transposed as the modules' `decode_leaves` say, and everything is
    split as `rules` say: once, at load, leaf by leaf.

    Args:
      config: the model's configuration.
      params: nested dictionary of arrays with stacked layers, laid out in any way on the current mesh.
      rules: the decoding table.
      donate: remove parameters from `params` as they are converted, so that at most one is in memory twice.
    """
    graph, state = _abstract(config, rules, "decode")
    names: dict[Any, Any] = {path: var.get_metadata("out_sharding") for path, var in nnx.to_flat_state(state)}
    given: dict[tuple[str, ...], jax.Array] = nnx.traversals.flatten_mapping(params)
    if donate:
        params.clear()
    relayouts = Block.decode_leaves(config, rules)
    leaves: dict[Any, jax.Array] = {}
    for path in names:
        if path[0] != "layers":
            lay_out = lambda value, path=path: rules.constrain(value, *names[path])
            leaves[path] = jax.jit(lay_out)(given.pop(path))
        elif path[1] == 0:
            name = ".".join(path[2:])
            relayout = relayouts.get(name, Relayout((name,), lambda value: value))

            def by_layer(
                *stacked: jax.Array, spec: Any = names[path], make: Callable[..., jax.Array] = relayout.make
            ) -> list[jax.Array]:
                layer = lambda i: make(*(value[i] for value in stacked))
                return [rules.constrain(layer(i), *spec) for i in range(config.n_layers)]

            laid_out = jax.jit(by_layer)(
                *(given.pop(("layers", *name.split("."))) for name in relayout.sources)
            )
            leaves |= {("layers", i, *path[2:]): leaf for i, leaf in enumerate(laid_out)}
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(leaves))
    return nnx.merge(graph, state)
