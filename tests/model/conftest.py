"""Models with the official reference weights, and meshes."""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from mlra_jax.config import MeshConfig, ModelConfig
from mlra_jax.convert import model_config_from_official, open_safetensors, params_from_official
from mlra_jax.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class Parity:
    """A model with the official weights, in float32, and what the official code gave for it (tests/parity)."""

    variant: str
    config: ModelConfig
    params: dict[str, Any]
    expected: dict[str, np.ndarray]


@pytest.fixture(scope="session")
def parity(repository) -> Callable[[str], Parity]:
    """`parity(variant)`."""

    @functools.cache
    def load(variant: str) -> Parity:
        folder = repository / "tests" / "parity"
        official = json.loads((folder / f"{variant}.json").read_text())
        config = model_config_from_official(official["config"], official["official_module"])
        config = dataclasses.replace(config, compute_dtype="float32")
        params = params_from_official(open_safetensors(folder / f"{variant}.safetensors"), config)
        return Parity(variant, config, params, dict(np.load(folder / f"{variant}.npz")))

    return load


@pytest.fixture(scope="session")
def on_mesh() -> Callable[..., contextlib.AbstractContextManager]:
    """`with on_mesh(data, fsdp, tensor, context):` runs on so many simulated devices; `on_mesh()` without a mesh."""

    def enter(*sizes: int) -> contextlib.AbstractContextManager:
        if not sizes:
            return contextlib.nullcontext()
        return jax.set_mesh(make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)]))

    return enter
