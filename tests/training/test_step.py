"""The compiled step: the same training whatever the mesh and however the batch is cut up."""

import dataclasses
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding

from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.cli.configs import load_config
from mlra_jax.data.pipeline import IGNORED
from mlra_jax.execution.collectives import executed_collectives
from mlra_jax.execution.topologies import gpu_devices
from mlra_jax.model import cast_weights
from mlra_jax.sharding import MESH_AXES, TRAIN_RULES
from mlra_jax.training import step as step_module
from mlra_jax.training.optimizer import make_optimizer
from mlra_jax.training.step import abstract_state, init_state, make_eval_step, make_train_step

STEPS = 4


def windows(config, n=STEPS):
    """`n` global batches of random tokens, in which some targets do not count."""
    rng = np.random.default_rng(0)
    shape = (n, config.data.global_batch, config.data.seq_len + 1)
    return rng.integers(0, config.model.vocab_size, shape).astype(np.int32)


@functools.cache
def train(config, mesh, place, accumulation):
    """The final state and the metrics of each step."""
    with jax.set_mesh(mesh):
        state, step = init_state(config), make_train_step(config)
        history = []
        for tokens in windows(config):
            state, metrics = step(state, place(mesh, tokens, accumulation))
            history.append({k: float(v) for k, v in metrics.items()})
        assert step._cache_size() == 1, (
            "the step's result has another type than its argument: it compiles twice"
        )
    return state, history


@pytest.mark.smoke
@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (8, 1, 1, 1), (1, 1, 4, 2)], ids=str)
def test_training_on_any_mesh_equals_training_on_one_device(sizes, config, mesh_of, place):
    config = dataclasses.replace(config, out="")  # the same for all cases, so that one device trains once
    mesh = mesh_of(*sizes)
    _, history = train(config, mesh, place, config.data.accumulation(sizes[0] * sizes[1]))
    _, expected = train(config, mesh_of(1, 1, 1, 1), place, config.data.accumulation(1))
    for metrics, reference in zip(history, expected, strict=True):
        assert metrics == pytest.approx(reference, rel=1e-5)
    assert len({m["loss"] for m in expected}) == STEPS


def test_accumulation_equals_one_big_batch(config, mesh_of, place):
    mesh = mesh_of(1, 1, 1, 1)
    config = dataclasses.replace(config, out="")
    state, history = train(config, mesh, place, 8)
    expected_state, expected = train(config, mesh, place, 1)
    for metrics, reference in zip(history, expected, strict=True):
        assert metrics == pytest.approx(reference, rel=1e-5)
    for p, q in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected_state.params), strict=True):
        # Adam divides by a small root, which magnifies rounding: a hundredth of one update.
        np.testing.assert_allclose(p, q, atol=1e-2 * config.optim.lr)


def test_devices_of_the_data_axis_sum_their_gradients_once_a_step(config, mesh_of, place):
    model = config.model
    mesh, accumulation = mesh_of(2, 2, 1, 1), config.data.accumulation(4)
    assert accumulation > 1
    with jax.set_mesh(mesh):
        batch = place(mesh, windows(config, 1)[0], accumulation)
        compiled = make_train_step(config).lower(init_state(config), batch).compile()
    shard = (model.d_model // 2, model.d_ff)  # what a device stores of W_gate
    times = {
        n: {shape for _, shape in collective.arrays}
        for collective, n in executed_collectives(compiled.as_text()).items()
        if collective.kind == "all-reduce" and any(shape[-2:] == shard for _, shape in collective.arrays)
    }
    assert times.keys() == {1}
    assert (model.n_layers, *shard) in times[1]


@pytest.mark.parametrize(("sizes", "unroll"), [((1, 2, 1, 1), "yes"), ((2, 2, 1, 1), "no")], ids=str)
def test_weights_gathered_once_a_step_train_as_on_one_device(sizes, unroll, config, mesh_of, place):
    config = dataclasses.replace(config, out="")
    execution = dataclasses.replace(config.execution, gather="step", unroll_layers=unroll)
    once = dataclasses.replace(config, execution=execution)
    _, expected = train(config, mesh_of(1, 1, 1, 1), place, 8)
    accumulation = 8 // (sizes[0] * sizes[1])
    state, history = train(once, mesh_of(*sizes), place, accumulation)
    for metrics, reference in zip(history, expected, strict=True):
        assert metrics == pytest.approx(reference, rel=1e-5)
    for x, y in zip(
        jax.tree.leaves(state), jax.tree.leaves(abstract_state(once, mesh_of(*sizes))), strict=True
    ):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_weights_gathered_once_a_step_leave_micro_batches_nothing_to_exchange(config, mesh_of, place):
    once = dataclasses.replace(config, execution=dataclasses.replace(config.execution, gather="step"))
    step, mesh, counts = make_train_step(once), mesh_of(2, 2, 1, 1), []
    with jax.set_mesh(mesh):
        for accumulation in (2, 4):
            batch = place(mesh, np.tile(windows(config, 1)[0], (2, 1))[: 4 * accumulation], accumulation)
            compiled = step.lower(abstract_state(config, mesh), batch).compile()
            counts.append(sum(executed_collectives(compiled.as_text()).values()))
    assert counts[0] == counts[1] > 0


def test_a_batch_that_every_device_has_is_split_where_devices_compute_alone(config, mesh_of, place):
    config, mesh = dataclasses.replace(config, out=""), mesh_of(2, 1, 1, 1)
    _, expected = train(config, mesh_of(1, 1, 1, 1), place, 8)
    batch = place(mesh, windows(config, 1)[0], 4)
    with jax.set_mesh(mesh):
        whole = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), batch)
        metrics = make_train_step(config)(init_state(config), whole)[1]
    assert float(metrics["loss"]) == pytest.approx(expected[0]["loss"], rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(expected[0]["grad_norm"], rel=1e-5)


def test_loss_is_the_mean_over_counted_tokens_even_when_micro_batches_count_unequally(config, mesh_of, place):
    mesh = mesh_of(1, 1, 1, 1)
    tokens = windows(config, 1)[0]
    batch = place(mesh, tokens, 8)
    n_counted = 5
    targets = np.full_like(batch["targets"], IGNORED)
    targets[0, 0, :4], targets[7, 0, 7] = tokens[0, 1:5], tokens[7, 8]
    with jax.set_mesh(mesh):
        state = init_state(config)
        batch["targets"] = jax.device_put(targets, batch["inputs"].sharding)
        total, count = make_eval_step(config)(state.params, batch)
        assert count == n_counted
        _, metrics = make_train_step(config)(state, batch)
    assert float(metrics["loss"]) == pytest.approx(float(total) / n_counted, rel=1e-6)


def test_casting_the_weights_once_changes_no_bit(config, mesh_of, place, monkeypatch):
    model = dataclasses.replace(config.model, compute_dtype="bfloat16")
    execution = dataclasses.replace(config.execution, remat="full")
    config, mesh = dataclasses.replace(config, model=model, execution=execution), mesh_of(1, 1, 1, 1)
    batch, after = place(mesh, windows(config, 1)[0], 4), []
    with jax.set_mesh(mesh):
        for cast in (step_module.cast_weights, lambda _, params: params):
            monkeypatch.setattr(step_module, "cast_weights", cast)
            after.append(make_train_step(config)(init_state(config), batch))
    kinds = {str(x.dtype) for x in jax.tree.leaves(cast_weights(model, after[0][0].params))}
    assert kinds == {"bfloat16", "float32"}
    assert all(map(np.array_equal, *map(jax.tree.leaves, after)))


def test_first_update_moves_no_parameter_but_fills_the_moments(config, mesh_of, place):
    mesh = mesh_of(1, 1, 1, 1)
    with jax.set_mesh(mesh):
        state = init_state(config)
        before = jax.tree.map(np.array, state.params)
        after, metrics = make_train_step(config)(state, place(mesh, windows(config, 1)[0], 8))
    assert metrics["learning_rate"] == 0
    assert metrics["momentum_norm"] > 0
    assert after.step == 1
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(after.params)))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params)), "the old state still takes memory"


def test_every_array_of_the_state_is_born_split_as_its_abstract_description_says(config, mesh_of):
    mesh = mesh_of(1, 2, 2, 2)
    with jax.set_mesh(mesh):
        state = init_state(config)
    wanted = abstract_state(config, mesh)
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    pieces_of = {
        1: "final_norm attention_norm mlp_norm q_norm kv_norm",
        2: "w_qa w_kva w_kr",  # fsdp
        4: "table w_qb w_uk w_uv w_o w_gate w_up w_down",  # fsdp x tensor
    }
    expected = {name: n for n, names in pieces_of.items() for name in names.split()}
    moments = optax.tree.get(state.opt_state, "mu"), optax.tree.get(state.opt_state, "nu")
    for tree in (state.params, *moments):
        pieces = {}
        for path, x in jax.tree.leaves_with_path(tree):
            name = path[-2 if path[-1].key == "gain" else -1].key
            pieces[name] = x.nbytes / x.addressable_shards[0].data.nbytes
        assert pieces == expected


def test_gradients_add_up_in_float32_when_parameters_are_bfloat16(config, mesh_of, place, monkeypatch):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, param_dtype="bfloat16"))
    optimizer, dtypes = make_optimizer(config.optim), []

    def update(grads, *args):
        dtypes.extend(g.dtype for g in jax.tree.leaves(grads))
        return optimizer.update(grads, *args)

    monkeypatch.setattr(step_module, "make_optimizer", lambda _: optimizer._replace(update=update))
    mesh = mesh_of(1, 1, 1, 1)
    state = abstract_state(config, mesh)
    with jax.set_mesh(mesh):
        make_train_step(config).trace(state, place(mesh, windows(config, 1)[0], 8))
    assert {p.dtype for p in jax.tree.leaves(state.params)} == {np.dtype("bfloat16")}
    assert dtypes
    assert set(dtypes) == {np.dtype("float32")}


@pytest.mark.parametrize(
    ("remat", "attention", "sizes"),
    [
        *(
            pytest.param(remat, None, (1, 1, 1, 1), marks=pytest.mark.slow)
            for remat in ("products", "mlp", "full")
        ),
        ("dots", GroupedAttentionConfig(n_kv_heads=2, d_head=8), (1, 1, 1, 1)),
        ("products", None, (1, 1, 2, 1)),
        ("dots", None, (1, 1, 1, 2)),  # where no product adds to the sum of gradients itself
    ],
    ids=str,
)
def test_layers_in_a_row_train_as_layers_in_a_loop(remat, attention, sizes, config, mesh_of, place):
    model = dataclasses.replace(config.model, attention=attention or config.model.attention)
    config = dataclasses.replace(config, model=model, out="")
    in_a_row = dataclasses.replace(
        config, execution=dataclasses.replace(config.execution, remat=remat, unroll_layers="yes")
    )
    expected, expected_history = train(config, mesh_of(1, 1, 1, 1), place, 8)
    state, history = train(in_a_row, mesh_of(*sizes), place, 8 // sizes[0])
    state, expected = jax.device_get((state, expected))
    for metrics, reference in zip(history, expected_history, strict=True):
        assert metrics == pytest.approx(reference, rel=1e-5)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for p, q in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(p, q, atol=1e-2 * config.optim.lr)  # as between accumulations
    gradients = lambda state: jax.tree.leaves(optax.tree.get(state.opt_state, "mu"))
    for p, q in zip(gradients(state), gradients(expected), strict=True):
        assert np.linalg.norm(p - q) < 1e-3 * np.linalg.norm(q)


def test_layers_are_in_a_row_on_gpus_that_hold_them_whole(config, mesh_of, monkeypatch):
    def unrolled(*sizes, unroll="auto", gather="auto", n_micro=2):
        with jax.set_mesh(mesh_of(*sizes)):
            execution = dataclasses.replace(config.execution, unroll_layers=unroll, gather=gather)
            return step_module.unrolls_layers(execution, n_micro)

    assert not unrolled(2, 1, 1, 1)  # on the CPU
    assert unrolled(1, 2, 1, 1, unroll="yes")
    monkeypatch.setattr(step_module, "current_device", lambda: ("gpu", "NVIDIA H100 80GB HBM3"))
    assert unrolled(2, 1, 2, 2)
    assert not unrolled(1, 2, 1, 1)
    assert unrolled(1, 2, 1, 1, gather="step")
    assert not unrolled(1, 2, 1, 1, gather="step", n_micro=1)
    assert not unrolled(1, 1, 1, 1, unroll="no")


def test_of_layers_in_a_row_each_has_its_gradients_before_the_next_backward_pass(config, mesh_of, place):
    execution = dataclasses.replace(config.execution, unroll_layers="yes")
    mesh = mesh_of(1, 1, 1, 1)
    config = dataclasses.replace(config, execution=execution)
    with jax.set_mesh(mesh):
        program = make_train_step(config).lower(init_state(config), place(mesh, windows(config, 1)[0], 2))
    assert program.as_text().count("optimization_barrier") == config.model.n_layers


def test_on_gpus_the_step_is_compiled_to_repeat_unless_the_run_or_xla_flags_say_otherwise(
    config, monkeypatch
):
    monkeypatch.setattr(step_module, "current_device", lambda: ("gpu", ""))
    flag, no = (
        "xla_gpu_exclude_nondeterministic_ops",
        dataclasses.replace(config.execution, deterministic="no"),
    )
    assert step_module.gpu_options(config.execution)[flag] is True
    assert flag not in step_module.gpu_options(no)
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=x --{flag}=false")
    assert flag not in step_module.gpu_options(config.execution)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11) or not importlib.util.find_spec("jax_cuda13_plugin"),
    reason="needs JAX 0.11 or later and its CUDA 13 plugin",
)
def test_compiled_for_an_h100_the_large_products_add_their_gradients_to_the_sums_themselves():
    config = load_config("mlra_4")
    model = dataclasses.replace(config.model, n_layers=1, vocab_size=1024)
    execution = dataclasses.replace(config.execution, remat="products")
    data = dataclasses.replace(config.data, seq_len=256, micro_batch=1, global_batch=2)
    config = dataclasses.replace(config, model=model, execution=execution, data=data)
    devices = np.array(gpu_devices("NVIDIA H100 80GB HBM3")).reshape((1,) * 4)
    mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Explicit,) * 4)
    with jax.set_mesh(mesh):
        tokens = NamedSharding(mesh, TRAIN_RULES.spec(None, "batch", "length"))
        tokens = jax.ShapeDtypeStruct((2, 1, 256), jnp.int32, sharding=tokens)
        step = make_train_step(config).lower(
            abstract_state(config, mesh), {"inputs": tokens, "targets": tokens}
        )
    program = step.compile().as_text()
    # Atomic additions of floats would come in another order each time.
    assert not re.search(r"\b(scatter|select-and-scatter)\(", program)
    # Of W_qa, W_kva, W_kr, W_o, W_gate, W_up and W_down.
    added = re.findall(
        r"= \(f32\[\S* s8\[\S* custom-call\(.*cublas\$lt\$matmul.*output_to_operand_aliasing", program
    )
    assert len(added) >= 7
    loops = set(re.findall(r"body=%([\w.]+)", program))
    [body] = [text for text in program.split("\n\n") if text.startswith(tuple(f"%{n} " for n in loops))][-1:]
    sums = [line for line in body.splitlines() if "fusion(" in line and "checkpoint/add" in line]
    assert not [line for line in sums if re.search(r"f32\[(3072,9880|9880,3072|24,128,3072)\]", line)]
    assert (
        len(re.findall(r"mosaic_gpu_v2.*add_rms_norm", body)) == 2
    )  # one norm follows a sum, forth and back
