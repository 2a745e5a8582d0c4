"""Rotary position embedding, and its scalings for sequences longer than those of training."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Frequencies(NamedTuple):
    """How a rotary vector of width R turns from one position to the next."""

    radians: tuple[float, ...]
    """Of each of R/2 pairs, as Python floats, which are float64, unlike a `jax.Array`."""
    magnitude: float = 1.0
    """By which rotated vectors are longer than the given ones (YaRN)."""


def frequencies(width: int, base: float) -> Frequencies:
    """base**(-2i/R) for pair i of R/2 (Su et al., RoFormer, 2021).

    Args:
      width: R, even.
      base: theta, of which the frequencies are powers.
    """
    return Frequencies(tuple(base ** (-2 * i / width) for i in range(width // 2)))


def interpolated(width: int, base: float, factor: float) -> Frequencies:
    """Position interpolation: every frequency divided by `factor` (Chen et al., 2023, equation 4)."""
    return Frequencies(tuple(f / factor for f in frequencies(width, base).radians))


def ntk_base(width: int, base: float, factor: float) -> float:
    """The base with which only the lowest frequency is divided by `factor`, and the highest stays ("NTK-aware" scaling;
    Peng et al., YaRN, 2023, definition 1)."""
    return base * factor ** (width / (width - 2)) if width > 2 else base


def yarn(
    width: int,
    base: float,
    factor: float,
    *,
    original_max_position: int,
    beta_fast: float,
    beta_slow: float,
    magnitude: float = 1.0,
) -> Frequencies:
    """ "NTK-by-parts" interpolation (Peng et al., YaRN, 2023, section 3.2), with the ramp of DeepSeek-V2 and V3.

    Pairs that turn `beta_fast` times or more within the original length keep their frequency, pairs that turn
    `beta_slow` times or less have it divided by `factor`; between the two, rounded to whole pairs, the share of the
    divided one grows linearly with the number of the pair (`yarn_find_correction_range` and `yarn_linear_ramp_mask` in
    DeepSeek's modeling_deepseek.py).

    Args:
      width: R, even.
      base: theta.
      factor: by how much the sequences are longer.
      original_max_position: their length before, in tokens.
      beta_fast: turns.
      beta_slow: turns.
      magnitude: by which rotated vectors are longer.
    """

    def pair(turns: float) -> float:
        """The pair, a real number, that turns so often within the original length."""
        return width * math.log(original_max_position / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair(beta_fast)), 0)
    high = max(min(math.ceil(pair(beta_slow)), width - 1), low + 0.001)
    divided = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(width // 2)]
    scaled = (
        f * (1 + x * (1 / factor - 1)) for f, x in zip(frequencies(width, base).radians, divided, strict=True)
    )
    return Frequencies(tuple(scaled), magnitude)


def yarn_magnitude(factor: float, mscale: float) -> float:
    """0.1 * mscale * ln(factor) + 1: the root of YaRN's 1/t for mscale 1 (equation 22), as DeepSeek generalises it."""
    return 0.1 * mscale * math.log(factor) + 1


# A jitted function holds the frequencies as its constants. Otherwise they would be inputs of layers that are
# rematerialised, each of which would compute its own tables; this way the compiler sees that they are all the same.
@functools.partial(jax.jit, static_argnames="frequencies")
def rotary_tables(positions: jax.Array, frequencies: Frequencies) -> tuple[jax.Array, jax.Array]:
    """Float32 cosines and sines of positions times frequencies, times the magnitude: [*positions.shape, R/2].

    A float32 product would be off by as much as the position's last bits: 2e-3 rad at 128K tokens, 0.1 at 2M. Here
    integers count units of 2**-32 revolution, and whole revolutions overflow: angles are right to 4e-7 rad everywhere.

    Args:
      positions: integers from 0 to 2**31 - 1.
      frequencies: radians per position, and the magnitude.
    """
    # Revolutions per position as 64-bit fractions, in two halves. A Python float times a power of two is exact.
    revolutions = [int(f / (2 * math.pi) * 2.0**64) for f in frequencies.radians]
    high, low = (jnp.array([x >> bits & 0xFFFFFFFF for x in revolutions], jnp.uint32) for bits in (32, 0))
    p = positions.astype(jnp.uint32)[..., None]
    upper = lambda x: x >> 16
    lower = lambda x: x & 0xFFFF
    # The upper half of the 64-bit product p * low, but for three units at most.
    carried = upper(p) * upper(low) + upper(upper(p) * lower(low)) + upper(lower(p) * upper(low))
    phase = jax.lax.bitcast_convert_type(p * high + carried, jnp.int32)
    angle = phase.astype(jnp.float32) * (2 * math.pi / 2**32)
    return jnp.cos(angle) * frequencies.magnitude, jnp.sin(angle) * frequencies.magnitude


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
      frequencies: radians per position, and the magnitude.

    Returns:
      The rotated array in the type of `x`; the tables are computed in float32 and rounded to it.
    """
    positions = positions[None] if positions.ndim == 1 else positions
    tables = rotary_tables(positions, frequencies)  # [(B or 1,) T, R/2]
    return apply_rope(x, *(jnp.expand_dims(table, range(2, x.ndim - 1)) for table in tables))
