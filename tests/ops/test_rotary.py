"""Rotary angles against 60 decimal digits."""

import decimal
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlra_jax.ops.rotary import frequencies, rotary_tables, rotate

decimal.getcontext().prec = 60
TURN = 2 * decimal.Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
WIDTH = 64


def exact(base):
    """Radians per position of each pair."""
    return [decimal.Decimal(base) ** (decimal.Decimal(-2 * i) / WIDTH) for i in range(WIDTH // 2)]


SCALES = {base: exact(base) for base in (10000.0, 5e5)}


@pytest.fixture(scope="module")
def tables():
    """Compiled once for each base."""
    of = lambda base: functools.partial(rotary_tables, frequencies=frequencies(WIDTH, base))
    return {base: jax.jit(of(base)) for base in SCALES}


@settings(max_examples=50, deadline=None)
@given(base=st.sampled_from(list(SCALES)), position=st.integers(0, 2**31 - 1))
@example(10000.0, 131_071)
@example(10000.0, 2_097_151)
@example(5e5, 2**24 + 1)
@example(10000.0, 2**31 - 1)
def test_angles_are_right_at_every_position(tables, base, position):
    cos, sin = tables[base](jnp.array([position], jnp.int32))
    angles = [float(position * scale % TURN) for scale in SCALES[base]]
    error = np.arctan2(sin[0], cos[0]).astype(np.float64) - angles
    off = np.abs((error + math.pi) % (2 * math.pi) - math.pi)
    assert off.max() < 1e-6
    np.testing.assert_allclose(cos[0], np.cos(angles), atol=1e-6)


def test_positions_far_away_keep_their_distances():
    """Neighbours differ, by as much as the first positions do."""
    cos, sin = rotary_tables(2**24 + jnp.arange(3), frequencies(2, 1e4))
    step = np.diff(np.unwrap(np.arctan2(np.asarray(sin)[:, 0], np.asarray(cos)[:, 0])))
    np.testing.assert_allclose(step, 1.0, atol=1e-6)


def test_layers_that_are_computed_anew_take_no_tables_and_no_frequencies():
    """Else each would compute its own, where the compiler now sees that all are the same."""
    layer = jax.checkpoint(lambda x: rotate(x, jnp.arange(8), frequencies(6, 1e4)))
    [equation] = jax.make_jaxpr(layer)(jnp.ones((1, 8, 6))).eqns
    assert len(equation.invars) == 1
