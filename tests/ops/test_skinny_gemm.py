"""Skinny GEMM: the kernel for Hopper GPUs, what it declines, its tilings, its numbers, and what compiles of it.

Numbers come from the interpreter, on the CPU and with JAX 0.11 or later, and from the GPU where there is one
(`MLRA_TEST_PLATFORM=cuda,cpu pytest tests/ops/test_skinny_gemm.py`).
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh

from mlra_jax.execution.topologies import gpu_devices
from mlra_jax.ops.dispatch import explain
from mlra_jax.ops.skinny_gemm import api, skinny_gemm, swiglu
from mlra_jax.ops.skinny_gemm.mosaic_gpu import Config, MosaicGPU, back_end, kernel
from mlra_jax.ops.skinny_gemm.mosaic_gpu.config import Shape
from tests.ops.common import (
    H100,
    assert_no_races,
    compiles,
    interpreter,
    newer_jax,
    on_hopper,
    waits_left_out,
)

MATRICES = {  # of the 2.9 B MLRA-4: F, K, whether gated
    "gate and up": (9984, 3072, True),
    "down": (3072, 9984, False),
    "output": (3072, 3072, False),
    "latents": (1600, 3072, False),
    "queries": (4608, 1024, False),
}


def draw(rows, f, k, gated, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    x = jax.random.normal(keys[0], (rows, k), jnp.bfloat16)
    return x, 0.1 * jax.random.normal(keys[1], (2, f, k) if gated else (f, k), jnp.bfloat16)


def check(run, x, w, *, dtype=jnp.bfloat16):
    """As close to float32 as the type of the result allows."""
    y = run(x, w)
    assert (y.dtype, y.shape) == (dtype, (len(x), w.shape[-2]))
    op = swiglu if w.ndim == 3 else skinny_gemm
    exact = np.asarray(op(x.astype(jnp.float32), w.astype(jnp.float32), implementation="reference"))
    difference = np.asarray(y, np.float32) - exact
    assert np.linalg.norm(difference) < {4: 1e-5, 2: 3e-3}[y.dtype.itemsize] * np.linalg.norm(exact)
    return y


def test_the_reference_multiplies_and_gates():
    x, w = (np.float64(a) for a in draw(3, 16, 24, True))
    gate, up = x @ w[0].T, x @ w[1].T
    as_float = lambda a: jnp.asarray(a, jnp.float32)
    np.testing.assert_allclose(skinny_gemm(as_float(x), as_float(w[0])), gate, rtol=1e-4, atol=1e-5)
    gated = swiglu(as_float(x), as_float(w))
    np.testing.assert_allclose(gated, gate / (1 + np.exp(-gate)) * up, rtol=1e-4, atol=1e-5)


# What it declines


@pytest.mark.parametrize(
    ("rows", "f", "k", "dtype", "message"),
    [
        (8, 3072, 3072, jnp.float32, "got float32 and float32"),
        (1, 3072, 3072, jnp.bfloat16, "2 to 64 rows; got 1"),
        (65, 3072, 3072, jnp.bfloat16, "2 to 64 rows; got 65"),
        (8, 3072, 3080, jnp.bfloat16, "got 3072 of 3080"),
        (8, 3070, 3072, jnp.bfloat16, "got 3070 of 3072"),
        (8, 1024, 1024, jnp.bfloat16, "4 to 256 MiB; got 2097152 bytes"),
        (8, 50304, 3072, jnp.bfloat16, "4 to 256 MiB; got 309067776 bytes"),
        (8, 3072, 3072, jnp.bfloat16, None),
    ],
)
@newer_jax
def test_it_says_why_it_declines_a_call(monkeypatch, compiled_for, rows, f, k, dtype, message):
    compiled_for(H100)
    monkeypatch.setattr(back_end, "multiply", lambda x, w, **_: jnp.zeros((len(x), w.shape[1]), x.dtype))
    x, w = jax.ShapeDtypeStruct((rows, k), dtype), jax.ShapeDtypeStruct((f, k), dtype)
    reason = explain(skinny_gemm, x, w)["skinny_gemm"]["mosaic_gpu"]
    assert reason is None if message is None else re.search(message, reason)


def test_it_is_for_hopper_alone():
    x, w = draw(8, 2048, 2048, False)
    with pytest.raises(NotImplementedError, match="runs on Hopper GPUs; this is a cpu"):
        skinny_gemm(x, w, implementation="mosaic_gpu")
    assert list(api.SKINNY_GEMM) == list(api.SWIGLU) == ["mosaic_gpu", "reference"]
    assert not api.has_kernel(8, jnp.dtype("bfloat16"))


@newer_jax
def test_few_rows_of_bfloat16_are_for_it(compiled_for):
    compiled_for(H100)
    taken = [api.has_kernel(rows, jnp.dtype("bfloat16")) for rows in (1, 2, 64, 65)]
    assert taken == [False, True, True, False]
    assert not api.has_kernel(8, jnp.dtype("float32"))


# How it cuts the work


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 8),
    f=st.integers(128, 8000),
    k=st.integers(8, 200),
    gated=st.booleans(),
    processors=st.sampled_from([78, 114, 132]),
)
def test_the_heuristic_fits_and_leaves_no_column_and_no_processor_out(rows, f, k, gated, processors):
    shape = Shape(8 * rows, 8 * f, 64 * k, gated, 2)
    config = Config.heuristic(shape, processors)
    assert config is not None
    assert config.fits(shape)
    programs = config.programs(shape)
    assert shape.features <= programs * config.tiles * config.tile
    assert programs * config.splits <= processors


@pytest.mark.parametrize("rows", [8, 16, 32, 64])
@pytest.mark.parametrize("name", MATRICES)
def test_matrices_of_the_2_9b_model_go_to_nearly_all_processors(name, rows):
    shape = Shape(rows, *MATRICES[name], 2)
    config = Config.heuristic(shape, 132)
    assert config.programs(shape) * config.splits >= 100
    read = config.programs(shape) * config.tiles * config.tile
    assert read <= 1.05 * shape.features


# Numbers


def interpreted(config, races=False, dtype=jnp.bfloat16):
    """The kernel on the CPU."""
    options = {"config": config, "interpret": interpreter(races)}

    def run(x, w):
        if w.ndim == 3:
            return swiglu(x, w, implementation=MosaicGPU(**options))
        return skinny_gemm(x, w, dtype=dtype, implementation=MosaicGPU(**options))

    return run


INTERPRETED = {
    "a matrix": (8, 48, 192, False, Config(24, 1, 1, 64, 2)),
    "gated, several tiles": (16, 64, 128, True, Config(16, 2, 1, 64, 3)),
    "split": (64, 48, 320, False, Config(48, 1, 2, 64, 2)),
    "wide blocks": (16, 48, 256, False, Config(24, 1, 1, 128, 2)),
}


def check_interpreted(config, sizes):
    """Checks the numbers, and that threads wait for each other's memory."""
    check(interpreted(config, races=True), *draw(*sizes))
    assert_no_races()


@newer_jax
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_numbers_without_races(name):
    *sizes, config = INTERPRETED[name]
    check_interpreted(config, sizes)


@newer_jax
@settings(max_examples=6, deadline=None, phases=[Phase.generate])
@given(
    rows=st.integers(2, 64),
    f=st.integers(4, 10),
    blocks=st.integers(3, 6),
    gated=st.booleans(),
    tile=st.sampled_from([8, 24, 32]),
    tiles=st.integers(1, 2),
    splits=st.integers(1, 3),
    stages=st.integers(2, 4),
)
def test_interpreted_numbers_of_any_sizes_and_tilings(rows, f, blocks, gated, tile, tiles, splits, stages):
    config = Config(tile, tiles, 1 if gated else splits, 64, stages)
    dtype = jnp.bfloat16 if gated else jnp.float32
    check(interpreted(config, dtype=dtype), *draw(rows, 8 * f, 64 * blocks, gated, rows), dtype=dtype)


@newer_jax
def test_the_interpreter_sees_a_wait_that_is_left_out(monkeypatch):
    with waits_left_out(monkeypatch, kernel, [kernel.multiply]):
        check_interpreted(Config(24, 1, 1, 64, 3), (8, 72, 384, False))


@on_hopper
@pytest.mark.parametrize("rows", [2, 8, 13, 32, 64])
@pytest.mark.parametrize("name", MATRICES)
def test_numbers_on_the_gpu(name, rows):
    f, k, gated = MATRICES[name]
    x, w = draw(rows, f, k, gated)
    run = jax.jit(functools.partial(swiglu if gated else skinny_gemm, implementation="mosaic_gpu"))
    y = check(run, x, w)
    np.testing.assert_array_equal(run(x, w), y)  # the same bits from run to run


# Compiled ahead of time


def compile_all():
    """Run in a process of its own, whose output holds what `ptxas` says of each kernel."""
    mesh = Mesh(np.array(gpu_devices(H100)), ("x",), axis_types=(AxisType.Explicit,))
    new = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P()))
    with jax.set_mesh(mesh):
        for rows in (8, 64):
            for f, k, gated in MATRICES.values():
                run = functools.partial(swiglu if gated else skinny_gemm, implementation="mosaic_gpu")
                jax.jit(run).lower(new(rows, k), new(2, f, k) if gated else new(f, k)).compile()


@compiles
def test_compiled_for_h100_nothing_spills(said_by_ptxas):
    said = said_by_ptxas(__file__)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) >= 2 * len(MATRICES)
    assert max(registers) <= 168  # two warpgroups leave more
    assert set(re.findall(r"(\d+) bytes spill", said)) == {"0"}
    assert "serialized" not in said  # products that wait for each other
