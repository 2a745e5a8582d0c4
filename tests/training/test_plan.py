"""The estimate of a step's memory and what is chosen by it."""

import dataclasses

import jax
import pytest

from mlra_jax.config import ConfigError, MeshConfig
from mlra_jax.execution.accelerators import GIB, described_device
from mlra_jax.execution.planner import Planner, resolve
from mlra_jax.model.transformer import REMAT_POLICIES
from mlra_jax.sharding import abstract_mesh, make_mesh

LENGTH, HEADS, BRANCHES, LATENT, WIDTH, D_FF, LAYERS = 16, 4, 4, 8, 32, 64, 2  # of the tiny configuration
FLOAT = 4


def planner(config, mesh, capacity=None, micro_batch=0, remat="auto", **data):
    data = dataclasses.replace(config.data, micro_batch=micro_batch, **data)
    execution = dataclasses.replace(config.execution, remat=remat)
    return Planner(dataclasses.replace(config, execution=execution, data=data), mesh, capacity)


def test_each_policy_keeps_what_it_says_of_a_layer(config, mesh_of):
    kept = planner(config, mesh_of(1, 1, 1, 1)).kept
    assert kept("full") == FLOAT * LENGTH * WIDTH  # the layer's input
    assert kept("attention") - kept("full") == FLOAT * LENGTH * BRANCHES * HEADS * LATENT
    assert kept("mlp") - kept("attention") == FLOAT * LENGTH * 2 * D_FF
    sizes = [kept(policy) for policy in REMAT_POLICIES]
    assert sizes == sorted(sizes, reverse=True)


def test_a_device_keeps_its_own_part(config, mesh_of):
    whole, parts = (planner(config, mesh_of(*sizes)) for sizes in ((1, 1, 1, 1), (1, 2, 2, 2)))
    assert parts.kept("full") == whole.kept("full") / 2  # its tokens
    kept = lambda p, policy, than: p.kept(policy) - p.kept(than)
    assert (
        kept(parts, "mlp", "full") == kept(whole, "mlp", "full") / 4
    )  # its tokens, heads and part of the MLP
    whole, parts = whole.plan(1, "full").memory, parts.plan(1, "full").memory
    state = lambda memory: memory["parameters"] + memory["moments"]
    assert state(whole) / 4 < state(parts) < state(whole) / 3  # norms are whole on every device


def test_the_state_is_counted_exactly(config, mesh_of):
    memory = planner(config, mesh_of(1, 1, 1, 1)).plan(1, "full").memory
    assert memory["moments"] == 2 * memory["parameters"] + 3 * FLOAT  # and three counts
    assert memory["accumulated gradients"] == memory["parameters"]
    assert planner(config, mesh_of(1, 1, 1, 1)).plan(8, "full").memory["accumulated gradients"] == 0


def test_where_memory_is_unknown_the_least_is_chosen_and_nothing_refused(config, mesh_of):
    mesh = mesh_of(2, 1, 1, 1)
    plan = planner(config, mesh).choose()
    assert (plan.micro_batch, plan.remat, plan.accumulation, plan.fits) == (1, "full", 4, True)
    assert planner(config, mesh, micro_batch=4, remat="none").choose().micro_batch == 4


def test_with_less_memory_less_is_kept_until_nothing_fits(config, mesh_of):
    mesh, chosen, capacity = mesh_of(1, 1, 1, 1), [], GIB
    for _ in range(40):
        try:
            plan = planner(config, mesh, capacity).choose()
        except ConfigError:
            break
        assert plan.total < capacity
        chosen.append((plan.micro_batch, plan.remat))
        capacity = plan.total
    else:
        pytest.fail("something always fits")
    assert len(set(chosen)) == len(chosen) > 3
    assert chosen[0][0] == 8
    assert chosen[-1][0] == 1


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"micro_batch": 8}, r"--data\.micro-batch 0"),
        ({"remat": "none", "micro_batch": 1}, r"--execution\.remat auto"),
        ({"micro_batch": 1, "remat": "full"}, r"--mesh\.fsdp \(now 1\)"),
        ({"micro_batch": 8, "remat": "none"}, r"--mesh\.context \(now 1\) or --mesh\.tensor \(now 1\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_change(options, advice, config, mesh_of):
    with pytest.raises(ConfigError, match=rf"does not fit: micro-batch .* activations .*Try .*{advice}"):
        planner(config, mesh_of(1, 1, 1, 1), 2**16, **options).choose()


def test_resolving_fills_in_what_was_left_open_and_nothing_else(config):
    open_config = dataclasses.replace(
        config,
        execution=dataclasses.replace(config.execution, remat="auto"),
        data=dataclasses.replace(config.data, micro_batch=0),
        mesh=MeshConfig(data=1),
    )
    mesh = make_mesh(open_config.mesh, jax.devices()[:1])
    resolved, plan = resolve(open_config, mesh, GIB)
    assert (resolved.execution.remat, resolved.data.micro_batch) == (plan.remat, plan.micro_batch)
    assert resolved.execution.gather == plan.gather
    execution = dataclasses.replace(resolved.execution, remat="auto", gather="auto")
    data = dataclasses.replace(resolved.data, micro_batch=0)
    assert dataclasses.replace(resolved, execution=execution, data=data) == open_config


def test_of_layers_in_a_row_one_has_gradients_beside_the_sum(config, mesh_of):
    execution = dataclasses.replace(config.execution, unroll_layers="yes")
    in_a_row = planner(dataclasses.replace(config, execution=execution), mesh_of(1, 1, 1, 1))
    in_a_loop = planner(config, mesh_of(1, 1, 1, 1))
    gradients = lambda planner, micro_batch: planner.plan(micro_batch, "full").memory["gradients"]
    assert gradients(in_a_row, 1) == FLOAT * config.model.vocab_size * WIDTH
    assert gradients(in_a_loop, 1) > 2 * gradients(in_a_row, 1)
    assert gradients(in_a_row, 8) == gradients(in_a_loop, 8)  # no sum: one micro-batch is all


def test_weights_gathered_once_a_step_are_whole_and_move_once(config, mesh_of):
    mesh = mesh_of(1, 4, 1, 1)
    layer, step = (planner(config, mesh).plan(1, "full", gather) for gather in ("layer", "step"))
    alone = planner(config, mesh_of(1, 1, 1, 1)).plan(1, "full")
    assert step.memory["accumulated gradients"] == alone.memory["accumulated gradients"]
    assert layer.memory["accumulated gradients"] < step.memory["accumulated gradients"] / 3
    assert step.memory["parameters"] == layer.memory["parameters"]
    assert (
        step.memory["gathered weights"] == alone.memory["parameters"]
    )  # which are float32 here, as products are
    assert step.costs.link_bytes["fsdp"] < layer.costs.link_bytes["fsdp"]
    assert planner(config, mesh).plan(2, "full", "step").gather == "layer"  # one micro-batch: it is the same


def test_weights_are_gathered_once_a_step_on_gpus_that_have_room(config, mesh_of):
    assert planner(config, mesh_of(1, 4, 1, 1), GIB).choose().gather == "layer"  # not on a CPU
    described = lambda *sizes: abstract_mesh(MeshConfig(*sizes), described_device("h100"))
    mesh = described(1, 4, 1, 1)
    choose = lambda capacity: planner(config, mesh, capacity, remat="full", micro_batch=1).choose()
    chosen = choose(GIB)
    assert (chosen.gather, chosen.accumulation) == ("step", 2)
    assert "weights gathered once a step" in str(chosen)
    assert choose(chosen.total).gather == "layer"
    assert planner(config, described(1, 2, 2, 1), GIB, micro_batch=1).choose().gather == "layer"


def test_products_are_kept_where_there_is_room_for_them(config, mesh_of):
    mesh = mesh_of(1, 1, 1, 1)
    costs = {remat: planner(config, mesh).plan(1, remat).costs for remat in ("products", "dots", "none")}
    assert costs["products"].memory_bytes < costs["dots"].memory_bytes
    assert costs["products"].memory_bytes <= costs["none"].memory_bytes
    assert costs["products"].recomputed_flops == costs["dots"].recomputed_flops == 0
