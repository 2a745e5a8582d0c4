"""Whether a run repeats to the bit on the devices at hand (`mlra-train CONFIG --check-determinism`)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding

from mlra_jax.config import ConfigError, TrainConfig
from mlra_jax.data.pipeline import TrainBatches
from mlra_jax.sharding import TRAIN_RULES
from mlra_jax.training.loop import laid_out
from mlra_jax.training.step import TrainState, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Repetition:
    """What `check_determinism` found; as text a sentence."""

    name: str
    """Of the run."""
    steps: int
    """That were made, three times."""
    arrays: int
    """Of parameters and moments."""
    differing: tuple[str, ...]
    """Those that were not equal in the first two, which ran the same compiled step."""
    differing_afresh: tuple[str, ...]
    """Those that were not equal in the first and the third, whose step was compiled anew."""
    digest: str
    """SHA-256 of all parameters and moments after the first: equal in another process, if that repeats it."""

    @property
    def repeats(self) -> bool:
        """Whether all bits were equal."""
        return not (self.differing or self.differing_afresh)

    def __str__(self) -> str:
        if self.repeats:
            return (
                f"Training of {self.name} repeats to the bit: after {self.steps} steps, made twice and once more with "
                f"a step compiled anew, all {self.arrays} arrays of parameters and moments are equal "
                f"(SHA-256 {self.digest[:16]}, the same in every process that repeats it)."
            )
        names = self.differing or self.differing_afresh
        when = "by the same compiled step" if self.differing else "by a step compiled anew"
        return (
            f"Training of {self.name} does not repeat: after {self.steps} steps, made once more {when}, {len(names)} "
            f"of {self.arrays} arrays of parameters and moments differ ({names[0]} is the first); on GPUs it needs "
            "--execution.deterministic yes, and no XLA_FLAGS that undo it."
        )


def check_determinism(config: TrainConfig, steps: int) -> Repetition:
    """Makes the first `steps` steps of a run three times, the last time compiled anew, and compares all bits.

    Nothing is written, and no checkpoint is read; every process of a cluster calls it.

    Raises:
      ConfigError: the configuration is illegal, or does not fit the devices; or `steps` is not positive.
      DataError: the data cannot be used.
    """
    config.validate()
    if steps < 1:
        raise ConfigError([f"--check-determinism {steps}: give a positive number of steps."])
    config, mesh, plan = laid_out(config)
    with jax.set_mesh(mesh), _nothing_stored():
        data = TrainBatches(config.data, config.model.vocab_size, config.seed)
        sharding = NamedSharding(mesh, TRAIN_RULES.spec(None, "batch", "length"))

        def run(step: Callable[[TrainState, Any], tuple[TrainState, Any]]) -> dict[str, bytes]:
            state = init_state(config)
            with data.device_batches(sharding, plan.accumulation) as batches:
                for _ in range(steps):
                    state, _ = step(state, next(batches))
            return _digests((state.params, state.opt_state))

        step = make_train_step(config)
        first, second = run(step), run(step)
        third = run(make_train_step(config))
    names = list(first)
    # Each process has looked at its own parts of the arrays.
    differ = np.array([[first[name] != other[name] for name in names] for other in (second, third)])
    differ = multihost_utils.process_allgather(differ).reshape(-1, *differ.shape).any(axis=0)
    digest = hashlib.sha256(b"".join(first.values())).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    differing, afresh = (
        tuple(name for name, differs in zip(names, row, strict=True) if differs) for row in differ
    )
    return Repetition(
        config.name,
        steps,
        len(names),
        differing,
        afresh,
        hashlib.sha256(digests.tobytes()).hexdigest(),
    )


@contextlib.contextmanager
def _nothing_stored() -> Iterator[None]:
    """Programs are neither read from nor written to JAX's cache on disk."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _digests(tree: Any) -> dict[str, bytes]:
    """SHA-256 of what this process holds of each array, by the array's path."""

    def digest(x: jax.Array) -> bytes:
        hashed = hashlib.sha256()
        for shard in sorted(x.addressable_shards, key=lambda shard: shard.device.id):
            hashed.update(np.ascontiguousarray(shard.data).view(np.uint8).data)
        return hashed.digest()

    return {
        jax.tree_util.keystr(path, simple=True, separator="."): digest(x)
        for path, x in jax.tree.leaves_with_path(tree)
    }
