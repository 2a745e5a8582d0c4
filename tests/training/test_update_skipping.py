"""Which updates are skipped, compared with NumPy."""

import numpy as np
import pytest

from mlra_jax.config import ConfigError, OptimConfig
from mlra_jax.training.update_skipping import init_skip_state, judge_update

CONFIG = OptimConfig(skip_limit=3, spike_deviations=4.0, spike_window=16)


def run(config, values):
    """Whether each pair (loss, gradient norm) was accepted, and the final state."""
    state, made = init_skip_state(), []
    for loss, norm in values:
        good, state = judge_update(config, state, np.float32(loss), np.float32(norm))
        made.append(bool(good))
    return made, {name: np.asarray(value) for name, value in state.items()}


def test_mean_and_variance_are_those_of_the_updates_that_were_made():
    values = np.random.default_rng(0).normal(3, 0.1, (16, 2))
    with_faults = [*values[:7], (np.nan, 1), (3, np.inf), *values[7:]]
    made, state = run(CONFIG, with_faults)
    assert made == [True] * 7 + [False] * 2 + [True] * 9
    np.testing.assert_allclose(state["mean"], values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(state["variance"], values.var(0), rtol=1e-3)
    assert (state["updates"], state["skipped"], state["skipped_in_row"]) == (16, 2, 0)


@pytest.mark.parametrize("spike", [(9, 1), (3, 30)], ids=["loss", "gradient norm"])
def test_a_spike_is_left_out_once_the_window_is_full_and_changes_no_limit(spike):
    calm = [(3 + 0.1 * (-1) ** n, 1 + 0.1 * (-1) ** n) for n in range(40)]
    made, state = run(CONFIG, [*calm, spike, spike, *calm, spike])
    assert made == [True] * 40 + [False] * 2 + [True] * 40 + [False]
    assert (state["skipped"], state["skipped_in_row"]) == (3, 1)
    np.testing.assert_allclose(state["mean"], (3, 1), atol=0.02)
    early, _ = run(CONFIG, [*calm[:15], spike])
    assert early[-1], "nothing is a spike before the window is full"


def test_a_fall_is_no_spike_and_none_is_looked_for_unless_asked():
    calm = [(3 + 0.1 * (-1) ** n, 1) for n in range(20)]
    assert run(CONFIG, [*calm, (0.1, 0.01)])[0][-1]
    assert run(OptimConfig(skip_limit=3, spike_window=16), [*calm, (1e6, 1e6)])[0][-1]


def test_spikes_without_a_limit_are_refused():
    with pytest.raises(ConfigError, match=r"spike_deviations=4.0 needs optim\.skip_limit"):
        OptimConfig(spike_deviations=4.0).validate()
