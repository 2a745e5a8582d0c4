"""The train and decode steps, compiled ahead of time for absent TPUs."""

import dataclasses
import importlib.util

import jax
import pytest
from flax import nnx

from mlra_jax.cli.configs import load_config
from mlra_jax.config import ConfigError, MeshConfig, ModelConfig
from mlra_jax.execution.accelerators import device_memory
from mlra_jax.execution.planner import resolve
from mlra_jax.execution.topologies import Memory, compile_train_step, topology_mesh
from mlra_jax.generation.engine import compile_step
from mlra_jax.model import Transformer
from mlra_jax.model.layers import MLP_UNIT
from mlra_jax.sharding import decode_rules

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
    pytest.mark.usefixtures("as_users_compile"),
]

TRAIN = {"v5e:4x4": 16, "v5p:2x2x1": 4, "v6e:2x4": 8}  # topology: devices


def train_config(name: str, n_devices: int):
    config = load_config(name)
    return dataclasses.replace(
        config,
        mesh=MeshConfig(data=1, fsdp=n_devices),
        data=dataclasses.replace(config.data, global_batch=2 * n_devices, micro_batch=1),
    )


def n_params(config: ModelConfig) -> int:
    """All parameters of a model; the paper's has 2.87 billion."""
    return sum(x.size for x in jax.tree.leaves(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))))


# A train step of the paper's model takes the compiler a minute and a half; tests/cli/test_plan.py compiles a tiny one.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "topology"), [("tiny", "v6e:2x4"), *(("mlra_4", t) for t in TRAIN)])
def test_train_step_compiles_and_fits(name, topology):
    config = train_config(name, TRAIN[topology])
    mesh = topology_mesh(topology, config.mesh)
    memory = Memory.of(compile_train_step(config, mesh))
    assert memory.total < device_memory(mesh.devices.flat[0])
    # The donated state is updated in place, so little more than the metrics comes out beside it.
    assert memory.outputs < 1e6
    _, plan = resolve(config, mesh)
    assert plan.fits
    if name == "mlra_4":
        assert plan.total == pytest.approx(memory.total, rel=0.1)
        # Parameters and two moments in float32, an equal part on each device.
        state = 12 * n_params(config.model) / TRAIN[topology]
        assert 0.99 * state < memory.arguments < 1.1 * state


@pytest.mark.slow
@pytest.mark.parametrize(("seq_len", "sequences"), [(32_768, 32), (131_072, 8)])
@pytest.mark.parametrize("topology", ["v5e:16x16", "v6e:16x16", "v5p:4x4x4"])
def test_the_recipe_for_long_sequences_compiles_and_fits(topology, seq_len, sequences):
    config = load_config("long")
    data = dataclasses.replace(config.data, seq_len=seq_len, global_batch=sequences)
    mesh = topology_mesh(topology, config.mesh)
    config, plan = resolve(dataclasses.replace(config, data=data), mesh)
    memory = Memory.of(compile_train_step(config, mesh))
    assert memory.total < device_memory(mesh.devices.flat[0])
    assert plan.total == pytest.approx(memory.total, rel=0.1)


@pytest.mark.parametrize(
    ("name", "n_layers", "topology"),
    [
        *(("tiny", 3, topology) for topology in ("v5e:2x2", "v6e:2x2")),
        ("mlra_4", 2, "v5p:2x2x1"),
        *(pytest.param("mlra_4", 24, t, marks=pytest.mark.slow) for t in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")),
    ],
)
def test_decode_step_compiles_and_fits(name, n_layers, topology):
    config = dataclasses.replace(
        load_config(name).model, n_layers=n_layers, param_dtype="bfloat16", compute_dtype="bfloat16"
    )
    batch, max_len = 8, 4096
    mesh = topology_mesh(topology, MeshConfig(data=1, tensor=4))
    compiled = compile_step(config, decode_rules(), mesh, batch=batch, max_len=max_len)
    memory = Memory.of(compiled)
    assert memory.total < device_memory(mesh.devices.flat[0])
    # The donated cache is updated in place.
    a = config.attention
    cache = n_layers * batch * max_len * (a.d_latent + a.d_rope) * 2
    assert compiled.memory_analysis().alias_size_in_bytes >= cache
    assert memory.outputs < 1e6
    if name == "mlra_4":
        # Whole on each device: W_qa and W_kr, and the norms (a quarter of them is in `weights`). Padded: the MLP.
        weights = 2 * n_params(config) / 4
        whole = 2 * n_layers * 3072 * (1024 + 64) * 3 / 4
        padding = 2 * n_layers * 3 * 3072 * (-(9880 // 4) % MLP_UNIT)
        assert weights + whole + padding < memory.arguments - cache < 1.001 * (weights + whole + padding)


def test_several_slices_are_described_and_lie_along_data():
    mesh = topology_mesh("2*v5e:2x2", MeshConfig(data=2, fsdp=4))
    assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {1}]


@pytest.mark.parametrize("name", ["v5e", "v5e:", "two*v5e:2x2", "h100:x", "h100"])
def test_what_is_no_name_of_a_topology_is_refused_with_examples(name):
    with pytest.raises(ValueError, match=r"is not a topology; .* v5e:16x16"):
        topology_mesh(name, MeshConfig())


def test_a_topology_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="v99:2x2"):
        topology_mesh("v99:2x2", MeshConfig())


def test_a_mesh_that_does_not_fit_the_topology_is_refused():
    with pytest.raises(ConfigError, match="cannot be laid out on 4 device"):
        topology_mesh("v5e:2x2", MeshConfig(data=3))


def test_the_layout_is_refused_before_compiling():
    config = dataclasses.replace(train_config("mlra_4", 4), mesh=MeshConfig(data=1, tensor=16))
    with pytest.raises(ConfigError, match="n_heads=24 is not divisible by mesh axis tensor=16"):
        compile_train_step(config, "v5e:4x4")
