"""Causal attention by cuDNN and Tokamax: what they decline, what they are given, and that Tokamax's kernels compile."""

import dataclasses
import functools
import importlib.util
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlra_jax.cli.configs import load_config
from mlra_jax.execution.topologies import compile_train_step, gpu_devices
from mlra_jax.ops import device
from mlra_jax.ops.attention import api, causal_attention, tokamax
from mlra_jax.ops.dispatch import explain
from mlra_jax.sharding import MESH_AXES

A100, H100, T4 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "Tesla T4"
with_tokamax = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("tokamax", "jax_cuda13_plugin"))),
    reason="needs Tokamax and JAX's CUDA 13 plugin",
)


def reason(monkeypatch, name, kind=A100, t=16, s=16, h=64, v=64, dtype=jnp.bfloat16, **keywords):
    """Why an implementation declines a call on a GPU of this kind."""
    monkeypatch.setattr(device, "current_device", lambda: ("cpu" if kind == "cpu" else "gpu", kind))
    monkeypatch.setattr(tokamax, "version", lambda _: (0, 0, 17))
    monkeypatch.setattr(jax, "__version_info__", max(jax.__version_info__, (0, 11, 1)))
    new = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    args = new(1, t, 4, h), new(1, s, 2, h), new(1, s, 2, v)
    attend = functools.partial(causal_attention, implementation=[name, "reference"])
    return explain(attend, *args, scale=1.0, **keywords)["causal_attention"][name]


@pytest.mark.parametrize("name", ["cudnn", "tokamax"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "cpu"}, "Ampere generation or later; this is a cpu"),
        ({"kind": T4}, "Ampere generation or later; this is a Tesla T4"),
        ({"dtype": jnp.float32}, "takes bfloat16 and float16; got float32"),
        ({"s": 20}, "as many queries as keys"),
        ({"s": 20, "q_start": 4}, "from position 0"),
    ],
    ids=str,
)
def test_both_say_why_they_decline_a_call(monkeypatch, name, change, message):
    assert message in reason(monkeypatch, name, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": 60}, "got 60 and 64"),
        ({"h": 192, "v": 128}, "128 at most on this GPU.*got 192 and 128"),
        ({"h": 264, "kind": H100}, "256 at most on this GPU.*got 264"),
        ({"v": 96}, "values no wider; got 64 and 96"),
        ({}, "only where the GPU is; this is compiled for a NVIDIA A100"),
    ],
    ids=str,
)
def test_cudnn_says_which_widths_it_takes_and_where(monkeypatch, change, message):
    assert re.search(message, reason(monkeypatch, "cudnn", **change))


def test_cudnn_is_given_values_as_wide_as_keys_and_the_padding_is_taken_off(monkeypatch):
    kept = jax.nn.dot_product_attention

    def plain(q, k, v, *, implementation, **keywords):
        assert (implementation, q.shape[-1], v.shape[-1]) == ("cudnn", 192, 192)
        return kept(q, k, v, implementation="xla", **keywords)

    monkeypatch.setattr(device, "current_device", lambda: ("gpu", H100))
    monkeypatch.setattr(device, "default_device", lambda: ("gpu", A100))
    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    draw = lambda *shape: jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.bfloat16)
    args = draw(2, 20, 4, 192), draw(2, 20, 2, 192), draw(2, 20, 2, 128)

    def run(name):
        attend = functools.partial(causal_attention, scale=0.1, implementation=name)
        loss = lambda *args: jnp.sum(jnp.sin(attend(*args).astype(jnp.float32)))
        return jax.jit(lambda *args: (attend(*args), *jax.grad(loss, argnums=(0, 1, 2))(*args)))(*args)

    for ours, expected in zip(run("cudnn"), run("reference"), strict=True):
        assert ours.shape == expected.shape
        difference = np.asarray(ours, np.float32) - np.asarray(expected, np.float32)
        assert np.linalg.norm(difference) < 1e-2 * np.linalg.norm(np.asarray(expected, np.float32))


def test_tokamax_says_that_it_is_not_installed_and_that_it_compiles_for_the_default_device(monkeypatch):
    assert "compiles for the default device, a cpu; for a NVIDIA A100" in reason(monkeypatch, "tokamax")
    monkeypatch.undo()
    monkeypatch.setattr(device, "current_device", lambda: ("gpu", A100))
    q = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
    for version, said in ((None, "is not installed"), ((0, 0, 12), "needs Tokamax 0.0.17 and JAX 0.11.1")):
        monkeypatch.setattr(tokamax, "version", lambda _, version=version: version)
        with pytest.raises(
            NotImplementedError, match=rf"{said}.*pip install --upgrade 'mlra_jax\[tokamax\]'"
        ):
            causal_attention(q, q, q, scale=1.0, implementation="tokamax")


def test_a_library_that_fails_leaves_the_call_to_the_next_and_says_which_version_it_is(monkeypatch):
    def outdated(*_, **__):
        raise RuntimeError("cuDNN version 8.9.2 is too old")

    monkeypatch.setattr(device, "default_device", lambda: ("gpu", A100))
    monkeypatch.setattr(jax.nn, "dot_product_attention", outdated)
    said = reason(monkeypatch, "cudnn")
    assert re.search(r"^jax [\d.]+: RuntimeError: cuDNN version 8.9.2 is too old. .*'mlra_jax\[cuda\]'", said)
    monkeypatch.setitem(sys.modules, "tokamax", types.ModuleType("tokamax"))
    said = reason(monkeypatch, "tokamax")
    assert "AttributeError: module 'tokamax' has no attribute 'dot_product_attention'" in said


@with_tokamax
@pytest.mark.parametrize(("n_kv", "h", "v"), [(24, 192, 128), (6, 192, 96), (6, 96, 96)])
def test_tokamax_compiles_for_an_h100_forward_and_backward(n_kv, h, v):
    mesh = Mesh(np.array(gpu_devices(H100)), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh), jax.default_device(mesh.devices.flat[0]):
        new = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P()))
        attend = functools.partial(causal_attention, scale=0.1, implementation="tokamax")
        loss = lambda *args: jnp.sum(attend(*args).astype(jnp.float32))
        args = new(2, 2048, 24, h), new(2, 2048, n_kv, h), new(2, 2048, n_kv, v)
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args).compile().as_text()
    assert len(re.findall(r'custom_call_target="mosaic_gpu', program)) == 3


@with_tokamax
def test_tokamax_runs_in_the_train_step_compiled_for_an_h100(monkeypatch):
    monkeypatch.setattr(api, "IMPLEMENTATIONS", {"tokamax": api.IMPLEMENTATIONS["tokamax"]})
    config = load_config("mlra_4")
    model = dataclasses.replace(config.model, n_layers=1)
    execution = dataclasses.replace(config.execution, remat="attention")
    data = dataclasses.replace(config.data, micro_batch=1, global_batch=1)
    devices = np.array(gpu_devices(H100)).reshape(1, 1, 1, 1)
    mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Explicit,) * 4)
    with jax.default_device(devices.flat[0]):
        config = dataclasses.replace(config, model=model, execution=execution, data=data)
        program = compile_train_step(config, mesh).as_text()
    assert len(re.findall(r'custom_call_target="mosaic_gpu', program)) >= 3
