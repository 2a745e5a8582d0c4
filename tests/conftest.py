"""Set before JAX starts: the CPU, eight simulated devices, and several processes with the TPU compiler."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = os.environ.get("MLRA_TEST_PLATFORM", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import pytest
from jax._src import xla_bridge

if "tpu" not in os.environ["JAX_PLATFORMS"]:
    # Once libtpu has compiled for a TPU, its profiler would take part in any profile, and crash: there is no TPU.
    xla_bridge._profiler.register_plugin_profiler = lambda c_api: None
jax.config.update("jax_default_matmul_precision", "highest")
# Compiling is nearly all of the tests' time; what LLVM's optimizations gain is lost on arrays as small as theirs.
jax.config.update("jax_disable_most_optimizations", True)


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
