"""The paper's AdamW: warm-up from exactly zero, cosine decay, clipping, weight decay on every parameter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from mlra_jax.config import OptimConfig


def learning_rate(config: OptimConfig, step: jax.typing.ArrayLike) -> jax.Array:
    """Learning rate of update `step` (counted from 0): `lr * step / warmup`, then a cosine down to `min_lr`.

    The first update has a rate of exactly 0 (its gradient still enters the moments), as in `get_lr` of the paper's
    `train.py`.

    Args:
      config: the recipe.
      step: number of updates made before this one, a scalar or an array; the result is float32.
    """
    step = jnp.asarray(step, jnp.float32)
    warmup = config.warmup
    warm = config.lr * step / max(warmup, 1)
    progress = (step - warmup) / (config.decay_steps - warmup)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
    decayed = config.min_lr + (config.lr - config.min_lr) * cosine
    return jnp.where(step < warmup, warm, decayed)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients by `min(1, max_norm / (norm + 1e-6))`, with the global norm of all gradients.

    This is PyTorch's `clip_grad_norm_`, which the paper uses; optax's version lacks the 1e-6.
    """

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Clipping, then AdamW with decoupled weight decay on every parameter, norm gains and embedding included."""
    return optax.chain(
        clip_by_global_norm(config.clip_norm),
        optax.adamw(
            lambda count: learning_rate(config, count),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
    )
