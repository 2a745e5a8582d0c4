"""From a checkpoint to parameters that score whole sequences on a mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from mlra_jax.config import ConfigError, MeshConfig, TrainConfig
from mlra_jax.decoding.load import decode_devices
from mlra_jax.sharding import TRAIN_RULES, check_train_layout, make_mesh
from mlra_jax.training.checkpoints import find_step, load_config, load_params
from mlra_jax.training.step import abstract_state


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


def load_evaluated(
    checkpoint: str,
    mesh: MeshConfig,
    *,
    seq_len: int = 0,
    batch_size: int = 8,
    step: int | None = None,
) -> Evaluated:
    """Reads a checkpoint's parameters onto a mesh, in the type in which they are stored.

    Args:
      checkpoint: a run's folder, its `checkpoints` folder or one step's folder; local or a bucket URL.
      mesh: sizes, as in training; see `mlra_jax.decoding.load.decode_devices` for which devices.
      seq_len: most tokens of a sequence; 0: the length that the model was trained with.
      batch_size: sequences that a data-parallel device takes at a time.
      step: updates made by the checkpoint; None: the latest.

    Raises:
      ConfigError: mesh, devices, model and sequences do not fit together; nothing has been allocated then.
      CheckpointError: there is no such checkpoint, or its parameters are not those of its configuration.
    """
    if seq_len < 0 or batch_size < 1:
        raise ConfigError([f"{seq_len=} must be positive (0: as in training), and {batch_size=} at least 1."])
    folder = str(find_step(checkpoint, step))
    config = load_config(folder)
    seq_len = seq_len or config.data.seq_len
    devices = decode_devices(mesh)
    sizes = mesh.resolve(len(devices))
    data = dataclasses.replace(
        config.data,
        seq_len=seq_len,
        micro_batch=batch_size,
        global_batch=batch_size * sizes.data * sizes.fsdp,
    )
    check_train_layout(dataclasses.replace(config, data=data), sizes)
    device_mesh = make_mesh(sizes, devices)
    params = load_params(folder, abstract_state(config, device_mesh).params)
    return Evaluated(config, params, device_mesh, seq_len, batch_size)
