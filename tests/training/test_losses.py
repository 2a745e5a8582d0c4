import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax.sharding import TRAIN_RULES
from mlra_jax.training.losses import IGNORED, chunked_cross_entropy, token_scores
from tests.definitions import cross_entropy


def reference(logits: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
    total, count = 0.0, 0
    for row, target in zip(
        logits.reshape(-1, logits.shape[-1]).astype(np.float64), targets.ravel(), strict=True
    ):
        if target != IGNORED:
            total += np.log(np.sum(np.exp(row - row.max()))) + row.max() - row[target]
            count += 1
    return total, count


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.0, 1.0, 100.0]))
def test_sum_and_count_equal_the_definition_for_any_targets_and_ignored_positions(seed, scale):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=(2, 3, 7))).astype(np.float32)
    targets = rng.integers(IGNORED, 7, (2, 3)).astype(np.int32)
    total, count = cross_entropy(jnp.asarray(logits), jnp.asarray(targets))
    expected, expected_count = reference(logits, targets)
    assert count == expected_count
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)


def problem(batch: int, length: int, width: int, vocab: int, seed: int = 0):
    """Hidden states, token matrix, and targets of which some do not count."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, length, width)).astype(np.float32)
    table = rng.normal(size=(vocab, width)).astype(np.float32)
    return x, table, rng.integers(IGNORED, vocab, (batch, length)).astype(np.int32)


def whole(x, table, targets):
    """Loss, count and gradients from the definition, all logits at once."""
    definition = lambda x, table: cross_entropy(jnp.einsum("BTD,VD->BTV", x, table), targets)
    return jax.value_and_grad(definition, (0, 1), has_aux=True)(x, table)


def chunked(x, table, targets, tokens: int, devices: int = 1):
    """The same in chunks of at most `tokens` tokens on a device that holds one part of `devices` of the vocabulary."""
    budget = 4 * tokens * table.shape[0] // devices
    loss = lambda x, t: chunked_cross_entropy(x, t, targets, dtype=jnp.float32, logit_bytes=budget)
    return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, table)


def assert_equal(ours, expected):
    ((total, count), gradients), ((expected_total, expected_count), expected_gradients) = ours, expected
    assert count == expected_count
    np.testing.assert_allclose(total, expected_total, rtol=1e-6)
    for g, e in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(g, e, rtol=0, atol=1e-6 * float(np.abs(e).max()))


@settings(deadline=None, max_examples=20)
@given(tokens=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_chunks_of_any_size_give_the_loss_and_gradients_of_all_logits_at_once(tokens, seed):
    arguments = problem(3, 11, 5, 17, seed)
    assert_equal(chunked(*arguments, tokens), whole(*arguments))


@pytest.mark.smoke
@pytest.mark.parametrize("sizes", [(1, 2, 2, 2), (2, 1, 4, 1), (1, 1, 1, 1)], ids=str)
def test_chunks_on_a_mesh_with_a_split_vocabulary_give_the_same(sizes, mesh_of):
    x, table, targets = problem(4, 8, 6, 16)
    expected = whole(x, table, targets)
    with jax.set_mesh(mesh_of(*sizes)):
        rows, width = TRAIN_RULES.spec("batch", "length"), TRAIN_RULES.spec("vocab", "embed")
        placed = (jax.device_put(v, spec) for v, spec in ((x, rows), (table, width), (targets, rows)))
        ours = jax.jit(chunked, static_argnums=(3, 4))(*placed, 3, sizes[2])
        assert ours[1][1].sharding.spec == width
    assert_equal(ours, expected)


def test_no_array_of_all_logits_exists_in_the_forward_or_backward_pass():
    arguments = problem(4, 64, 8, 512)
    gradient = jax.make_jaxpr(lambda x, table, targets: chunked(x, table, targets, 32))(*arguments)
    shapes = re.findall(r"f32\[([\d,]+)\]", str(gradient))
    sizes = {np.prod([int(n) for n in shape.split(",")]) for shape in shapes}
    assert 32 * 512 in sizes, "a chunk's logits"
    assert max(sizes) <= 32 * 512


@pytest.mark.parametrize("sizes", [(1, 2, 2, 2), (1, 1, 1, 1)], ids=str)
def test_scores_of_single_targets_are_the_definitions_in_chunks_on_a_mesh(sizes, mesh_of):
    x, table, targets = problem(4, 8, 6, 16)
    logits = jnp.einsum("BTD,VD->BTV", x, table)
    targets[0] = np.argmax(logits[0], axis=-1)
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    score = functools.partial(token_scores, dtype=jnp.float32, logit_bytes=4 * 3 * 16 // sizes[2])
    with jax.set_mesh(mesh_of(*sizes)):
        rows, width = TRAIN_RULES.spec("batch", "length"), TRAIN_RULES.spec("vocab", "embed")
        placed = (jax.device_put(v, spec) for v, spec in ((x, rows), (table, width), (targets, rows)))
        ours, best = jax.jit(score)(*placed)
        assert ours.sharding.spec == rows
    np.testing.assert_allclose(ours, np.where(targets == IGNORED, 0, expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(best, (targets == IGNORED) | (targets == np.argmax(logits, axis=-1)))
    assert 8 <= np.sum(best) < best.size
