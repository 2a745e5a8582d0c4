"""The training state, and the compiled functions that initialise, update and evaluate it.

All run under `jax.set_mesh(mesh)` with explicit axes; every array's layout follows from the parameters' logical names.
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from mlra_jax.config import ExecutionConfig, ModelConfig, TrainConfig
from mlra_jax.data.pipeline import IGNORED, Batch
from mlra_jax.model import Transformer, cast_weights, from_params, stack_layers, unstack_layers
from mlra_jax.model.layers import adding
from mlra_jax.ops.device import current_device
from mlra_jax.sharding import TRAIN_RULES, ZIGZAG_RULES, AxisRules, current_mesh, on_mesh
from mlra_jax.training.losses import chunked_cross_entropy
from mlra_jax.training.optimizer import learning_rate, make_optimizer
from mlra_jax.training.update_skipping import SkipState, init_skip_state, judge_update


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of training after `step` updates."""

    params: dict[str, Any]
    """Nested dictionary of the model's parameters, in the training layout."""
    opt_state: optax.OptState
    """Moments, laid out like the parameters, and step counts."""
    step: jax.Array
    """Number of updates, including skipped ones: int32 scalar."""
    skip_state: SkipState = dataclasses.field(default_factory=init_skip_state)
    """Running statistics that decide which updates are skipped (`optim.skip_limit`)."""


def _init(config: TrainConfig, params: dict[str, Any] | None = None) -> TrainState:
    if params is None:
        model = Transformer(config.model, rngs=nnx.Rngs(config.seed))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return TrainState(params, make_optimizer(config.optim).init(params), jnp.zeros((), jnp.int32))


def init_state(config: TrainConfig, params: dict[str, Any] | None = None) -> TrainState:
    """The initial state on the current mesh; each device makes its own part, and the values do not depend on the mesh.

    Args:
      config: the run's configuration.
      params: parameters to start from, laid out on the mesh and donated; None: random ones from `config.seed`.
    """
    return jax.jit(lambda p: _init(config, p), donate_argnums=0)(params)


def abstract_state(config: TrainConfig, mesh: Mesh | AbstractMesh) -> TrainState:
    """Shapes, types and layouts on `mesh` of the state that `init_state` returns; nothing is allocated."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return on_mesh(jax.eval_shape(lambda: _init(config)), mesh)


def _loss_sum(
    config: TrainConfig,
    params: dict[str, Any],
    inputs: jax.Array,
    targets: jax.Array,
    totals: dict[str, Any] | None = None,
    rules: AxisRules = ZIGZAG_RULES,
) -> tuple[jax.Array, jax.Array]:
    """Sum and number of the cross-entropies; with `totals`, these are differentiated (`Summed`), not `params`."""
    if totals is not None:
        layers, sums = params["layers"], totals["layers"]
        rest = lambda tree: {**tree, "layers": {}}
        params = {**jax.tree.map(adding, rest(params), rest(totals)), "layers": layers}
    model = from_params(config.model, params, rules=rules, execution=config.execution)
    table = params["embedding"]["table"]
    inputs, targets = (rules.in_order(tokens_BT, 1) for tokens_BT in (inputs, targets))
    x_BTD = model.hidden(inputs, None if totals is None else sums)
    return chunked_cross_entropy(x_BTD, table, targets, dtype=model.embedding.compute_dtype, rules=rules)


def computes_alone(execution: ExecutionConfig, n_micro: int) -> bool:
    """Whether each device of the current mesh has all weights during a step of `n_micro` micro-batches.

    Devices then exchange only gradients, after the last micro-batch (`execution.gather`).
    """
    mesh = current_mesh()
    if mesh is None or not mesh.are_all_axes_explicit or n_micro == 1:
        return False
    data, fsdp = (mesh.shape.get(axis, 1) for axis in ("data", "fsdp"))
    return 1 < mesh.size == data * fsdp and (fsdp == 1 or execution.gather == "step")


def unrolls_layers(execution: ExecutionConfig, n_micro: int) -> bool:
    """Whether a train step of `n_micro` micro-batches unrolls its layers, following `execution.unroll_layers`."""
    if execution.unroll_layers != "auto":
        return execution.unroll_layers == "yes"
    # A loop keeps one layer's gathered parameters at a time.
    whole = jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1 or computes_alone(execution, n_micro)
    return whole and current_device()[0] == "gpu"


def gpu_options(execution: ExecutionConfig = ExecutionConfig()) -> dict[str, Any]:
    """XLA options for compiling the train step for GPUs, except those that `XLA_FLAGS` sets; empty elsewhere."""
    if current_device()[0] != "gpu":
        return {}
    options: dict[str, Any] = {
        # `execution.remat` already decides what is recomputed; XLA's own pass would repeat products many times over.
        # Products that share an operand are not merged, since the result would have to be sliced again.
        "xla_disable_hlo_passes": "rematerialization,dot-merger",
        # Unlike XLA's own products, cuBLAS's can add to the sum of gradients (`Summed`).
        "xla_gpu_enable_triton_gemm": False,
    }
    if execution.deterministic == "yes":
        options |= {
            # No atomic additions of floats, and of algorithms the first and not the fastest when it was measured ...
            "xla_gpu_exclude_nondeterministic_ops": True,
            # ... nor one that another program found, which JAX keeps in its compilation cache for all of them.
            "xla_gpu_per_fusion_autotune_cache_dir": "",
        }
    given = set(re.findall(r"--(\w+)", os.environ.get("XLA_FLAGS", "")))
    return {name: value for name, value in options.items() if name not in given}


def _apart(config: ModelConfig, path: Any, x: jax.Array) -> frozenset[str]:
    """Mesh axes over which a weight's gradients are not summed until all micro-batches are done.

    These are the axes that split tokens but not the weight, for weights that products gather (`AxisRules.gather`).
    """
    mesh, name = current_mesh(), path[-1].key
    if (
        mesh is None
        or not mesh.are_all_axes_explicit
        or not name.startswith("w_")
        or name in config.attention.module().branch_weights
    ):
        return frozenset()
    tokens = {*TRAIN_RULES.mesh_axes("batch"), *TRAIN_RULES.mesh_axes("length")}
    rest = tokens - {axis for entry in jax.typeof(x).sharding.spec for axis in _axes(entry)}
    return frozenset(rest) if any(mesh.shape[axis] > 1 for axis in rest) else frozenset()


def _axes(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def _laid_out(tree: Any, apart: Any, kind: str | None = None) -> Any:
    """The arrays with their axes `apart` marked in their type as `reduced` or `unreduced`, or (None) as neither."""

    def one(x: jax.Array, axes: frozenset[str]) -> jax.Array:
        kinds = {kind: axes} if kind else {}
        return (
            jax.sharding.reshard(x, PartitionSpec(*jax.typeof(x).sharding.spec.partitions, **kinds))
            if axes
            else x
        )

    return jax.tree.map(one, tree, apart)


def _split_axes(spec: PartitionSpec) -> list[tuple[int, tuple[str, ...]]]:
    """The dimensions that `spec` splits, each with the axes of the current mesh that split it."""
    sizes = jax.sharding.get_abstract_mesh().shape
    axes = [tuple(axis for axis in _axes(entry) if axis and sizes[axis] > 1) for entry in spec]
    return [(i, over) for i, over in enumerate(axes) if over]


def _gathered(w: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Inside `shard_map`: all of a weight of which each device has the part that `spec` says."""
    for i, over in _split_axes(spec):
        w = jax.lax.all_gather(w, over, axis=i, tiled=True)
    return w


def _summed(gradient: jax.Array, spec: PartitionSpec, axes: tuple[str, ...]) -> jax.Array:
    """Inside `shard_map`: the sum of the devices' gradients along `axes`, each device keeping its part by `spec`."""
    for i, over in _split_axes(spec):
        gradient = jax.lax.psum_scatter(gradient, over, scatter_dimension=i, tiled=True)
        axes = tuple(axis for axis in axes if axis not in over)
    return jax.lax.psum(gradient, axes)


def _where(good: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `good`, else `old`; but the count of the learning rate's schedule is always the new one."""
    is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)
    select = lambda a, b: a if is_schedule(a) else jnp.where(good, a, b)
    return jax.tree.map(select, new, old, is_leaf=is_schedule)


def _loss_and_grads(
    config: TrainConfig, weights: dict[str, Any], batch: Batch, n_tokens: jax.Array, rules: AxisRules
) -> tuple[jax.Array, dict[str, Any]]:
    """The loss of `batch`'s micro-batches, of `n_tokens` tokens, and its float32 gradients, laid out as `weights`."""
    unrolled = 0 in weights["layers"]

    def share(weights: Any, totals: Any, micro: Batch) -> jax.Array:
        return _loss_sum(config, weights, **micro, totals=totals, rules=rules)[0] / n_tokens

    if batch["inputs"].shape[0] == 1:
        loss, grads = jax.value_and_grad(share)(weights, None, jax.tree.map(lambda x: x[0], batch))
        return loss, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    def add(total: tuple[jax.Array, Any], micro: Batch) -> tuple[tuple[jax.Array, Any], None]:
        nats, grads = total
        if unrolled:
            loss, grads = jax.value_and_grad(share, argnums=1)(weights, grads, micro)
        else:
            loss, new = jax.value_and_grad(share)(weights, None, micro)
            grads = jax.tree.map(lambda total, g: total + g.astype(jnp.float32), grads, new)
        return (nats + loss, grads), None

    zeros = jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32), weights)
    # Devices sum their gradients once, after the last micro-batch.
    apart = jax.tree_util.tree_map_with_path(
        lambda path, w: frozenset() if unrolled else _apart(config.model, path, w), weights
    )
    weights, zeros = _laid_out(weights, apart, "reduced"), _laid_out(zeros, apart, "unreduced")
    (loss, grads), _ = jax.lax.scan(add, (jnp.zeros(()), zeros), batch)
    return loss, _laid_out(grads, apart)


def _alone(
    config: TrainConfig, weights: dict[str, Any], batch: Batch, n_tokens: jax.Array
) -> tuple[jax.Array, dict[str, Any]]:
    """`_loss_and_grads` with the weights gathered first; each device then runs the program of a single one."""
    specs = jax.tree.map(lambda w: jax.typeof(w).sharding.spec, weights)
    tokens = TRAIN_RULES.mesh_axes("batch")

    def on_device(weights: Any, batch: Batch, n_tokens: jax.Array) -> tuple[jax.Array, Any]:
        weights = jax.tree.map(_gathered, weights, specs)
        loss, grads = _loss_and_grads(config, weights, batch, n_tokens, AxisRules())
        return jax.lax.psum(loss, tokens), jax.tree.map(
            lambda g, spec: _summed(g, spec, tokens), grads, specs
        )

    # Gradients are taken inside, so `shard_map` need not track which values differ between devices.
    mapped = jax.shard_map(on_device, out_specs=(PartitionSpec(), specs), check_vma=False)
    batch = jax.sharding.reshard(batch, TRAIN_RULES.spec(None, "batch", "length"))
    return mapped(weights, batch, n_tokens)


def make_train_step(config: TrainConfig) -> jax.stages.Wrapped:
    """A compiled function `(state, batch) -> (state, metrics)` that makes one update and donates the state.

    `batch` holds `inputs` and `targets` [accumulation, B, T]. The micro-batches are scanned, and their gradients, taken
    with respect to the weights in the compute type, are accumulated in float32. The loss is the mean cross-entropy in
    nats over all counted tokens of all micro-batches. Metrics are float32 scalars: `loss`, `grad_norm` (before
    clipping), `clipped` (1 if the gradient was scaled down), `learning_rate`, `param_norm` and `momentum_norm` (after
    the update). With `optim.skip_limit`, an update whose loss or gradient norm is not finite, or a spike, is skipped:
    parameters and moments keep their bits, but the step counts, so that the learning rate's schedule and the data go
    on; `skipped` (since step 0) and `skipped_in_row` say how many.
    """
    optimizer = make_optimizer(config.optim)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        # Each micro-batch's sum is divided by the tokens of all, so that gradients of the mean simply add up.
        n_tokens = jnp.maximum(jnp.sum(batch["targets"] != IGNORED), 1)

        weights = cast_weights(config.model, state.params)
        n_micro = batch["inputs"].shape[0]
        unrolled = unrolls_layers(config.execution, n_micro)
        weights = unstack_layers(config.model, weights) if unrolled else weights
        if computes_alone(config.execution, n_micro):
            loss, grads = _alone(config, weights, batch, n_tokens)
        else:
            loss, grads = _loss_and_grads(config, weights, batch, n_tokens, ZIGZAG_RULES)
        grads = stack_layers(grads) if unrolled else grads
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        grad_norm = optax.tree.norm(grads)
        skip_state, counts = state.skip_state, {}
        if config.optim.skip_limit:
            good, skip_state = judge_update(config.optim, skip_state, loss, grad_norm)
            params, opt_state = _where(good, (params, opt_state), (state.params, state.opt_state))
            counts = {name: skip_state[name].astype(jnp.float32) for name in ("skipped", "skipped_in_row")}
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "clipped": (grad_norm > config.optim.clip_norm).astype(jnp.float32),
            "learning_rate": learning_rate(config.optim, state.step),
            "param_norm": optax.tree.norm(params),
            "momentum_norm": optax.tree.norm(optax.tree.get(opt_state, "mu")),
            **counts,
        }
        return TrainState(params, opt_state, state.step + 1, skip_state), metrics

    return jax.jit(step, donate_argnums=0, compiler_options=gpu_options(config.execution) or None)


def make_eval_step(config: TrainConfig) -> jax.stages.Wrapped:
    """A compiled function `(params, batch) -> (sum, count)`: cross-entropies in nats, and counted tokens.

    `batch` holds `inputs` and `targets` [accumulation, B, T]; the micro-batches are scanned.
    """

    def step(params: dict[str, Any], batch: Batch) -> tuple[jax.Array, jax.Array]:
        def add(carry: tuple[jax.Array, jax.Array], micro: Batch) -> tuple[tuple[jax.Array, jax.Array], None]:
            nats, count = _loss_sum(config, params, micro["inputs"], micro["targets"])
            return (carry[0] + nats, carry[1] + count), None

        return jax.lax.scan(add, (jnp.zeros(()), jnp.zeros((), jnp.int32)), batch)[0]

    return jax.jit(step, compiler_options=gpu_options(config.execution) or None)
