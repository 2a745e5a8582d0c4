"""The paper's decoder-only transformer around any of the attentions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
"""What the backward pass keeps of a layer besides its input, from most memory to most computation: everything; products
with weights and what attention gives; the MLP's first products and what attention gives; that alone; nothing."""


@jax.custom_vjp
def _backward_together(*args: Any) -> Any:
    """`args`, none of whose gradients is passed on before all are there."""
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

        Sums are left to the norm that follows: the input is x + y, or x where y is None, and so is the output.
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
        y_BTD: jax.Array | None,
        cache: Any,
        start_B: jax.Array,
        n_new_B: jax.Array,
        workspace: Workspace | None = None,
    ) -> tuple[jax.Array, jax.Array, Any]:
        """T new tokens of each row, with and into the layer's cache.

        Sums are left to the norm that follows: the input is x + y, or x where y is None, and so is the output. With a
        workspace these are the sums over devices too: y is each device's part (`RMSNorm.of_sum`).
        """
        reduce = workspace is None
        # The scopes name the parts of a step in profiles (benchmarks/decode_step.py).
        with jax.named_scope("norm"):
            if y_BTD is None:
                h_BTD = self.attention_norm(x_BTD)
            else:
                x_BTD, h_BTD = self.attention_norm.of_sum(x_BTD, y_BTD, workspace=workspace)
        y_BTD, cache = self.attention.decode(h_BTD, cache, start_B, n_new_B, reduce=reduce)
        with jax.named_scope("norm"):
            x_BTD, h_BTD = self.mlp_norm.of_sum(x_BTD, y_BTD, workspace=workspace)
        with jax.named_scope("mlp"):
            return x_BTD, self.mlp(h_BTD, reduce=reduce), cache


class Transformer(WithLayout):
    """Tied embedding, layers, final norm.

    In the training layout the layers' parameters are stacked on a leading axis and scanned, if `stacked`; else, and in
    the decode layout, they are a list, so that no step slices or copies them.

    Args:
      config: sizes and options; refused here if illegal.
      rngs: for the initial parameters.
      rules: table of logical axis names. Without a mesh nothing is split.
      layout: `train`, or `decode` for cached decoding; `to_decode` turns the first into the second.
      stacked: whether layers are stacked in the training layout, so that one is compiled for all.
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
            self.layers = nnx.List([make(rngs) for _ in range(config.n_layers)])
        self.final_norm = RMSNorm(config, (config.d_model,), (None,), rngs=rngs, rules=rules)
        self.workspace: Workspace | None = nnx.data(None)
        """Through which GPUs that decode exchange partial sums; None: `psum`."""

    def hidden(self, tokens_BT: jax.Array, totals: Mapping[int, Any] | None = None) -> jax.Array:
        """The normalised last hidden states [B, T, D] (float32) of whole sequences, in the training layout.

        Args:
          tokens_BT: ids, at positions 0 to T - 1.
          totals: for layers that are not stacked, float32 sums for the gradients of each one's parameters (`Summed`).
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

        When differentiated it recomputes what `execution.remat` says.
        """
        graph, stacked = nnx.split(self.layers)
        layer = self._recomputing(graph, prevent_cse=False, add=True)
        return lambda x_BTD, state: layer(x_BTD, None, state), stacked

    def _recomputing(
        self, graph: nnx.GraphDef, *, prevent_cse: bool, add: bool = False
    ) -> Callable[[jax.Array, jax.Array | None, nnx.State], Any]:
        """A layer of hidden states x + y; `add`: of x alone, and gives their sum."""

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

    def _embed(self, tokens_BT: jax.Array, workspace: Workspace | None) -> tuple[jax.Array, jax.Array | None]:
        """The residual stream x + y before the first layer, y as `Block.decode` takes it."""
        embedding = self.embedding
        # A part of a sum is rounded to the compute type.
        exact = jnp.promote_types(embedding.compute_dtype, embedding.table.dtype) == embedding.compute_dtype
        if workspace is None or not exact:
            return embedding.encode(tokens_BT), None
        y_BTD = embedding.encode(tokens_BT, reduce=False)
        zeros = jnp.zeros(y_BTD.shape[1:], jnp.float32)
        return self.rules.constrain(zeros, "batch", "length", None), y_BTD

    def decode(
        self,
        tokens_BT: jax.Array,
        cache: Cache,
        n_new_B: jax.Array,
        *,
        logits: LogitsOf = "all",
    ) -> tuple[jax.Array, Cache]:
        """Runs T new tokens of each row against the cache, in the decode layout.

        Args:
          tokens_BT: ids; row b's first `n_new_B[b]` count, the rest is padding.
          cache: donate it to the compiled function; it comes back with the new tokens.
          n_new_B: new tokens of each row, 0 to T; `cache.lengths + n_new_B` must not exceed `cache.capacity`.
          logits: `all`: after every token [B, T, V]; `last`: after each row's last new one [B, 1, V].

        Returns:
          Float32 logits, meaningless where there is no token, and the cache.
        """
        self.require_layout("decode")
        require(LogitsOf, logits=logits)
        start_B = cache.lengths
        workspace = None
        if self.rules.size("mlp") > 1:
            workspace = fitting(self.workspace, tokens_BT.size // self.rules.size("batch"))
        with jax.named_scope("embed"):
            x_BTD, y_BTD = self._embed(tokens_BT, workspace)
        layers = []
        # A function of its own is traced and lowered once for all layers.
        decode = jax.jit(lambda layer, *args: layer.decode(*args))
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x_BTD, y_BTD, layer_cache = decode(layer, x_BTD, y_BTD, layer_cache, start_B, n_new_B, workspace)
            layers.append(layer_cache)
        assert y_BTD is not None
        last = lambda x_BTD: (
            jnp.take_along_axis(x_BTD, jnp.maximum(n_new_B - 1, 0)[:, None, None], axis=1)
            if logits == "last"
            else x_BTD
        )
        if workspace is None:
            with jax.named_scope("mlp"):
                x_BTD = last(x_BTD + y_BTD)
            with jax.named_scope("norm"):
                h_BTD = self.final_norm(x_BTD)
        else:
            with jax.named_scope("norm"):
                _, h_BTD = self.final_norm.of_sum(x_BTD, y_BTD, workspace=workspace)
                h_BTD = last(h_BTD)
        with jax.named_scope("logits"):
            logits_BTV = self.embedding.decode(h_BTD)
        return logits_BTV, type(cache)(tuple(layers), start_B + n_new_B)


def _abstract(
    config: ModelConfig,
    rules: AxisRules,
    layout: Layout,
    *,
    stacked: bool = True,
    execution: ExecutionConfig = ExecutionConfig(),
) -> tuple[nnx.GraphDef, nnx.State]:
    """The split model without its values. `nnx.eval_shape` would take our logical names for axes of an Auto mesh."""
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
    """The model with these parameters: a nested dictionary of arrays as `nnx.to_pure_dict` gives it for `layout`.

    In the training layout the layers may be stacked or, as `unstack_layers` leaves them, not.
    """
    stacked = 0 not in params["layers"]
    graph, state = _abstract(config, rules, layout, stacked=stacked, execution=execution)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def unstack_layers(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters with `layers` a dictionary of each layer's own, by its number."""
    layers = {i: jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(config.n_layers)}
    return {**params, "layers": layers}


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """The reverse of `unstack_layers`."""
    layers = [params["layers"][i] for i in range(len(params["layers"]))]
    return {**params, "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}


def cast_weights(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters, layers stacked or not, with those of products (`w_...`) in the compute type.

    The model gives the same with them as with `params`: it casts them where it uses them. Where a step uses them often
    (micro-batches, and layers that are recomputed), they are cast once and then read at half the size. Gains and the
    token matrix, which are used in float32, stay as they are.
    """
    cast = lambda path, x: x.astype(config.compute_dtype) if path[-1].key.startswith("w_") else x
    return jax.tree_util.tree_map_with_path(cast, params)


def to_decode(
    config: ModelConfig, params: dict[str, Any], rules: AxisRules, *, donate: bool = False
) -> Transformer:
    """The decode-layout model on the current mesh, from the parameter tree of the training layout.

    Layers are unstacked, their matrices joined and turned as the modules' `decode_leaves` say, and everything is split
    as `rules` say: once, at load, leaf by leaf.

    Args:
      config: of the model.
      params: nested dictionary of arrays with stacked layers, laid out in any way on the current mesh.
      rules: the decoding table.
      donate: empty `params` on the way, so that no more than one leaf of the result is in memory twice.
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
