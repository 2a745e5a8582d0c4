"""Several processes as one program, and stopping all of them together.

Every host of a cluster runs the same command. `initialize` connects their processes; `StopSignal` turns a SIGTERM on
any of them into one step after which all stop.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any, ClassVar

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils

from mlra_jax.config import ConfigError, NotNegative, NotNegativeFloat, Range, Validated


@dataclasses.dataclass(frozen=True)
class DistributedConfig(Validated):
    """How this process finds the others. It differs between processes and is not part of a run's configuration."""

    at: ClassVar[str] = "distributed."
    auto: bool = False
    """Ask JAX to find the cluster (a TPU pod, Slurm, Open MPI, Kubernetes); the default under `srun` and
    `mpirun`, and for TPU slices in Kubernetes."""
    coordinator: str = ""
    """HOST:PORT of process 0, the same on every process, for a cluster that JAX does not know."""
    processes: NotNegative = 0
    """Number of processes, with `coordinator`."""
    process_id: Annotated[int, Range(ge=-1)] = -1
    """Index of this process, from 0, with `coordinator`."""
    timeout: Annotated[float, Range(ge=1)] = 40.0
    """Seconds within which all processes end when one of them dies or hangs."""
    step_timeout: NotNegativeFloat = 600.0
    """Seconds that a training step may take (six times as long where it compiles, evaluates or saves); then all
    processes end and say where each of them is, also if there is only one. 0: no limit."""

    def conflicts(self) -> list[str]:
        at = self.at
        given = bool(self.coordinator), self.processes != 0, self.process_id != -1
        if any(given) and not all(given):
            return [f"{at}coordinator, {at}processes and {at}process_id go together; give all three."]
        if any(given) and self.auto:
            return [f"{at}auto finds the cluster itself; leave out {at}coordinator."]
        if any(given) and not 0 <= self.process_id < self.processes:
            return [
                f"{at}process_id={self.process_id} must be from 0 to {at}processes - 1 = {self.processes - 1}."
            ]
        if self.coordinator and not self.coordinator.rpartition(":")[2].isdigit():
            return [f"{at}coordinator={self.coordinator} must be HOST:PORT."]
        return []


@dataclasses.dataclass(frozen=True)
class _Options:
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)


def take_args(argv: Sequence[str]) -> tuple[DistributedConfig, list[str]]:
    """Takes the options `--distributed.FIELD VALUE` out of a command line; returns them and the other arguments."""
    options, others = tyro.cli(
        _Options, args=argv, use_underscores=True, add_help=False, return_unknown_args=True
    )
    return options.distributed, others


def _launched_as_one_of_several() -> bool:
    """Whether `srun`, `mpirun` or a TPU slice under Kubernetes started this process along with others."""
    environment = os.environ
    sizes = (environment.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    several = "," in hosts and " " not in hosts  # libtpu may have left a warning there
    slices = "MEGASCALE_COORDINATOR_ADDRESS" in environment
    return slices or several or any(size.isdigit() and int(size) > 1 for size in sizes)


def initialize(config: DistributedConfig) -> None:
    """Connects this process with the others of its cluster, if any; call before JAX touches a device.

    Raises:
      ConfigError: `config` is not valid, or there are other processes that it does not mention.
    """
    config.validate()
    heartbeat = math.ceil(1.5 * config.timeout)  # the watchdog should come first: JAX gives no reason
    if config.coordinator:
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process_id,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=heartbeat,
        )
    elif config.auto or _launched_as_one_of_several():
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat)
    elif jax.process_count() > 1:
        raise ConfigError(
            f"This is one of {jax.process_count()} hosts of a TPU slice; add --distributed.auto on each of them."
        )


def agree(size: int | None) -> int | None:
    """Broadcasts process 0's `size` in bytes, rounded to MiB, to every process; all must call it."""
    if jax.process_count() == 1:
        return size
    mib = np.int32(-1 if size is None else size // 2**20)  # fits JAX's 32 bits
    agreed = int(multihost_utils.broadcast_one_to_all(mib))
    return None if agreed < 0 else agreed * 2**20


class StopSignal:
    """A context manager that tells whether SIGTERM has asked to stop.

    One process: a flag that the signal sets. Several: JAX's preemption service, which passes a signal that any of them
    received on to the others and picks a step that none has passed.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous: Any = None
        self._installed = False

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received = True

    def __enter__(self) -> StopSignal:
        # Python can set handlers in the main thread only. With several processes JAX has set its own.
        if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._receive)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`; every process must call it after every step."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received
