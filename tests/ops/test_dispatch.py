"""How an implementation is picked, and how it declines."""

import logging

import jax.numpy as jnp
import pytest

from mlra_jax.ops.attention import causal_attention
from mlra_jax.ops.dispatch import dispatch


def declines(x, *, limit):
    raise NotImplementedError(f"takes no more than {limit}")


IMPLEMENTATIONS = {"fast": declines, "plain": lambda x, *, limit: ("plain", x, limit)}


def test_none_takes_the_first_that_does_not_decline_and_says_once_why_it_passed_one_over(caplog):
    with caplog.at_level(logging.INFO, logger="mlra_jax"):
        for _ in range(2):
            assert dispatch("double", IMPLEMENTATIONS, None, 3, limit=7) == ("plain", 3, 7)
    assert [r.getMessage() for r in caplog.records] == ["double: fast declines: takes no more than 7"]


def test_a_name_takes_that_one_or_fails():
    assert dispatch("op", IMPLEMENTATIONS, "plain", 3, limit=1)[0] == "plain"
    with pytest.raises(NotImplementedError, match="takes no more than 1"):
        dispatch("op", IMPLEMENTATIONS, "fast", 3, limit=1)


def test_a_sequence_is_tried_in_order_and_all_reasons_are_given():
    assert dispatch("op", IMPLEMENTATIONS, ("fast", "plain"), 3, limit=1)[0] == "plain"
    with pytest.raises(ExceptionGroup) as error:
        dispatch("op", {"a": declines, "b": declines}, ("a", "b"), 3, limit=1)
    assert [str(e) for e in error.value.exceptions] == ["takes no more than 1"] * 2


def test_an_unknown_name_is_refused_with_the_known_ones_before_anything_runs():
    with pytest.raises(ValueError, match="op has no implementation 'quick'; choose from fast, plain"):
        dispatch("op", IMPLEMENTATIONS, ("plain", "quick"), 3, limit=1)
    x = jnp.ones((1, 1, 1, 2))
    with pytest.raises(ValueError, match="choose from xla, reference"):
        causal_attention(x, x, x, scale=1.0, implementation="flash")


def test_other_errors_of_an_implementation_are_not_taken_for_declining():
    with pytest.raises(ZeroDivisionError):
        dispatch("op", {"broken": lambda: 1 / 0, "plain": lambda: 1}, None)
