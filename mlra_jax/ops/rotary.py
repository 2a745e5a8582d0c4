"""Rotary position embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`x` [..., R] turned by angles: element i, of R/2, pairs with element i + R/2.

    Args:
      x: what is turned.
      cos: of the angles, [..., R/2], of a shape that broadcasts; rounded to the type of `x`.
      sin: the same.
    """
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
