"""The specification of the residual sum with its norm, and of the norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm of `x` [..., *gain.shape] over its last axis, times the gain; float32.

    Statistics are float32; the normalised input is rounded to its own type before the gain.
    """
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype).astype(jnp.float32) * gain.astype(jnp.float32)


def add_rms_norm(x: jax.Array, y: jax.Array, gain: jax.Array, *, eps: float) -> tuple[jax.Array, jax.Array]:
    """See `mlra_jax.ops.norm.add_rms_norm`."""
    x = x + y
    return x, rms_norm(x, gain, eps).astype(y.dtype)
