"""A small model on several meshes, what it says of single sequences, and its checkpoint."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import pytest
from flax import nnx

from mlra_jax.checkpoints import Checkpoints
from mlra_jax.config import DataConfig, ExecutionConfig, MeshConfig, TrainConfig
from mlra_jax.evaluation.load import Evaluated
from mlra_jax.model import Transformer, from_params
from mlra_jax.sharding import make_mesh
from mlra_jax.training.step import TrainState, abstract_state
from tests.definitions import SMALL

SEQ_LEN = 96
CONFIG = TrainConfig(
    name="evaluated",
    model=dataclasses.replace(SMALL, output_init="normal", init_std=0.3),
    data=DataConfig(seq_len=SEQ_LEN),
    compilation_cache="",
)


@pytest.fixture(scope="session")
def host_params() -> dict:
    """Parameters in the training layout, on the host."""
    model = jax.jit(lambda: Transformer(CONFIG.model, rngs=nnx.Rngs(0)))()
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


@pytest.fixture(scope="session")
def evaluated(host_params) -> Callable[..., Evaluated]:
    """`evaluated(sizes, batch_size, seq_len)`: the model on a mesh of data x fsdp x tensor x context devices."""

    def make(sizes: tuple[int, ...] = (1, 1, 1, 1), batch_size: int = 4, seq_len: int = SEQ_LEN) -> Evaluated:
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        layout = jax.tree.map(lambda x: x.sharding, abstract_state(CONFIG, mesh).params)
        config = dataclasses.replace(CONFIG, data=DataConfig(seq_len=seq_len))
        model = Evaluated("nowhere", config, mesh, batch_size)
        vars(model)["params"] = jax.device_put(host_params, layout)
        return model

    return make


@pytest.fixture(scope="session")
def log_probabilities(host_params) -> Callable[[np.ndarray], np.ndarray]:
    """Of every id after each of the ids [T] of one sequence, without padding: float64 [T, V]."""
    forward = jax.jit(lambda params, tokens: from_params(CONFIG.model, params)(tokens))

    def of(ids: np.ndarray) -> np.ndarray:
        padded = np.zeros(128, np.int32)  # compiled once
        padded[: len(ids)] = ids
        logits = np.asarray(forward(host_params, padded[None]))[0, : len(ids)].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return of


@pytest.fixture(scope="session")
def checkpoint(evaluated, tmp_path_factory) -> str:
    """The folder of a run whose step 3, saved on eight devices, holds the model."""
    run = tmp_path_factory.mktemp("runs") / "evaluated"
    params = evaluated((2, 2, 2, 1)).params
    checkpoints = Checkpoints(run, CONFIG.checkpoint)
    # What a run on GPUs chooses for itself is nothing to those who read its checkpoints on other devices.
    execution = ExecutionConfig(gather="step", unroll_layers="yes")
    data = dataclasses.replace(CONFIG.data, micro_batch=7)
    chosen = dataclasses.replace(CONFIG, execution=execution, data=data)
    checkpoints.save(3, TrainState(params, opt_state=jax.numpy.zeros(()), step=jax.numpy.int32(3)), chosen)
    checkpoints.close()
    return str(run)
