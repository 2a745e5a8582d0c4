"""Skipping updates whose loss or gradient norm is not finite, or is a spike.

The decision is made on the devices, inside the train step, from a state that is part of the checkpoint: a resumed run
skips what it would have skipped uninterrupted.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlra_jax.config import OptimConfig

SkipState = dict[str, jax.Array]
"""`mean` and `variance` [2] of loss and gradient norm over the updates made; counts `updates`, `skipped` and
`skipped_in_row`."""


def init_skip_state() -> SkipState:
    """The state before the first update: all zeros."""
    counts = {name: jnp.zeros((), jnp.int32) for name in ("updates", "skipped", "skipped_in_row")}
    return {"mean": jnp.zeros(2), "variance": jnp.zeros(2), **counts}


def judge_update(
    config: OptimConfig, state: SkipState, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, SkipState]:
    """Whether to make an update (bool scalar), and the state after it.

    It is made if `loss` and `grad_norm` are finite and, with `spike_deviations`, neither exceeds its running mean by
    more than that many standard deviations. Mean and variance are plain averages over the first `spike_window` updates,
    during which nothing counts as a spike, and exponential with weight 1 / `spike_window` after that. Skipped updates
    do not enter them.
    """
    values = jnp.stack([loss, grad_norm])
    good = jnp.all(jnp.isfinite(values))
    if config.spike_deviations:
        limits = state["mean"] + config.spike_deviations * jnp.sqrt(state["variance"])
        good &= (state["updates"] < config.spike_window) | jnp.all(values <= limits)
    weight = 1 / jnp.minimum(state["updates"] + 1, config.spike_window)
    difference = values - state["mean"]
    made = {
        "mean": state["mean"] + weight * difference,
        "variance": (1 - weight) * (state["variance"] + weight * difference**2),
        "updates": state["updates"] + 1,
        "skipped": state["skipped"],
        "skipped_in_row": jnp.zeros((), jnp.int32),
    }
    skipped = state | {name: state[name] + 1 for name in ("skipped", "skipped_in_row")}
    return good, jax.tree.map(lambda a, b: jnp.where(good, a, b), made, skipped)
