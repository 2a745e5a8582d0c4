"""Rotary angles against 60 decimal digits, and scaled frequencies against the formulas of their papers."""

import decimal
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlra_jax.config import ModelConfig, RotaryScalingConfig
from mlra_jax.model.layers import rotary_frequencies, softmax_scale
from mlra_jax.ops.rotary import frequencies, rotary_tables, rotate
from tests.definitions import deepseek_yarn

decimal.getcontext().prec = 60
TURN = 2 * decimal.Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
WIDTH = 64


def exact(base):
    """Radians per position of each pair."""
    return [decimal.Decimal(base) ** (decimal.Decimal(-2 * i) / WIDTH) for i in range(WIDTH // 2)]


def scaled(**scaling):
    return ModelConfig(rotary_scaling=RotaryScalingConfig(**scaling))


SCALES = {
    frequencies(WIDTH, 10000.0): exact(10000),
    frequencies(WIDTH, 5e5): exact(500_000),
    rotary_frequencies(scaled(method="linear", factor=3.0), WIDTH): [f / 3 for f in exact(10000)],
}


@pytest.fixture(scope="module")
def tables():
    """Compiled once for each."""
    return {given: jax.jit(functools.partial(rotary_tables, frequencies=given)) for given in SCALES}


@settings(max_examples=50, deadline=None)
@given(which=st.integers(0, 2), position=st.integers(0, 2**31 - 1))
@example(0, 131_071)
@example(0, 2_097_151)
@example(1, 2**24 + 1)
@example(0, 2**31 - 1)
@example(2, 2**31 - 1)
def test_angles_are_right_at_every_position(tables, which, position):
    given = list(SCALES)[which]
    cos, sin = tables[given](jnp.array([position], jnp.int32))
    angles = [float(position * scale % TURN) for scale in SCALES[given]]
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


def test_scaled_frequencies_are_those_of_the_papers():
    i, base = np.arange(WIDTH // 2), 10000.0
    plain = base ** (-2 * i / WIDTH)
    of = lambda **scaling: rotary_frequencies(scaled(**scaling), WIDTH)
    np.testing.assert_allclose(of(method="linear", factor=8.0).radians, plain / 8)
    ntk = of(method="ntk", factor=8.0).radians
    np.testing.assert_allclose(ntk, (base * 8 ** (WIDTH / (WIDTH - 2))) ** (-2 * i / WIDTH))
    np.testing.assert_allclose([ntk[0], ntk[-1]], [1, plain[-1] / 8])  # what the base was chosen for

    v3 = of(method="yarn", factor=40.0, original_max_position=4096)
    np.testing.assert_allclose(v3.radians, deepseek_yarn(WIDTH, base, 40, 4096, 32, 1))
    turns = 4096 * plain / (2 * np.pi)
    np.testing.assert_array_equal(np.array(v3.radians)[turns >= 32 * 1.4], plain[turns >= 32 * 1.4])
    np.testing.assert_allclose(np.array(v3.radians)[turns <= 1 / 1.4], plain[turns <= 1 / 1.4] / 40)
    assert ((plain / 40 < v3.radians) & (v3.radians < plain)).sum() > 5
    # Between neighbours the ramp is a step; lengths of which no frequency makes a turn leave at most the first alone.
    step = of(method="yarn", factor=4.0, original_max_position=4096, beta_slow=31.9).radians / plain
    assert set(step.round(9)) == {1, 0.25}
    np.testing.assert_allclose(
        of(method="yarn", factor=4.0, original_max_position=2).radians[1:], plain[1:] / 4
    )


def test_yarn_makes_attention_sharper():
    """DeepSeek-V3's softmax scale, and its cosines where the two scales differ."""
    temperature = lambda **scaling: (
        rotary_frequencies(scaled(method="yarn", **scaling), 64).magnitude,
        softmax_scale(scaled(method="yarn", **scaling), 192) * math.sqrt(192),
    )
    m = 0.1 * math.log(40) + 1
    np.testing.assert_allclose(temperature(factor=40.0), (1, m**2))
    np.testing.assert_allclose(temperature(factor=40.0, mscale_all_dim=0.0), (m, 1))
    half = 0.05 * math.log(40) + 1
    np.testing.assert_allclose(temperature(factor=40.0, mscale_all_dim=0.5), (m / half, half**2))
    cos, sin = rotary_tables(jnp.arange(3), frequencies(4, 1e4)._replace(magnitude=1.5))
    np.testing.assert_allclose(cos**2 + sin**2, 2.25, rtol=1e-6)


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn"])
def test_a_factor_of_one_changes_no_bit(method):
    config = scaled(method=method)
    assert rotary_frequencies(config, WIDTH) == frequencies(WIDTH, 10000.0)
    assert softmax_scale(config, 192) == 1 / math.sqrt(192)
