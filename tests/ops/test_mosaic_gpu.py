"""The kernel for Hopper GPUs: what it declines, how it cuts the work, its numbers, and what the compiler makes of it.

Numbers come from the interpreter, on the CPU and with JAX 0.11 or later, and from the GPU where there is one
(`MLRA_TEST_PLATFORM=cuda,cpu pytest tests/ops/test_mosaic_gpu.py`).
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
from jax.sharding import AxisType, Mesh

from mlra_jax.cli.configs import load_config
from mlra_jax.execution.topologies import gpu_devices
from mlra_jax.generation.engine import compile_step
from mlra_jax.ops import hopper
from mlra_jax.ops.columns import Columns
from mlra_jax.ops.decode.arg_specs import BENCHMARKS, ArgSpec, abstract_call
from mlra_jax.ops.decode.mosaic_gpu import Config, MosaicGPU, kernel, merge
from mlra_jax.ops.decode.mosaic_gpu.schedule import make_table
from mlra_jax.ops.dispatch import explain
from mlra_jax.sharding import MESH_AXES, decode_rules
from tests.ops.common import (
    EDGES,
    H100,
    POOLS,
    assert_no_races,
    compiles,
    in_arrays,
    in_float32,
    interpreter,
    kv_lens,
    make_call,
    newer_jax,
    on_hopper,
    share_queries,
    waits_left_out,
)

SMALL = ArgSpec((100, 7), rows=16, max_len=128)


def whole_blocks(case):
    """The case with room for whole blocks of 64 tokens, if it is contiguous; pages may end inside one."""
    return case if case.page_size else dataclasses.replace(case, max_len=-(-case.capacity // 64) * 64)


# What it declines


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        ({"layout": "feature_major"}, jnp.bfloat16, "reads token-major caches; this one is feature_major"),
        ({}, jnp.float32, "takes bfloat16; got float32"),
        ({"width": 96}, jnp.bfloat16, "got 96 [+] 64 and 96"),
        ({"rope": 16}, jnp.bfloat16, "got 128 [+] 16 and 128"),
        ({"max_len": 100}, jnp.bfloat16, "contiguous caches of a multiple of 64; got 100"),
        ({"page_size": 24}, jnp.bfloat16, "16, 32 or a multiple of 64 tokens, .*; got 24"),
        ({"rope": 0, "value": 512, "width": 512}, jnp.bfloat16, "bytes of shared memory"),
    ],
)
@newer_jax
def test_it_says_why_it_declines_a_call(compiled_for, change, dtype, message):
    compiled_for(H100)
    call = abstract_call(dataclasses.replace(SMALL, **change), dtype)
    assert re.search(message, explain(call, *call.args)[call.op.__name__]["mosaic_gpu"])


@newer_jax
@pytest.mark.parametrize(
    ("starts", "width", "message"),
    [
        ((0, 128, 320), 64, r"equal distances and multiples of 64; got \[0, 128, 320\]"),
        ((32, 160, 288), 64, r"multiples of 64; got \[32, 160, 288\]"),
        ((0, 128, 256), 32, "pools of a multiple of 64 columns; got 416"),
    ],
)
def test_it_says_which_columns_it_declines(compiled_for, starts, width, message):
    compiled_for(H100)
    call = abstract_call(ArgSpec((64,), heads=3, width=64, page_size=16, pool="packed"))
    pool = jax.ShapeDtypeStruct((4, 16, 384 + width), jnp.bfloat16)
    args = [*call.args[:2], Columns(pool, starts, 64), Columns(pool, (320,), 64), *call.args[4:]]
    assert re.search(message, explain(call, *args)[call.op.__name__]["mosaic_gpu"])


@pytest.mark.parametrize("device", [("cpu", "cpu"), ("NVIDIA A100-SXM4-40GB", "gpu"), ("Tesla T4", "gpu")])
def test_it_is_for_hopper_alone(compiled_for, device):
    compiled_for(*device)
    call = abstract_call(SMALL)
    reason = explain(call, *call.args)[call.op.__name__]["mosaic_gpu"]
    assert reason == f"the Mosaic GPU kernel runs on Hopper GPUs; this is a {device[0]}."


def test_asked_for_by_name_it_fails_rather_than_fall_back():
    call = make_call(SMALL)
    with pytest.raises(NotImplementedError, match="runs on Hopper GPUs; this is a cpu"):
        call(implementation="mosaic_gpu")


# How it cuts the work


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_heuristic_fits_shared_memory_and_keeps_the_processors_at_work(name):
    shape = BENCHMARKS[name].shape
    config = Config.heuristic(shape, 132)
    assert config.stages >= 2
    assert config.shared_bytes(shape) <= hopper.SHARED_MEMORY
    programs = shape.heads * -(-shape.rows // (64 * config.row_groups))
    programs *= shape.batch if config.n_splits == 1 else config.n_splits
    assert programs >= 0.9 * 132


@newer_jax
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 700), min_size=1, max_size=9),
    n_splits=st.integers(2, 40),
    block=st.sampled_from([64, 128]),
)
def test_shares_cover_every_block_once_and_hold_no_more_than_equal_ones_would(lengths, n_splits, block):
    b = len(lengths)
    table = np.asarray(make_table(jnp.array(lengths), Config(n_splits, block, 2)))
    shares, parts = table[: 4 * n_splits].reshape(4, n_splits).T, table[4 * n_splits :].reshape(2, b).T
    blocks = np.maximum(1, -(-np.array(lengths) // block))
    per = -(-blocks.sum() // n_splits)
    covered, results = [], [[] for _ in lengths]
    for i, (first, last, start, count) in enumerate(shares):
        assert count <= per
        assert (count > 0) == (last >= first)
        for x in range(first, last + 1):
            take = min(count, blocks[x] - start)
            assert take > 0
            covered += [(x, start + j) for j in range(take)]
            results[x].append(i + x)
            count, start = count - take, 0
        assert count == 0 or last < first
    assert covered == [(x, j) for x in range(b) for j in range(blocks[x])]
    assert results == [list(range(*part)) for part in parts]
    if sum(-(-blocks // per)) <= n_splits:
        assert all(first >= last for first, last, *_ in shares)


# Numbers


def as_exact_as_bfloat16(call, out, lse, atol=1e-4):
    wide = in_float32(in_arrays(call))
    exact, exact_lse = jax.jit(functools.partial(wide, implementation="reference"))(*wide.args)
    exact = np.asarray(exact)
    assert not np.isnan(np.asarray(out, np.float32)).any()
    np.testing.assert_allclose(
        np.asarray(out, np.float32), exact, rtol=0, atol=2 * 2**-8 * np.abs(exact).max()
    )
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-5, atol=atol)


def interpreted(call, config, races=True):
    """The kernel on the CPU; threads must not touch memory without waiting for each other."""
    kernels = MosaicGPU(config=config, interpret=interpreter(races))
    out, lse = jax.block_until_ready(jax.jit(functools.partial(call, implementation=kernels))(*call.args))
    if races:
        assert_no_races()
    return out, lse


@newer_jax
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("nothing", Config(3, 64, 2)),
        ("ragged", Config(5, 64, 2)),
        ("off by one", Config(1, 64, 2)),
        ("several latents", Config(4, 64, 3)),
        ("wide", Config(2, 64, 2)),
        ("wide", Config(1, 64, 2)),
        ("many rows", Config(2, 64, 2)),
        ("eight causal queries", Config(1, 64, 2, 2)),
        ("long pages", Config(2, 128, 2)),
        ("small pages of a pool", Config(3, 64, 2)),
        ("pool of an engine", Config(1, 128, 2)),
        ("contiguous pool", Config(2, 64, 2)),
        ("grouped, other value width", Config(1, 64, 2)),
        ("grouped, pages", Config(2, 64, 2)),
        ("several latents", Config(4, 64, 2, streams=2)),
        ("ragged", Config(6, 64, 2, streams=2)),
    ],
    ids=str,
)
def test_interpreted_numbers_without_races(name, config):
    call = make_call(whole_blocks((EDGES | POOLS)[name]))
    as_exact_as_bfloat16(call, *interpreted(call, config))


@newer_jax
@pytest.mark.parametrize("branches", [2, 4])
@pytest.mark.parametrize(
    ("q_len", "config"), [(1, Config(4, 64, 2)), (1, Config(1, 64, 2)), (2, Config(3, 64, 2))]
)
def test_interpreted_queries_shared_by_heads_and_rotated_in_the_kernel(q_len, config, branches):
    case = ArgSpec((100, 190), q_len=q_len, heads=4, rows=16, width=64, max_len=192)
    short, plain = share_queries(make_call(case), branches)
    # The kernel rounds rotated queries once, `apply_rope` each product of them.
    as_exact_as_bfloat16(plain, *interpreted(short, config), atol=3e-3)


@newer_jax
def test_interpreted_prefill_shares_blocks_among_warpgroups():
    call = make_call(ArgSpec((190, 70), q_len=40, heads=2, rows=4, width=64, rope=0, max_len=256))
    as_exact_as_bfloat16(call, *interpreted(call, Config(1, 128, 2, 2)))


@newer_jax
def test_interpreted_merge_of_several_rows_in_rounds(monkeypatch):
    plan = merge.MergePlan(warpgroups=1, at_once=2, rows=4)
    monkeypatch.setattr(merge.MergePlan, "of", lambda *_: plan)
    kernel.attend.clear_cache()
    try:
        call = make_call(ArgSpec((300, 70), rows=16, width=64, max_len=320))
        as_exact_as_bfloat16(call, *interpreted(call, Config(5, 64, 2)))
    finally:
        kernel.attend.clear_cache()


DRAWN = [
    (ArgSpec((0,), rows=8, width=64, max_len=64), Config(1, 64, 2)),
    (ArgSpec((0,) * 3, rows=8, width=64, max_len=192), Config(5, 64, 2)),
    (ArgSpec((0,) * 2, q_len=3, rows=8, width=64, max_len=256, page_size=128), Config(2, 128, 2)),
    (ArgSpec((0,) * 2, q_len=2, heads=2, rows=4, width=64, rope=0, value=64, max_len=128), Config(1, 64, 2)),
    (
        ArgSpec((0,) * 2, q_len=2, rows=4, width=64, rope=32, max_len=128, page_size=16, pool="packed"),
        Config(3, 64, 2),
    ),
]
"""Sizes, each compiled once, for any kv_len."""


@newer_jax
@settings(max_examples=4, deadline=None)
@given(
    drawn=st.sampled_from(DRAWN).flatmap(
        lambda drawn: st.tuples(
            st.just(drawn), kv_lens(len(drawn[0].lengths), drawn[0].q_len, drawn[0].max_len)
        )
    ),
    seed=st.integers(0, 99),
)
@example((DRAWN[0], [[70]]), 0)
@example((DRAWN[1], [[193], [2**31 - 1], [-7]]), 0)
@example((DRAWN[2], [[300, 0, 257], [1, 2**31 - 1, -(2**31)]]), 0)
def test_interpreted_numbers_of_any_kv_len(drawn, seed):
    (case, config), kv_len = drawn
    call = make_call(case, seed, kv_len=kv_len)
    as_exact_as_bfloat16(call, *interpreted(call, config, races=False))


@newer_jax
def test_the_interpreter_sees_a_wait_that_is_left_out(monkeypatch):
    call = make_call(whole_blocks(EDGES["ragged"]))
    of_ring = lambda barrier: barrier.transforms and barrier.ref.shape != (1,)
    with waits_left_out(monkeypatch, kernel, [kernel.attend], of_ring):
        interpreted(call, Config(2, 64, 2))


@on_hopper
@pytest.mark.parametrize("config", [None, Config(3, 64, 2), Config(1, 64, 2)], ids=str)
@pytest.mark.parametrize("name", EDGES | POOLS)
def test_numbers_on_the_gpu(name, config):
    call = make_call(whole_blocks((EDGES | POOLS)[name]))
    run = jax.jit(functools.partial(call, implementation=MosaicGPU(config=config)))
    out, lse = run(*call.args)
    as_exact_as_bfloat16(call, out, lse)
    for again, first in zip(run(*call.args), (out, lse), strict=True):
        np.testing.assert_array_equal(again, first)  # the same bits from run to run


@on_hopper
@pytest.mark.parametrize("index", range(len(DRAWN)))
def test_numbers_on_the_gpu_of_more_tokens_than_there_is_room_for(index):
    case, _ = DRAWN[index]
    kv_len = np.resize([case.max_len + 6, 2**31 - 1, -7, 3, 0], (len(case.lengths), case.q_len))
    call = make_call(case, kv_len=kv_len)
    as_exact_as_bfloat16(call, *jax.jit(functools.partial(call, implementation="mosaic_gpu"))(*call.args))


@on_hopper
@pytest.mark.parametrize("lengths", [(700,), (700, 0, 301)], ids=str)
def test_prefill_numbers_on_the_gpu(lengths):
    call = make_call(ArgSpec(lengths, q_len=300, heads=4, rows=24, max_len=768))
    as_exact_as_bfloat16(call, *jax.jit(functools.partial(call, implementation="mosaic_gpu"))(*call.args))


# Compiled ahead of time


COMPILED = {
    "mlra_4": BENCHMARKS["mlra_4 1x128K"],
    "mlra_4, ragged batch": BENCHMARKS["mlra_4 16x4K"],
    "mlra_4, pages": dataclasses.replace(BENCHMARKS["mlra_4 16x4K"], page_size=64),
    "mlra_4, pool": dataclasses.replace(BENCHMARKS["mlra_4 64x4K"], page_size=16, pool="packed"),
    "two queries": dataclasses.replace(BENCHMARKS["mlra_4 1x128K"], q_len=2),
    "gla_2": BENCHMARKS["gla_2 1x128K"],
    "gqa": BENCHMARKS["gqa 1x128K"],
    "prefill": ArgSpec((8192,), q_len=2048, heads=4, rows=24),
}


def compile_all():
    """Run in a process of its own, whose output holds what `ptxas` says of each kernel."""
    (device,) = gpu_devices(H100)
    mesh = Mesh(np.array([device]), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        for case in COMPILED.values():
            call = abstract_call(case)
            put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, jax.P()))
            run = functools.partial(call, implementation="mosaic_gpu")
            jax.jit(run).lower(*jax.tree.map(put, call.args)).compile()


@compiles
def test_compiled_for_h100_nothing_spills(said_by_ptxas):
    said = said_by_ptxas(__file__)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) >= len(COMPILED)
    assert max(registers) <= 232
    assert set(re.findall(r"(\d+) bytes spill", said)) == {"0"}


@compiles
@pytest.mark.parametrize("sizes", [(1, 1, 4, 1), (2, 1, 1, 2)], ids=str)
def test_the_decode_step_runs_it_on_every_mesh(sizes):
    config = dataclasses.replace(load_config("mlra_4").model, n_layers=2)
    devices = np.array(gpu_devices(H100, 4)).reshape(sizes)
    mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Explicit,) * 4)
    compiled = compile_step(config, decode_rules(False), mesh, batch=2, max_len=4096)
    assert len(re.findall(r'custom_call_target="mosaic_gpu_v2"', compiled.as_text())) >= config.n_layers
