"""The Triton kernels: what they decline, how they are tiled, compiled for GPUs that are not there, and their numbers.

Numbers come from Triton's interpreter, on the CPU, and from the GPU where there is one
(`MLRA_TEST_PLATFORM=cuda,cpu pytest tests/ops/test_triton.py`).
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlra_jax.execution.accelerators import find_accelerator
from mlra_jax.execution.topologies import gpu_devices
from mlra_jax.ops.decode.arg_specs import BENCHMARKS, ArgSpec, abstract_call
from mlra_jax.ops.decode.triton import Config, Triton
from mlra_jax.ops.dispatch import explain
from tests.ops.common import A100, EDGES, H100, L4, T4, in_float32, make_call

installed = lambda *names: all(importlib.util.find_spec(name) for name in names)

SMALL = ArgSpec((100, 7), rows=16)


# What it declines


def reason(call):
    return explain(call, *call.args)[call.op.__name__]["triton"]


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        ({"layout": "feature_major"}, jnp.bfloat16, "It reads token_major caches, not feature_major."),
        ({}, jnp.float32, "It takes bfloat16 or float16 for queries and cache alike, not float32."),
        ({"width": 96}, jnp.bfloat16, "Its widths are powers of two from 16 to 512; got [64, 96]."),
        ({"rope": 8}, jnp.bfloat16, "Its widths are powers of two from 16 to 512; got [8, 128]."),
        ({"width": 1024}, jnp.bfloat16, "Its widths are powers of two from 16 to 512; got [64, 1024]."),
        (
            {"value": 48, "rope": 0},
            jnp.bfloat16,
            "Its widths are powers of two from 16 to 512; got [48, 128].",
        ),
        ({"pool": "packed"}, jnp.bfloat16, "It reads whole arrays, not columns of a pool."),
        ({"page_size": 24}, jnp.bfloat16, "Its pages hold a multiple of 16 tokens; got 24."),
    ],
)
def test_it_says_why_it_declines_a_call(compiled_for, change, dtype, message):
    compiled_for(A100)
    assert reason(abstract_call(dataclasses.replace(SMALL, **change), dtype)) == message


def test_it_says_why_it_declines_a_device(compiled_for):
    for kind, platform in (("cpu", "cpu"), (T4, "gpu")):
        compiled_for(kind, platform)
        said = f"It needs an NVIDIA GPU of the Ampere generation or later; this is a {kind}."
        assert reason(abstract_call(SMALL)) == said
    compiled_for("NVIDIA B9000")
    assert reason(abstract_call(SMALL)).startswith("It does not know NVIDIA B9000; add it")


@pytest.fixture
def installs(monkeypatch):
    """Pretends that libraries of these versions are installed; what they hold is missing."""

    def install(bridge, triton, jax_version):
        kept, versions = importlib.metadata.version, {"jax-triton": bridge, "triton": triton}

        def version(package):
            if (found := versions.get(package, "")) is None:
                raise importlib.metadata.PackageNotFoundError(package)
            return found or kept(package)

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(jax, "__version_info__", jax_version)
        monkeypatch.delitem(sys.modules, "mlra_jax.ops.decode.triton.kernels", raising=False)
        monkeypatch.delattr("mlra_jax.ops.decode.triton.kernels", raising=False)
        monkeypatch.setitem(sys.modules, "jax_triton", types.ModuleType("jax_triton"))
        monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))

    return install


@pytest.mark.parametrize(
    ("bridge", "triton", "jax_version", "said"),
    [
        (None, None, (0, 11, 2), "are no jax-triton, no triton, jax .*: pip install .* 'mlra_jax.triton.'"),
        ("0.4.1", "3.6.0", (0, 11, 2), "jax-triton 0.4.1, triton 3.6.0, jax .*: pip install 'triton>=3.7'"),
        (
            "0.3.1",
            "3.7.0",
            (0, 11, 2),
            "jax-triton 0.3.1, triton 3.7.0, jax .*: pip install 'triton>=3.6,<3.7'",
        ),
        ("0.2.0", "3.6.0", (0, 11, 2), "needs jax-triton 0.3 and Triton 3.6 or later"),
        ("0.4.1", "3.9.0", (0, 12, 0), "needs JAX before 0.12; these are .*: pip install 'jax"),
        (
            "0.4.1",
            "3.7.0",
            (0, 11, 2),
            "jax-triton 0.4.1, triton 3.7.0, jax .*: ModuleNotFoundError: .* pip install",
        ),
    ],
)
def test_libraries_that_do_not_fit_are_declined_with_versions_and_what_to_install(
    compiled_for, installs, bridge, triton, jax_version, said
):
    """Some pairs import and trace, and would fail when the program is compiled, after `xla` could have been taken."""
    compiled_for(A100)
    installs(bridge, triton, jax_version)
    assert re.search(said, reason(abstract_call(SMALL)))


def test_a_cuda_plugin_that_does_not_fit_jaxlib_is_declined_with_both_versions(
    compiled_for, installs, monkeypatch
):
    compiled_for(A100)
    installs("0.4.1", "3.7.0", (0, 11, 2))
    kernels = "mlra_jax.ops.decode.triton.kernels"
    monkeypatch.setitem(sys.modules, kernels, types.ModuleType(kernels))
    monkeypatch.setitem(sys.modules, "jaxlib.gpu_triton", types.ModuleType("jaxlib.gpu_triton"))
    said = reason(abstract_call(SMALL))
    assert re.search("CUDA plugin, .* these are jaxlib .*: pip install --upgrade 'mlra_jax.cuda.'", said)


def test_a_block_that_does_not_divide_the_page_is_declined(compiled_for):
    compiled_for(A100)
    call = abstract_call(dataclasses.replace(SMALL, page_size=32))
    wide = Triton(config=Config(16, 64, 1, 4, 2))
    with pytest.raises(NotImplementedError, match="blocks of 64 tokens do not fit whole into pages of 32"):
        explain(functools.partial(call, implementation=wide), *call.args)


# How it is tiled


@pytest.mark.parametrize(
    ("kind", "capability", "processors"),
    [
        (A100, 80, 108),
        ("NVIDIA A10", 86, 72),
        ("NVIDIA A10G", 86, 80),
        (L4, 89, 58),
        ("NVIDIA L40S", 89, 142),
        ("NVIDIA H100 PCIe", 90, 114),
        (H100, 90, 132),
        ("NVIDIA H200", 90, 132),
    ],
)
def test_a_chip_is_known_by_what_jax_calls_it(kind, capability, processors):
    chip = find_accelerator(kind)
    assert (chip.capability, chip.processors) == (capability, processors)


def config_for(case, kind):
    """The heuristic's tiling, and the programs that it makes of the case."""
    config = Config.heuristic(case.shape, find_accelerator(kind))
    programs = len(case.lengths) * case.heads * -(-case.shape.rows // config.block_rows)
    return config, programs * config.splits


@pytest.mark.parametrize("kind", [A100, L4, H100])
def test_long_contexts_are_split_until_all_processors_have_work(kind):
    for name, case in BENCHMARKS.items():
        _, programs = config_for(case, kind)
        assert programs >= 0.8 * find_accelerator(kind).processors, name


@pytest.mark.parametrize("kind", [A100, L4, H100])
def test_what_already_fills_the_chip_is_not_split(kind):
    assert config_for(ArgSpec((1024,) * 4096), kind)[0].splits == 1
    assert config_for(ArgSpec((100,)), kind)[0].splits == 1


@pytest.mark.parametrize("page", [16, 48, 64, 80, 128])
def test_a_page_holds_whole_blocks(page):
    assert page % config_for(dataclasses.replace(SMALL, page_size=page), A100)[0].block_tokens == 0


# Compiled ahead of time

compiles = pytest.mark.skipif(
    not installed("triton", "jax_triton", "jax_cuda13_plugin") or jax.__version_info__ >= (0, 12),
    reason="needs jax-triton, JAX's CUDA 13 plugin, and JAX before 0.12",
)


def described_mesh(kind, devices=1):
    """GPUs that are described and not there."""
    return Mesh(np.array(gpu_devices(kind, devices)), ("tensor",))


@pytest.fixture
def kernels(monkeypatch):
    """Name, warps, bytes of shared memory and PTX of each kernel that jax-triton makes."""
    from jax._src.lib import gpu_triton

    made, make = [], gpu_triton.TritonKernel

    def spy(name, warps, ctas, shared, ptx, *rest):
        made.append((name, warps, shared, ptx))
        return make(name, warps, ctas, shared, ptx, *rest)

    monkeypatch.setattr(gpu_triton, "TritonKernel", spy)
    return made


def registers(ptx, tmp_path):
    """Registers of a thread, and bytes spilled, as ptxas counts them."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = ptx.decode() if isinstance(ptx, bytes) else ptx
    target = re.search(r"\.target (sm_\d+a?)", ptx)[1]
    (tmp_path / "kernel.ptx").write_text(ptx)
    command = [get_ptxas(80).path, "-v", f"-arch={target}", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"Used (\d+) registers", said)[1]), int(
        re.search(r"(\d+) bytes spill stores", said)[1]
    )


def lower(case, mesh, dtype=jnp.bfloat16):
    call = abstract_call(case, dtype)
    with jax.set_mesh(mesh):
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))
        return jax.jit(functools.partial(call, implementation="triton")).lower(
            *jax.tree.map(place, call.args)
        )


COMPILED = {
    **{name: BENCHMARKS[name] for name in ("mlra_4 1x128K", "mla 16x4K", "gla_2 1x128K", "gqa 1x128K")},
    "mlra_4 all heads, pages": ArgSpec((9000, 9000), q_len=2, heads=4, page_size=64),
    "no rope, narrow, pages": ArgSpec((9000,), rope=0, width=64, page_size=128),
    "wide keys": ArgSpec((9000,), rope=0, width=512, value=128),
}


@compiles
@pytest.mark.parametrize("kind", [A100, L4, H100])
@pytest.mark.parametrize("name", COMPILED)
def test_kernels_fit_into_registers_and_shared_memory(kernels, tmp_path, kind, name):
    lower(COMPILED[name], described_mesh(kind))
    assert [kernel[0] for kernel in kernels] == ["split_kernel", "combine_kernel"]
    for name, warps, shared, ptx in kernels:
        per_thread, spilled = registers(ptx, tmp_path)
        assert spilled == 0, name
        assert per_thread * 32 * warps <= 65536
        assert shared <= find_accelerator(kind).shared_bytes
        assert name == "combine_kernel" or "cp.async" in ptx  # copies run ahead of the products


@compiles
@pytest.mark.parametrize("kind", [A100, L4, H100])
def test_xla_takes_the_kernel_in_its_program(kind):
    program = lower(ArgSpec((9000,), page_size=64), described_mesh(kind)).compile().as_text()
    assert program.count('custom_call_target="triton_kernel_call') == 2
    assert " copy(" not in program  # the cache is read where it lies


@compiles
def test_it_compiles_inside_shard_map_with_latent_heads_split_over_devices():
    mesh = described_mesh(A100, devices=2)
    call = abstract_call(ArgSpec((9000,), heads=4))
    specs = P(None, None, "tensor"), P(None, None, "tensor"), P(None, "tensor"), P(), P()
    with jax.set_mesh(mesh):
        local = jax.shard_map(
            lambda *args: call(*args, None, implementation="triton"),
            in_specs=specs,
            out_specs=P(None, None, "tensor"),
            check_vma=False,
        )
        place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        program = jax.jit(local).lower(*map(place, call.args[:-1], specs)).compile().as_text()
    assert "triton_kernel_call" in program
    assert "all-" not in program


# Numbers


@pytest.mark.skipif(not installed("triton"), reason="needs triton")
def test_kernels_equal_the_specification_in_tritons_interpreter(repository):
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.importorskip("triton", minversion="3.9", reason="older interpreters need NumPy before 2.4")
    path = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    program = repository / "tests/ops/triton_interpreter.py"
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def on_gpu(test):
    available = jax.default_backend() == "gpu" and installed("triton", "jax_triton")
    return pytest.mark.gpu(
        pytest.mark.skipif(not available, reason="needs an NVIDIA GPU and jax-triton")(test)
    )


def check(call, config=None):
    """As close to float32 as rounding to bfloat16 allows; the same bits again."""
    run = jax.jit(functools.partial(call, implementation=Triton(config=config)))
    out, lse = run(*call.args)
    wide = in_float32(call)
    exact, exact_lse = jax.jit(functools.partial(wide, implementation="reference"))(*wide.args)
    exact = np.asarray(exact)
    np.testing.assert_allclose(
        np.asarray(out, np.float32), exact, rtol=0, atol=2 * 2**-8 * np.abs(exact).max()
    )
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-5, atol=1e-4)
    for _ in range(3):
        for again, first in zip(run(*call.args), (out, lse), strict=True):
            np.testing.assert_array_equal(again, first)


@on_gpu
@pytest.mark.parametrize("splits", [None, 3])
@pytest.mark.parametrize("name", EDGES)
def test_numbers_at_the_limits_of_blocks_pages_and_lengths(name, splits):
    config = None
    if splits:
        chip = find_accelerator(jax.devices()[0].device_kind)
        config = dataclasses.replace(Config.heuristic(EDGES[name].shape, chip), splits=splits)
    check(make_call(EDGES[name]), config)


@on_gpu
@pytest.mark.parametrize("page", [None, 64])
@pytest.mark.parametrize("rope", [0, 32, 64])
@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_numbers_in_every_width(width, rope, page):
    lengths = (0, 1, 31, 32, 33, 63, 64, 65, 1000)
    check(
        make_call(
            ArgSpec(lengths, q_len=2, heads=2, rows=32, width=width, rope=rope, page_size=page), width + rope
        )
    )


@on_gpu
@pytest.mark.parametrize("q_len", [1, 3, 8])
@pytest.mark.parametrize("rows", [1, 24, 64, 128])
def test_numbers_of_every_number_of_queries(q_len, rows):
    check(make_call(ArgSpec((5, 700, 0, 3000), q_len=q_len, rows=rows, page_size=128), q_len * rows))


@on_gpu
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (64, 128), (256, 64)], ids=str)
@pytest.mark.parametrize("heads", [(1, 8), (4, 3)], ids=str)
def test_numbers_of_grouped_caches(heads, widths):
    (groups, rows), (width, value) = heads, widths
    check(make_call(ArgSpec((1, 0, 127, 2000), 2, groups, rows, width, 0, value)))


@on_gpu
def test_numbers_of_a_long_context_over_all_processors():
    check(make_call(dataclasses.replace(BENCHMARKS["mlra_4 1x128K"], page_size=64)))


@on_gpu
def test_random_tilings_give_the_same_numbers():
    rng = np.random.default_rng(0)
    for seed in range(12):
        config = Config(
            block_rows=int(rng.choice([16, 32, 64])),
            block_tokens=int(rng.choice([16, 32, 64, 128])),
            splits=int(rng.integers(1, 12)),
            warps=int(rng.choice([4, 8])),
            stages=int(rng.integers(1, 4)),
        )
        lengths = tuple(int(n) for n in rng.integers(0, 2000, 3))
        check(make_call(ArgSpec(lengths, q_len=3, rows=24, page_size=128), seed), config)
