"""Set before JAX starts: the CPU, eight simulated devices, and programs that compile quickly, each once a run."""

import gc
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable

os.environ["JAX_PLATFORMS"] = os.environ.get("MLRA_TEST_PLATFORM", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# Of this run: its workers find it in the environment.
os.environ.setdefault("MLRA_TEST_COMPILED", f"{tempfile.gettempdir()}/mlra-tests-compiled-{os.getpid()}")

import jax
import jaxlib
import pytest
from jax._src import compilation_cache, xla_bridge
from jax._src.lib import xla_client

# XLA's older emitters compile in a quarter of the time; JAX 0.11 has them no more.
QUICK = " --xla_cpu_use_fusion_emitters=false" if jaxlib.__version__.startswith("0.10.") else ""
with pytest.MonkeyPatch.context() as patch:
    # Read here, once and for all; libtpu, which reads them too and would end the process, does not know this one.
    patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + QUICK)
    _ = xla_client.CompileOptions().executable_build_options.debug_options

COMPILED = pathlib.Path(os.environ["MLRA_TEST_COMPILED"])
SETTINGS = {
    "jax_default_matmul_precision": "highest",
    # Compiling is nearly all of the tests' time; what LLVM's optimizations gain is lost on arrays as small as theirs.
    "jax_disable_most_optimizations": True,
    # What one worker of pytest-xdist, or a process that a test started, has compiled, the others find.
    "jax_compilation_cache_dir": str(COMPILED),
    "jax_persistent_cache_min_compile_time_secs": 0,
}
for name, value in SETTINGS.items():
    jax.config.update(name, value)
# Programs for devices that are not here can be kept but not loaded.
is_cache_used = compilation_cache.is_cache_used
compilation_cache.is_cache_used = lambda backend: (
    backend is jax.devices()[0].client and is_cache_used(backend)
)
if "tpu" not in os.environ["JAX_PLATFORMS"]:
    # Once libtpu has compiled for a TPU, its profiler would take part in any profile, and crash: there is no TPU.
    xla_bridge._profiler.register_plugin_profiler = lambda c_api: None


def pytest_collection_finish() -> None:
    """Leaves the modules, half a million objects, out of what the garbage collector goes through time and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_unconfigure() -> None:
    if COMPILED.name.endswith(f"-{os.getpid()}"):  # not in a worker
        shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture
def as_users_compile():
    """Without what is set above: highest precision, and few optimizations."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    with jax.default_matmul_precision("default"):
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    """Root of the checkout."""
    return pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session")
def compiled() -> pathlib.Path:
    """Folder of the programs compiled in this run."""
    return COMPILED


@pytest.fixture(scope="session")
def environment() -> Callable[[int], dict[str, str]]:
    """`environment(n)`: for a process with n simulated devices, in all else like this one."""

    def of(devices: int) -> dict[str, str]:
        flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
        flags.append(f"--xla_force_host_platform_device_count={devices}")
        settings = {name.upper(): str(value) for name, value in SETTINGS.items()}
        return os.environ | settings | {"XLA_FLAGS": " ".join(flags) + QUICK}

    return of
