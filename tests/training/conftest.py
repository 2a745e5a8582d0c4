"""A model small enough to train in a second, and processes that train it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from mlra_jax.config import (
    CheckpointConfig,
    DataConfig,
    ExecutionConfig,
    LogConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
    to_dict,
)
from mlra_jax.sharding import TRAIN_RULES, make_mesh
from tests.definitions import SMALL
from tests.training.forked import Process

CONFIG = TrainConfig(
    name="tiny",
    model=SMALL,
    execution=ExecutionConfig(remat="none"),
    data=DataConfig(seq_len=16, global_batch=8, micro_batch=1),
    optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2, decay_steps=20),
    checkpoint=CheckpointConfig(every=4),
    log=LogConfig(every=1, eval_every=100, eval_sequences=8, tensorboard=False),
    steps=8,
    compilation_cache="",
)


@pytest.fixture(scope="session")
def base_config() -> TrainConfig:
    """A run of eight steps, whose folder is still to be named."""
    return CONFIG


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    """A run of eight steps, in a folder of its own."""
    return dataclasses.replace(CONFIG, out=str(tmp_path / "run"))


@pytest.fixture(scope="session")
def mesh_of() -> Callable[..., jax.sharding.Mesh]:
    """`mesh_of(data, fsdp, tensor, context)` over the first so many simulated devices."""

    def make(*sizes: int) -> jax.sharding.Mesh:
        return make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])

    return make


@pytest.fixture(scope="session")
def place() -> Callable[..., dict[str, jax.Array]]:
    """`place(mesh, windows [B, T + 1], accumulation)`: the batch that the train step takes."""

    def put(mesh: jax.sharding.Mesh, windows: np.ndarray, accumulation: int) -> dict[str, jax.Array]:
        with jax.set_mesh(mesh):
            sharding = NamedSharding(mesh, TRAIN_RULES.spec(None, "batch", "length"))
        split = windows.reshape(accumulation, -1, windows.shape[-1])
        return {
            "inputs": jax.device_put(split[..., :-1], sharding),
            "targets": jax.device_put(split[..., 1:], sharding),
        }

    return put


@pytest.fixture(scope="session")
def start_training(repository, environment, compiled, tmp_path_factory) -> Callable[..., Process]:
    """Starts `python train.py` on the tiny configuration in a new process; options as on the command line."""
    folder = tmp_path_factory.mktemp("processes")
    config_file = folder / "tiny.py"
    config_file.write_text(
        f"from mlra_jax.config import from_dict\nget_config = lambda: from_dict({to_dict(CONFIG)!r})\n"
    )

    def start(out: Path, *options: str, devices: int = 8) -> Process:
        argv = [
            "train.py",
            str(config_file),
            "--out",
            str(out),
            "--compilation_cache",
            str(compiled),
            *options,
        ]
        return Process(argv, str(repository), environment(devices))

    return start
