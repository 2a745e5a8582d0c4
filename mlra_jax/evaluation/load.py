"""From a checkpoint to parameters that score whole sequences on a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
    """A model that is evaluated, laid out as in training, and how its batches are."""

    config: TrainConfig
    """Of the run that made it."""
    params: dict[str, Any]
    """In the training layout."""
    mesh: Mesh
    """With explicit axes."""
    seq_len: int
    """T: most tokens of a sequence."""
    batch_size: int
    """Sequences that a data-parallel device (data x fsdp) takes at a time."""

    @property
    def n_data_shards(self) -> int:
        """Devices that take different sequences."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def batch_sharding(self) -> NamedSharding:
        """Of tokens [accumulation, sequences, T]."""
        with jax.set_mesh(self.mesh):
            return NamedSharding(self.mesh, TRAIN_RULES.spec(None, "batch", "length"))

    def rows(self, n: int) -> int:
        """Sequences in a batch, of which there are `n` in all: no more than needed, the same on each device."""
        return self.n_data_shards * min(self.batch_size, -(-n // self.n_data_shards))


@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """A checkpoint that fits a mesh; nothing has been allocated yet."""

    checkpoint: str
    """Folder of one step."""
    config: TrainConfig
    """Of the run that made it, with the T of the evaluation."""
    sizes: MeshConfig
    """Resolved."""
    devices: Sequence[jax.Device]
    """So many."""
    batch_size: int
    """See `Evaluated`."""

    def load(self) -> Evaluated:
        """Reads the parameters onto the mesh, in the type in which they are stored.

        Raises:
          CheckpointError: they are damaged, or not those of the configuration.
        """
        mesh = make_mesh(self.sizes, self.devices)
        params = load_params(self.checkpoint, abstract_state(self.config, mesh).params)
        return Evaluated(self.config, params, mesh, self.config.data.seq_len, self.batch_size)


def plan_evaluation(
    checkpoint: str,
    mesh: MeshConfig = ALL_DEVICES,
    *,
    seq_len: int = 0,
    batch_size: int = 8,
    step: int | None = None,
) -> EvaluationPlan:
    """Checks that a checkpoint's model and its batches fit a mesh.

    Args:
      checkpoint: a run's folder, its `checkpoints` folder or one step's folder; local or a bucket URL.
      mesh: sizes, as in training; see `mlra_jax.generation.load.decode_devices` for which devices.
      seq_len: most tokens of a sequence; 0: the length that the model was trained with.
      batch_size: sequences that a data-parallel device takes at a time.
      step: updates made by the checkpoint; None: the latest.

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
    return EvaluationPlan(folder, config, sizes, devices, batch_size)
