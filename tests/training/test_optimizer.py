"""The optimizer against the recipe, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlra_jax.config import OptimConfig
from mlra_jax.training.optimizer import learning_rate, make_optimizer

CONFIG = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2, decay_steps=6, clip_norm=1.0)


def reference(config: OptimConfig, params: dict, gradients: list[dict]) -> list[dict]:
    """Parameters after each update of clipped AdamW as PyTorch computes it, in float64."""
    params = {k: p.astype(np.float64) for k, p in params.items()}
    m = {k: np.zeros_like(p) for k, p in params.items()}
    v = {k: np.zeros_like(p) for k, p in params.items()}
    history = []
    for t, grads in enumerate(gradients):
        norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in grads.values()))
        scale = min(1.0, config.clip_norm / (norm + 1e-6))
        if t < config.warmup_steps:
            rate = config.lr * t / config.warmup_steps
        else:
            done = (t - config.warmup_steps) / (config.decay_steps - config.warmup_steps)
            rate = config.min_lr + 0.5 * (1 + np.cos(np.pi * done)) * (config.lr - config.min_lr)
        for k, p in params.items():
            g = grads[k] * scale
            m[k] = config.beta1 * m[k] + (1 - config.beta1) * g
            v[k] = config.beta2 * v[k] + (1 - config.beta2) * g * g
            m_hat = m[k] / (1 - config.beta1 ** (t + 1))
            v_hat = v[k] / (1 - config.beta2 ** (t + 1))
            params[k] = p * (1 - rate * config.weight_decay) - rate * m_hat / (np.sqrt(v_hat) + config.eps)
        history.append(dict(params))
    return history


@pytest.mark.smoke
@pytest.mark.parametrize("size", [0.01, 10.0], ids=["below the clip norm", "clipped"])
def test_updates_equal_an_independent_numpy_adamw_with_zero_first_rate_and_decay_on_everything(size):
    rng = np.random.default_rng(0)
    shapes = {"matrix": (4, 3), "gain": (5,)}
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    gradients = [
        {k: (size * rng.normal(size=s)).astype(np.float32) for k, s in shapes.items()} for _ in range(4)
    ]
    expected = reference(CONFIG, params, gradients)

    optimizer = make_optimizer(CONFIG)
    now = {k: jnp.asarray(p) for k, p in params.items()}
    state = optimizer.init(now)
    for t, grads in enumerate(gradients):
        updates, state = optimizer.update(grads, state, now)
        now = jax.tree.map(jnp.add, now, updates)
        for k in shapes:
            np.testing.assert_allclose(now[k], expected[t][k], rtol=3e-6, atol=1e-7)
        if t == 0:  # rate zero: not one bit moves
            assert all(np.array_equal(now[k], params[k]) for k in shapes)
    assert all(not np.array_equal(now[k], params[k]) for k in shapes)


def test_decay_alone_shrinks_norm_gains_as_well_as_matrices():
    optimizer = make_optimizer(CONFIG)
    params = {"matrix": jnp.ones((2, 2)), "gain": jnp.ones(3)}
    state = optimizer.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for _ in range(2):
        updates, state = optimizer.update(zeros, state, params)
    rate = CONFIG.lr / 2
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, -rate * CONFIG.weight_decay, rtol=1e-6)


def test_learning_rate_is_the_papers_at_its_landmarks():
    paper = OptimConfig()
    steps = np.array([0, 1, 1000, 1999, 2000, 51_000, 100_000, 100_001])
    rates = learning_rate(paper, steps)
    expected = [0, 8e-8, 8e-5, 1.6e-4 * 1999 / 2000, 1.6e-4, (1.6e-4 + 1.6e-5) / 2, 1.6e-5, 1.6e-5]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert rates[0] == 0


def test_training_without_warm_up_starts_at_the_peak_rate():
    assert float(learning_rate(OptimConfig(warmup_steps=0), 0)) == pytest.approx(1.6e-4)


def test_a_warm_up_that_would_not_end_before_the_decay_takes_a_tenth_of_it():
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=70, decay_steps=59)
    config.validate()
    np.testing.assert_allclose(learning_rate(config, np.array([0, 1, 5, 59])), [0, 0.2, 1, 0.1], rtol=1e-6)
