import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from mlra_jax.training.losses import IGNORED, cross_entropy


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


@pytest.mark.smoke
def test_loss_and_gradient_do_not_depend_on_how_the_vocabulary_is_split(mesh_of):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 6, 16)).astype(np.float32)
    targets = rng.integers(IGNORED, 16, (4, 6)).astype(np.int32)
    loss_and_gradient = jax.value_and_grad(lambda x, t: cross_entropy(x, t)[0])
    expected, expected_gradient = loss_and_gradient(logits, targets)
    with jax.set_mesh(mesh_of(1, 2, 2, 2)):
        x = jax.device_put(logits, PartitionSpec("fsdp", "context", "tensor"))
        t = jax.device_put(targets, PartitionSpec("fsdp", "context"))
        total, gradient = jax.jit(loss_and_gradient)(x, t)
        assert gradient.sharding.is_equivalent_to(x.sharding, 3)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-7)
