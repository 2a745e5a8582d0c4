"""The TPU kernel of decode attention: its numbers and copies in an interpreter, its programs by the TPU compiler."""

import contextlib
import dataclasses
import functools
import importlib.util
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mlra_jax.ops.decode.arg_specs import BENCHMARKS, ArgSpec, abstract_call
from mlra_jax.ops.decode.mosaic_tpu import Config, MosaicTPU, kernel
from tests.ops.common import EDGES, POOLS, TOPOLOGIES, in_arrays, in_float32, kv_lens, make_call

ONE_CORE = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5E, 1)
TWO_CORES = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5P, 2)


def on_tpu(case):
    """The case with the cache that the kernel takes: feature-major, in pages of a multiple of 128 tokens, or a pool."""
    if case.pool:
        return dataclasses.replace(case, pool="engine")
    up = lambda n: -(-n // 128) * 128
    page = None if case.page_size is None else up(case.page_size)
    return dataclasses.replace(case, layout="feature_major", max_len=up(case.capacity), page_size=page)


def check(case, seed=0, interpret=True, info=ONE_CORE, config=None, kv_len=None):
    """The kernel, in an interpreter, against the reference in float32."""
    call = make_call(case, seed, kv_len=kv_len)
    wide = in_float32(in_arrays(call))
    exact, exact_lse = jax.jit(functools.partial(wide, implementation="reference"))(*wide.args)
    back_end = MosaicTPU(config, interpret, info)
    out, lse = jax.jit(functools.partial(call, implementation=back_end))(*call.args)
    out = np.asarray(out, np.float32)
    assert np.linalg.norm(out - exact) <= 4e-3 * np.linalg.norm(exact)  # bfloat16 rounds by 2e-3 on average
    np.testing.assert_allclose(lse, exact_lse, atol=1e-4, rtol=0)
    assert np.all(out[np.isneginf(exact_lse)] == 0)


@st.composite
def sizes(draw):
    """Those of calls of either op, a cache of 1280 tokens."""
    latent, pool = draw(st.sampled_from([(True, None), (True, "engine"), (False, None)]))
    return {
        "layout": "token_major" if pool else "feature_major",
        "pool": pool,
        "lengths": (0,) * draw(st.integers(1, 4)),
        "q_len": draw(st.sampled_from([1, 1, 2, 8])),
        "heads": draw(st.integers(1, 3)),
        "rows": draw(st.sampled_from([1, 5, 16, 24])),
        "width": draw(st.sampled_from([64, 128])),
        "rope": draw(st.sampled_from([0, 32, 64])) if latent else 0,
        "value": None if latent else draw(st.sampled_from([64, 128])),
        "page_size": draw(st.sampled_from([16, 32, 64, 128] if pool else [None, 128, 256, 640])),
    }


@pytest.mark.slow  # each example is another program
@settings(max_examples=6, deadline=None)
@given(data=st.data(), sizes=sizes(), seed=st.integers(0, 99), tail=st.sampled_from([128, 256]))
def test_kernel_gives_the_reference_with_any_kv_len_pages_and_nan_where_unseen(data, sizes, seed, tail):
    config = Config(block=512, step=256, tail=tail, shares=data.draw(st.integers(1, 2)))
    case = ArgSpec(max_len=1280, **sizes)
    kv_len = data.draw(kv_lens(len(case.lengths), case.q_len, case.capacity))
    check(case, seed, info=TWO_CORES, config=config, kv_len=kv_len)


@pytest.mark.parametrize("kv_len", [[[513, 1281]], [[2**31 - 1, -(2**31)]], [[128, 0]]], ids=str)
def test_kernel_gives_the_reference_at_the_limits_of_kv_len(kv_len):
    config = Config(block=512, step=256, tail=128)
    check(
        ArgSpec((0,), 2, rows=8, width=64, max_len=1280, layout="feature_major"), config=config, kv_len=kv_len
    )


EDGE_NAMES = [
    "nothing",
    "wide",
    "odd rows",
    "many rows",
    "long pages",
    "small pages of a pool",
    "pool of an engine",
]


@pytest.mark.parametrize("name", EDGE_NAMES)
def test_kernel_gives_the_reference_at_the_edges_with_the_sizes_it_chooses(name):
    check(on_tpu((EDGES | POOLS)[name]))


def races_found():
    """Whether the interpreter's last run saw a copy and a read or write of the same memory, unordered."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


WITH_COPIES = pltpu.InterpretParams(detect_races=True)
RAGGED_PAGES = ArgSpec(
    (700, 0, 130, 1024), rows=8, width=64, rope=32, max_len=1024, page_size=256, layout="feature_major"
)


@pytest.mark.parametrize("shares", [1, 2])
def test_copies_do_not_race_with_what_reads_them(shares):
    config = Config(block=256, step=128, tail=128, shares=shares)
    check(RAGGED_PAGES, interpret=WITH_COPIES, info=TWO_CORES, config=config)
    assert not races_found()


def test_a_kernel_that_does_not_wait_for_its_copies_races(monkeypatch):
    monkeypatch.setattr(kernel, "_wait", lambda *copy: None)
    eager = dataclasses.replace(WITH_COPIES, dma_execution_mode="eager")
    try:
        with contextlib.suppress(AssertionError):  # of wrong numbers
            check(RAGGED_PAGES, interpret=eager, config=Config(block=256, step=128, tail=128))
        found = races_found()
    except jax.errors.JaxRuntimeError as e:  # from JAX 0.12 a race raises
        pltpu.reset_tpu_interpret_mode_state()
        found = "RACE DETECTED" in str(e)
    assert found


def test_reasons_to_decline_name_the_limit():
    for match, case, dtype in (
        ("TPU", ArgSpec((128,), layout="feature_major"), jnp.bfloat16),
        ("feature_major", ArgSpec((128,)), jnp.bfloat16),
        ("bfloat16", ArgSpec((128,), layout="feature_major"), jnp.float32),
        (
            "multiple of 128 tokens; got 64",
            ArgSpec((128,), page_size=64, layout="feature_major"),
            jnp.bfloat16,
        ),
        (
            "multiples of 16, at most 512; got 24",
            ArgSpec((128,), width=24, layout="feature_major"),
            jnp.bfloat16,
        ),
        ("got 1024", ArgSpec((128,), width=1024, layout="feature_major"), jnp.bfloat16),
        (
            r"pools \[P, S, ..., 2, 128\] .*; got \[1, 128, 192\]",
            ArgSpec((128,), pool="packed"),
            jnp.bfloat16,
        ),
        (
            r"one slot of 128 columns .*; got 128 columns from each of \[0, 384\]",
            ArgSpec((16,), heads=2, page_size=16, pool="engine"),
            jnp.bfloat16,
        ),
    ):
        call = abstract_call(case, dtype)
        if case.heads == 2:  # with its second latent where no pair of slots begins
            q_nope, q_rope, latents, *rest = call.args
            call = dataclasses.replace(
                call, args=(q_nope, q_rope, dataclasses.replace(latents, starts=(0, 384)), *rest)
            )
        implementation = "mosaic_tpu" if match == "TPU" else MosaicTPU(info=ONE_CORE)
        with pytest.raises(NotImplementedError, match=match):
            jax.eval_shape(functools.partial(call, implementation=implementation), *call.args)


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


def compile_for(topology, case, **keywords):
    """The call compiled for one device of a topology; the back end must take it."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices[:1]), ("x",), axis_types=(AxisType.Explicit,))
    call = abstract_call(case)
    everywhere = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), call.args)
    with jax.set_mesh(mesh):
        run = functools.partial(call, implementation=MosaicTPU(**keywords))
        return jax.jit(run).lower(*args).compile()


COMPILED = {
    "mlra_4 1x128K": BENCHMARKS["mlra_4 1x128K"],
    "four latents, eight queries": dataclasses.replace(BENCHMARKS["mlra_4 all heads 1x512K"], q_len=8),
    "mla pages": dataclasses.replace(BENCHMARKS["mla 16x16K"], page_size=512),
    "mha": ArgSpec((4096,) * 16, heads=24, rows=1, rope=0, value=128),
    "four latents of a pool": ArgSpec((4096,) * 16, heads=4, page_size=16, pool="engine"),
}


@needs_libtpu
@pytest.mark.usefixtures("as_users_compile")
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", COMPILED)
def test_kernel_compiles_within_the_memory_that_jax_names_and_reads_the_cache_once(name, topology):
    case = on_tpu(COMPILED[name])
    compiled = compile_for(topology, case)
    assert compiled.cost_analysis()["bytes accessed"] < 1.1 * case.shape.token_bytes * sum(case.lengths)
    moved = re.findall(r"= bf16\[([\d,]+)\]\S* (?:copy|transpose|reshape)\(", compiled.as_text())
    queries = 1 if case.value else 2
    caches = [x.size for x in jax.tree.leaves(abstract_call(case).args[queries:-2])]
    assert all(np.prod([int(n) for n in shape.split(",")]) < min(caches) for shape in moved)


@needs_libtpu
@pytest.mark.usefixtures("as_users_compile")
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_kernel_compiles_on_four_devices_that_hold_a_latent_head_each(topology):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices[:4]), ("tensor",), axis_types=(AxisType.Explicit,))
    call = abstract_call(on_tpu(dataclasses.replace(BENCHMARKS["mlra_4 all heads 16x4K"], rows=24)))
    heads, whole = PartitionSpec(None, None, "tensor"), PartitionSpec()
    specs = (heads, heads, PartitionSpec(None, "tensor"), whole, whole)
    args = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in zip(call.args, specs, strict=False)
    ]
    run = lambda *args: call(*args, None, implementation="mosaic_tpu")
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(jax.shard_map(run, in_specs=specs, out_specs=(heads, heads))).lower(*args).compile()
        )
    assert "all-" not in compiled.as_text()


@needs_libtpu
@pytest.mark.usefixtures("as_users_compile")
def test_compiler_refuses_what_exceeds_the_memory_that_jax_names():
    small = dataclasses.replace(ONE_CORE, vmem_capacity_bytes=4 << 20)
    config = Config(block=8192, step=4096, tail=2048)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)vmem"):
        compile_for("v5e:2x2", on_tpu(BENCHMARKS["mlra_4 1x128K"]), info=small, config=config)


def test_sizes_follow_the_memory_and_the_cores_that_jax_names():
    choose = lambda info, batch=1, length=1 << 19: Config.heuristic(
        ArgSpec((length,) * batch, heads=4, layout="feature_major").shape, info
    )
    small = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V4, 1)
    assert choose(small).block < choose(ONE_CORE).block
    assert [choose(TWO_CORES, n).shares for n in (1, 2)] == [2, 2]
    assert [choose(TWO_CORES, n, 4096).shares for n in (1, 2)] == [2, 1]


@needs_libtpu
def test_compiler_expects_no_more_than_the_goal_on_the_chip_with_the_least_room(repository):
    spec = importlib.util.spec_from_file_location("tpu_static", repository / "benchmarks" / "tpu_static.py")
    tpu_static = importlib.util.module_from_spec(spec)
    sys.modules["tpu_static"] = tpu_static  # dataclasses look there
    spec.loader.exec_module(tpu_static)
    chip, lengths = tpu_static.CHIPS["tpu7x"], tpu_static.LENGTHS["1 x 128K"]
    estimate = tpu_static.estimate(chip, 64, lengths)
    nanoseconds = tpu_static.case(64, lengths).cache_bytes / chip.terabytes_per_second / 1e3
    assert estimate.stalls
    assert estimate.cycles < 1.2 * nanoseconds * chip.gigahertz
    assert estimate.binding.startswith("MAT")
