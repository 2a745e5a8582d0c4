"""The adapter for vLLM's JAX back end: what it makes of a batch, on what it compiles, and whole runs of the engine.

The last need vLLM and tpu-inference, 8 GB in an environment of their own (docs/vllm.md), and are skipped without them.
"""

import dataclasses
import importlib.util
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlra_jax.cli.configs import load_config
from mlra_jax.config import ConfigError, MeshConfig
from mlra_jax.execution.topologies import topology_mesh
from mlra_jax.model import Transformer
from mlra_jax.serving.vllm import RULES, MLRAForCausalLM, check, ragged_batch

AUTO = (AxisType.Auto,) * 2


def test_each_device_of_the_data_axis_has_its_own_requests_and_pages():
    """Two devices with 4 requests each, of which 2 and 3 are real; 8 tokens each."""
    page, pages = 4, 3
    new, seen = [[3, 2], [1, 1, 4]], [[6, 0], [4, 11, 2]]
    tables = np.random.default_rng(0).permutation(24).reshape(2, 4, pages)
    positions, slots = (
        np.full((2, 8), 5),
        np.full((2, 8), -1),
    )  # the positions of padding are those of an earlier batch
    starts = np.zeros((2, 5), int)
    for device in range(2):
        starts[device, 1:] = np.cumsum(np.r_[new[device], [0] * (4 - len(new[device]))])
        starts[device, len(new[device]) + 1 :] += 7  # past the real requests there may be anything
        for r, (n, first) in enumerate(zip(new[device], seen[device], strict=True)):
            at, p = slice(starts[device, r], starts[device, r] + n), first + np.arange(n)
            positions[device, at], slots[device, at] = p, tables[device, r, p // page] * page + p % page
    metadata = types.SimpleNamespace(
        input_positions=jnp.array(positions.ravel()),
        block_tables=jnp.array(tables.ravel()),
        seq_lens=jnp.zeros(8, int),
        query_start_loc=jnp.array(starts.ravel()),
        request_distribution=jnp.array([0, 0, 2, 2, 2, 3]),
    )
    with jax.set_mesh(jax.make_mesh((2, 1), ("data", "model"), AUTO, devices=jax.devices()[:2])):
        batch = jax.tree.map(np.asarray, jax.jit(lambda: ragged_batch(metadata, page))())
    assert batch.slot_T.reshape(2, 8).tolist() == slots.tolist()
    assert batch.position_T.reshape(2, 8).tolist() == positions.tolist()
    for device in range(2):
        count_R, first_R, table_RN = (
            x.reshape(2, -1, *x.shape[1:])[device] for x in (batch.count_R, batch.first_R, batch.table_RN)
        )
        assert count_R[count_R > 0].tolist() == new[device]
        assert first_R[count_R > 0].tolist() == starts[device, : len(new[device])].tolist()
        assert table_RN[count_R > 0].tolist() == tables[device, : len(new[device])].tolist()


def test_what_the_model_does_not_do_is_refused():
    config = types.SimpleNamespace(
        parallel_config=types.SimpleNamespace(pipeline_parallel_size=2),
        cache_config=types.SimpleNamespace(cache_dtype="fp8"),
        lora_config=None,
        speculative_config=None,
    )
    mesh = jax.make_mesh((1, 2), ("data", "expert"), AUTO, devices=jax.devices()[:2])
    with pytest.raises(ConfigError) as error:
        check(config, mesh)
    assert error.value.faults == [
        "vLLM serves MLRA without --pipeline-parallel-size.",
        "vLLM serves MLRA without --kv-cache-dtype.",
        "vLLM serves MLRA without a mesh axis expert of size 2.",
    ]


def test_the_plugin_costs_nothing_without_the_back_end():
    code = (
        "import importlib.util, sys; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'tpu_inference' else find(name, *a)\n"
        "from mlra_jax.serving.vllm_plugin import register; register()\n"
        "assert not {'jax', 'flax', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "n_tokens"),
    [(t, 64) for t in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")] + [("v6e:2x2", 1024)],
)
def test_the_engines_step_compiles_for_tpu_with_our_kernel_and_copies_no_pages(topology, n_tokens):
    """As tpu-inference calls it: 64 requests of up to 8192 tokens, each with one new token, or prompts among them."""
    n_requests, page, n_pages, layers = 64, 128, 8192, 2
    devices = topology_mesh(topology, MeshConfig(data=1, fsdp=1, tensor=4, context=-1)).devices.ravel()[:4]
    mesh = Mesh(devices.reshape(1, 4), ("data", "model"), axis_types=AUTO)
    config = load_config("mlra_4").model
    config = dataclasses.replace(config, n_layers=layers, param_dtype=config.compute_dtype)
    array = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, P(*spec))
    )
    with jax.set_mesh(mesh):
        make = lambda: nnx.split(Transformer(config, rngs=nnx.Rngs(0), rules=RULES, layout="decode"))
        graph, state = jax.eval_shape(make)
        place = lambda x: array(
            x.get_value().shape, x.get_value().dtype, *RULES.spec(*x.get_metadata("out_sharding"))
        )
        leaves = {path: place(x) for path, x in nnx.to_flat_state(state)}
        pools = [array((n_pages, page, 4, 2, 128), jnp.bfloat16, "data", None, "model")] * layers
        by_token, by_request = array((n_tokens,), jnp.int32, "data"), array((n_requests,), jnp.int32, "data")
        metadata = {
            "input_positions": by_token,
            "block_tables": array((n_requests * 8192 // page,), jnp.int32, "data"),
            "seq_lens": by_request,
            "query_start_loc": array((n_requests + 1,), jnp.int32),
            "request_distribution": array((3,), jnp.int32),
        }

        def step(leaves, pools, tokens, metadata):
            model = MLRAForCausalLM.__new__(MLRAForCausalLM)
            nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(leaves))
            object.__setattr__(model, "mlra", nnx.merge(graph, state))
            pools, hidden, *_ = MLRAForCausalLM.__call__(
                model, pools, tokens, types.SimpleNamespace(**metadata)
            )
            return pools, hidden

        compiled = jax.jit(step, donate_argnums=1).lower(leaves, pools, by_token, metadata).compile()
    pool_bytes = n_pages * page * 2 * 128 * 2
    assert compiled.memory_analysis().temp_size_in_bytes < pool_bytes  # there is no room for a copy
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as e:  # XLA cannot read back some programs for tpu7x
        if "async-update" in str(e):
            return
        raise
    assert len(re.findall(r"%decode_attention\S* = ", text)) == layers


needs_vllm = pytest.mark.skipif(
    not importlib.util.find_spec("tpu_inference"), reason="needs vLLM and tpu-inference"
)


@needs_vllm
@pytest.mark.parametrize("devices", ["--tensor 1", "--tensor 4", "--tensor 4 --http", "--tensor 2 --data 2"])
def test_greedy_tokens_are_those_of_the_generator(devices, repository):
    """40 prompts that share prefixes, in chunks, batched, twice."""
    script = repository / "tests" / "serving" / "vllm_on_cpu.py"
    run = [sys.executable, str(script), *devices.split()]
    shown = subprocess.run(run, capture_output=True, text=True, cwd=repository)
    assert shown.returncode == 0, shown.stdout[-5000:] + shown.stderr[-5000:]
    assert "80 of 80 completions equal" in shown.stdout
