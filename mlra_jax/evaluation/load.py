"""Loads a checkpoint to score whole sequences on a mesh."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from mlra_jax.checkpoints import find_step, load_config, load_params
from mlra_jax.config import MeshConfig, NotNegative, Positive, TrainConfig, require
from mlra_jax.generation.load import decode_devices
from mlra_jax.sharding import TRAIN_RULES, check_train_layout, make_mesh
from mlra_jax.training.step import abstract_state

ALL_DEVICES = MeshConfig()


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A checkpoint's model to evaluate, laid out as in training; its parameters are read when they are first used.

    Attributes:
      checkpoint: folder of one step.
      config: of the run that made it, with the sequence length of the evaluation.
      mesh: with explicit axes.
      batch_size: sequences per data-parallel device (data x fsdp).
    """

    checkpoint: str
    config: TrainConfig
    mesh: Mesh
    batch_size: int

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """The parameters on the mesh, in their stored dtype.

        Raises:
          CheckpointError: they are damaged, or not those of the configuration.
        """
        return load_params(self.checkpoint, abstract_state(self.config, self.mesh).params)

    @property
    def seq_len(self) -> int:
        """T: maximum length of a sequence."""
        return self.config.data.seq_len

    @property
    def batch_sharding(self) -> NamedSharding:
        """Sharding of tokens [accumulation, sequences, T]."""
        with jax.set_mesh(self.mesh):
            return NamedSharding(self.mesh, TRAIN_RULES.spec(None, "batch", "length"))

    def rows(self, n: int) -> int:
        """Rows of a batch, given `n` sequences in all: no more than needed, the same number on each device."""
        n_data_shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return n_data_shards * min(self.batch_size, -(-n // n_data_shards))


def plan_evaluation(
    checkpoint: str,
    mesh: MeshConfig = ALL_DEVICES,
    *,
    seq_len: int = 0,
    batch_size: int = 8,
    step: int | None = None,
) -> Evaluated:
    """Checks that a checkpoint's model and its batches fit a mesh; reads no parameters.

    Args:
      checkpoint: a run's folder, its `checkpoints` folder or one step's folder; local or a bucket URL.
      mesh: sizes, as in training; see `mlra_jax.generation.load.decode_devices` for which devices.
      seq_len: maximum length of a sequence; 0: the training length.
      batch_size: sequences per data-parallel device.
      step: step of the checkpoint; None: the latest.

    Raises:
      ConfigError: mesh, devices, model and sequences do not fit together.
      CheckpointError: there is no such checkpoint.
    """
    require(NotNegative, seq_len=seq_len)
    require(Positive, batch_size=batch_size)
    folder = str(find_step(checkpoint, step))
    config = load_config(folder)
    devices = decode_devices(mesh)
    sizes = mesh.resolve(len(devices))
    data = dataclasses.replace(
        config.data,
        seq_len=seq_len or config.data.seq_len,
        micro_batch=batch_size,
        global_batch=batch_size * sizes.data * sizes.fsdp,
    )
    config = dataclasses.replace(config, data=data)
    check_train_layout(config, sizes)
    return Evaluated(folder, config, make_mesh(sizes, devices), batch_size)
