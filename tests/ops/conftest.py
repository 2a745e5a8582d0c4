"""The device that is compiled for, and what the compiler says of kernels."""

import importlib.util
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

from mlra_jax.ops import device


@pytest.fixture
def compiled_for(monkeypatch) -> Callable[..., None]:
    """Pretends that what is traced is compiled for a device of this kind and platform."""
    return lambda kind, platform="gpu": monkeypatch.setattr(
        device, "current_device", lambda: (platform, kind)
    )


@pytest.fixture
def said_by_ptxas(repository) -> Callable[[str], str]:
    """Runs `compile_all()` of a test file in a process of its own: what `ptxas` says of its Mosaic GPU kernels."""

    def run(file: str) -> str:
        ptxas = importlib.util.find_spec("nvidia")
        paths = [
            str(pathlib.Path(p) / "cu13/bin") for p in (ptxas.submodule_search_locations if ptxas else [])
        ]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "PATH": os.pathsep.join([*paths, os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")]),
        }
        command = f"import runpy; runpy.run_path({file!r})['compile_all']()"
        done = subprocess.run(
            [sys.executable, "-c", command], env=environment, cwd=repository, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    return run
