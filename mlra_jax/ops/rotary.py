"""Rotary position embedding."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

Frequencies = tuple[float, ...]
"""Radians per position of each of R/2 pairs, as Python floats, which are float64, unlike a `jax.Array`."""


def frequencies(width: int, base: float) -> Frequencies:
    """base**(-2i/R) for pair i of R/2 (Su et al., RoFormer, 2021).

    Args:
      width: R, even.
      base: theta, of which the frequencies are powers.
    """
    return tuple(base ** (-2 * i / width) for i in range(width // 2))


# A jitted function holds the frequencies as its constants. Otherwise they would be inputs of layers that are
# rematerialised, each of which would compute its own tables; this way the compiler sees that they are all the same.
@functools.partial(jax.jit, static_argnames="frequencies")
def rotary_tables(positions: jax.Array, frequencies: Frequencies) -> tuple[jax.Array, jax.Array]:
    """Float32 cosines and sines of positions times frequencies, [*positions.shape, R/2].

    A float32 product would be off by as much as the position's last bits: 2e-3 rad at 128K tokens, 0.1 at 2M. Here
    integers count units of 2**-32 revolution, and whole revolutions overflow: angles are right to 4e-7 rad everywhere.

    Args:
      positions: integers from 0 to 2**31 - 1.
      frequencies: radians per position.
    """
    # Revolutions per position as 64-bit fractions, in two halves. A Python float times a power of two is exact.
    revolutions = [int(f / (2 * math.pi) * 2.0**64) for f in frequencies]
    high, low = (jnp.array([x >> bits & 0xFFFFFFFF for x in revolutions], jnp.uint32) for bits in (32, 0))
    p = positions.astype(jnp.uint32)[..., None]
    upper = lambda x: x >> 16
    lower = lambda x: x & 0xFFFF
    # The upper half of the 64-bit product p * low, but for three units at most.
    carried = upper(p) * upper(low) + upper(upper(p) * lower(low)) + upper(lower(p) * upper(low))
    phase = jax.lax.bitcast_convert_type(p * high + carried, jnp.int32)
    angle = phase.astype(jnp.float32) * (2 * math.pi / 2**32)
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`x` [..., R] rotated by angles: element i, of R/2, pairs with element i + R/2.

    Args:
      x: queries or keys.
      cos: cosines of the angles [..., R/2], broadcast to `x` and rounded to its type.
      sin: sines, likewise.
    """
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rotate(x: jax.Array, positions: jax.Array, frequencies: Frequencies) -> jax.Array:
    """Rotary position embedding, half-split: element i pairs with element i + R/2.

    Args:
      x: [B, T, ..., R].
      positions: [B, T] or [T]; see `rotary_tables`.
      frequencies: radians per position.

    Returns:
      The rotated array in the type of `x`; the tables are computed in float32 and rounded to it.
    """
    positions = positions[None] if positions.ndim == 1 else positions
    tables = rotary_tables(positions, frequencies)  # [(B or 1,) T, R/2]
    return apply_rope(x, *(jnp.expand_dims(table, range(2, x.ndim - 1)) for table in tables))
