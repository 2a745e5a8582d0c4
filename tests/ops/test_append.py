"""Appending to a cache: any slots, in every back end; on TPU in place, and nothing else is touched.

Numbers of the kernel for Hopper GPUs come from the interpreter, with JAX 0.11 or later, and from the GPU where there
is one (`MLRA_TEST_PLATFORM=cuda,cpu pytest tests/ops/test_append.py`).
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlra_jax.cli.configs import load_config
from mlra_jax.config import MeshConfig, ModelConfig
from mlra_jax.execution.topologies import topology_mesh
from mlra_jax.generation.engine import compile_step
from mlra_jax.ops import explain
from mlra_jax.ops.append import append, mosaic_tpu, normalize_and_append
from mlra_jax.ops.norm.reference import rms_norm
from mlra_jax.ops.rotary import frequencies, rotate
from mlra_jax.sharding import decode_rules

S = 128
SLOTS = st.one_of(st.integers(0, S - 1), st.sampled_from([-1, -(2**31), S, S + 1, 2**31 - 1]))
newer_jax = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs JAX 0.11 or later")


def written(array, tokens, slot):
    """The token-major cache [B, ..., S, W] with tokens [B, T, ..., W], in NumPy."""
    array = np.array(array)
    for (b, t), s in np.ndenumerate(np.asarray(slot)):
        if 0 <= s < array.shape[-2]:
            array[b, ..., s, :] = tokens[b, t]
    return array


@functools.cache
def back_end(name, layout):
    interpreted = functools.partial(mosaic_tpu.append, interpret=True)
    op = interpreted if name == "mosaic_tpu" else functools.partial(append, implementation=name)
    return jax.jit(functools.partial(op, layout=layout))


@settings(max_examples=8, deadline=None)
@given(
    name=st.sampled_from(["reference", "mosaic_tpu"]),
    heads=st.sampled_from([(), (2,)]),
    layout=st.sampled_from(["token_major", "feature_major"]),
    slots=st.lists(st.lists(SLOTS, min_size=2, max_size=2, unique=True), min_size=2, max_size=2),
    t=st.integers(1, 2),
)
@example("reference", (2,), "token_major", [[-1, 3], [S, 0]], 1)
@example("reference", (), "feature_major", [[-1, 3], [-S, S - 1]], 2)
@example("mosaic_tpu", (2,), "feature_major", [[-1, 3], [S - 1, 0]], 1)
@example("mosaic_tpu", (), "feature_major", [[S, 3], [-(2**31), 0]], 1)
def test_each_token_goes_to_its_slot_and_one_without_a_slot_nowhere(name, heads, layout, slots, t):
    if name == "mosaic_tpu":
        layout, t = "feature_major", 1
    rng, slot = np.random.default_rng(0), np.array(slots)[:, :t]
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    array, tokens = draw(2, *heads, S, 8), draw(2, t, *heads, 8)
    laid = lambda x: x.swapaxes(-1, -2) if layout == "feature_major" else x
    ours = back_end(name, layout)(jnp.asarray(laid(array)), jnp.asarray(tokens), jnp.asarray(slot))
    np.testing.assert_array_equal(laid(np.asarray(ours)), written(array, tokens, slot))


B, A, U, C, R = 3, 512, 2, 128, 64
EPS, Q_SCALE, KV_SCALE, BASE = ModelConfig().norm_eps, 1.5, 2.5, 1e4
SCALES = {"eps": EPS, "q_scale": Q_SCALE, "kv_scale": KV_SCALE, "frequencies": frequencies(R, BASE)}


def arguments(dtype=jnp.bfloat16, rank=A, slots=(5, S - 1, S), t=1):
    keys = iter(jax.random.split(jax.random.key(0), 5))
    a = jax.random.normal(next(keys), (B, t, rank + U * C + R), dtype)
    gains = 1 + jax.random.normal(next(keys), (rank,)), 1 + jax.random.normal(next(keys), (U, C))
    caches = (
        jax.random.normal(next(keys), (B, U, S, C), dtype),
        jax.random.normal(next(keys), (B, S, R), dtype),
    )
    position = jnp.array([[3], [77], [2**21 - 1]]) + jnp.arange(t)
    return a, *gains, position, jnp.array(slots)[:, None] + jnp.arange(t), *caches


def run_on_hopper(*args):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from mlra_jax.ops.append import mosaic_gpu

    interpret = None if jax.default_backend() == "gpu" else plgpu.InterpretGPUParams(detect_races=True)
    return mosaic_gpu.normalize_and_append(*args, **SCALES, layout="token_major", interpret=interpret)


@pytest.mark.parametrize("slots", [(5, S - 1, S), (-1, 0, 2**31 - 1)], ids=str)
@pytest.mark.parametrize(
    "name", ["reference", pytest.param("mosaic_gpu", marks=[newer_jax, pytest.mark.gpu])]
)
def test_a_token_is_normalised_rotated_and_written_where_it_belongs_and_nowhere_else(name, slots):
    a, q_gain, kv_gain, position, slot, kv_latent, k_rope = args = arguments(slots=slots)
    reference = functools.partial(normalize_and_append, **SCALES, implementation="reference")
    q, *caches = jax.jit(run_on_hopper if name == "mosaic_gpu" else reference)(*args)
    norm = lambda x, gain, scale: (rms_norm(x, gain, EPS) * scale).astype(jnp.bfloat16)
    latents = norm(a[..., A : A + U * C].reshape(B, 1, U, C), kv_gain, KV_SCALE)
    keys = rotate(a[..., A + U * C :], position, SCALES["frequencies"])
    expected = (
        norm(a[..., :A], q_gain, Q_SCALE),
        written(np.float32(kv_latent), np.float32(latents), slot),
        written(np.float32(k_rope), np.float32(keys), slot),
    )
    for x, y in zip((q, *caches), expected, strict=True):
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=1e-2, atol=1e-2)
    for row, s in enumerate(slots):
        if not 0 <= s < S:
            np.testing.assert_array_equal(np.float32(caches[0][row]), np.float32(kv_latent[row]))


@newer_jax
@pytest.mark.parametrize(
    ("change", "layout", "message"),
    [
        ({"dtype": jnp.float32}, "token_major", "takes bfloat16"),
        ({"rank": 96}, "token_major", "got 96, 128 and 64"),
        ({"t": 2}, "token_major", "one token of each row; got 2"),
        ({}, "feature_major", "token-major caches, not feature_major"),
    ],
)
def test_what_the_kernels_do_not_take_is_declined_and_left_to_the_reference(
    monkeypatch, change, layout, message
):
    from mlra_jax.ops import hopper

    monkeypatch.setattr(hopper, "current_device", lambda: ("gpu", "NVIDIA H100 80GB HBM3"))
    monkeypatch.setattr(mosaic_tpu, "current_device", lambda: ("tpu", "TPU v5e"))
    *args, kv_latent, k_rope = arguments(**change)
    if layout == "feature_major":
        kv_latent, k_rope = (x[..., :100, :].swapaxes(-1, -2) for x in (kv_latent, k_rope))
    why = explain(functools.partial(normalize_and_append, **SCALES, layout=layout), *args, kv_latent, k_rope)
    assert message in why["normalize_and_append"]["mosaic_gpu"]
    assert why["normalize_and_append"]["reference"] is None
    tiles = "needs a cache of whole tiles of 128 slots; got 100"
    assert (tiles if layout == "feature_major" else "feature_major") in why["append"]["mosaic_tpu"]
    assert why["append"]["reference"] is None


@pytest.mark.parametrize(
    "topology",
    [
        "v5e:2x2",
        *(
            pytest.param(t, marks=pytest.mark.slow)
            for t in ("v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
        ),
    ],
)
def test_the_decode_step_on_tpu_copies_no_cache(topology):
    mesh = topology_mesh(topology, MeshConfig(data=1, fsdp=1, tensor=4, context=-1))
    config = dataclasses.replace(load_config("mlra_4").model, n_layers=1)
    batch, length = 16, 131072  # the rotary keys alone are larger than any weight
    with jax.set_mesh(mesh):
        split = decode_rules(False).size("cache_length")
    compiled = compile_step(config, decode_rules(False), mesh, batch=batch, max_len=length)
    smallest = batch * length // split * config.attention.d_rope
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * smallest  # there is no room for a copy
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as e:  # XLA cannot read back some programs for tpu7x
        if "async-update" in str(e):
            return
        raise
    moved = []
    for line in text.splitlines():
        if found := re.match(r"\s*(?:ROOT )?%?(\S+) = \w+\[([\d,]+)\]\S* ([\w-]+)\(", line):
            name, sizes, operation = found.groups()
            if np.prod([int(n) for n in sizes.split(",")], dtype=np.int64) >= smallest:
                moved.append((name, operation))
    calls = [name for name, operation in moved if operation == "custom-call"]
    assert len([name for name in calls if name.startswith("append_column")]) == 2
    assert {operation for _, operation in moved} <= {
        "parameter",
        "bitcast",
        "custom-call",
        "get-tuple-element",
    }
    assert len(re.findall(r"%decode_attention\S* = ", text)) == 1
