"""Which updates to leave out: those whose loss or gradient is not a number, or far above what it was.

The judgement is made on the devices, inside the train step, from a state that is part of the checkpoint: a run that is
resumed leaves out what it would have left out uninterrupted.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlra_jax.config import OptimConfig

Guard = dict[str, jax.Array]
"""`mean` and `variance` [2] of loss and gradient norm over the updates made; counts `updates`, `skipped` and
`skipped_in_row`."""


def init_guard() -> Guard:
    """Nothing seen yet: all zeros."""
    counts = {name: jnp.zeros((), jnp.int32) for name in ("updates", "skipped", "skipped_in_row")}
    return {"mean": jnp.zeros(2), "variance": jnp.zeros(2), **counts}


def judge(
    config: OptimConfig, guard: Guard, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, Guard]:
    """Whether to make an update (bool scalar), and the guard after it.

    It is made if `loss` and `grad_norm` are finite and, with `spike_deviations`, neither lies more than so many
    standard deviations above its running mean. Mean and variance are plain for `spike_window` updates, in which
    nothing counts as a spike, and exponential with weight 1 / `spike_window` then; what is left out does not enter.
    """
    values = jnp.stack([loss, grad_norm])
    good = jnp.all(jnp.isfinite(values))
    if config.spike_deviations:
        limits = guard["mean"] + config.spike_deviations * jnp.sqrt(guard["variance"])
        good &= (guard["updates"] < config.spike_window) | jnp.all(values <= limits)
    weight = 1 / jnp.minimum(guard["updates"] + 1, config.spike_window)
    difference = values - guard["mean"]
    updated = {
        "mean": guard["mean"] + weight * difference,
        "variance": (1 - weight) * (guard["variance"] + weight * difference**2),
        "updates": guard["updates"] + 1,
        "skipped": guard["skipped"],
        "skipped_in_row": jnp.zeros((), jnp.int32),
    }
    counted = guard | {name: guard[name] + 1 for name in ("skipped", "skipped_in_row")}
    return good, jax.tree.map(lambda a, b: jnp.where(good, a, b), updated, counted)
