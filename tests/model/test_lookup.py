"""The gradient of a look-up without a scatter: the sums that a scatter gives, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlra_jax.config import ModelConfig
from mlra_jax.execution.collectives import executed_collectives
from mlra_jax.model import layers
from mlra_jax.model.lookup import BLOCK, sum_rows
from mlra_jax.sharding import TRAIN_RULES

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("ids", "n"),
    [
        (np.full(3 * BLOCK, 5), 7),  # over three blocks
        (RNG.permutation(2 * BLOCK), 2 * BLOCK),  # each once
        (np.minimum(RNG.zipf(1.3, 1000), 700) - 1, 700),  # as words are, and no multiple of BLOCK
        (RNG.integers(0, 2, 4 * BLOCK + 1), 3),  # fewer ids than blocks
        (RNG.integers(0, 50, 5), 50),  # less than a block
        (RNG.integers(-9, 60, 300), 50),  # some outside
    ],
    ids=["equal", "distinct", "skewed", "two", "few", "outside"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_of_equal_ids_are_summed_in_float32(ids, n, dtype):
    rows = jnp.asarray(RNG.standard_normal((ids.size, 4)), dtype)
    expected, held = np.zeros((n, 4)), (ids >= 0) & (ids < n)
    np.add.at(expected, ids[held], np.asarray(rows, np.float64)[held])
    sums = jax.jit(sum_rows, static_argnums=2)(jnp.asarray(ids, jnp.int32), rows, n)
    assert sums.dtype == jnp.float32
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(), (2, 2, 2, 1), (1, 2, 2, 2)], ids=str)
def test_the_embedding_s_gradient_on_gpus_is_that_of_a_scatter_with_the_same_exchanges(
    sizes, on_mesh, monkeypatch
):
    config = ModelConfig(vocab_size=64, d_model=8, compute_dtype="float32")
    tokens = RNG.integers(0, 64, (8, 16)).astype(np.int32)
    d_x = RNG.standard_normal((8, 16, 8)).astype(np.float32)
    gradients, exchanges = {}, {}
    with on_mesh(*sizes):
        graph, state = nnx.split(layers.Embedding(config, rngs=nnx.Rngs(0), rules=TRAIN_RULES))
        put = TRAIN_RULES.constrain
        tokens, d_x = put(tokens, "batch", "length"), put(d_x, "batch", "length", None)
        for platform in ("cpu", "gpu"):
            monkeypatch.setattr(layers, "current_device", lambda platform=platform: (platform, ""))
            loss = lambda state, tokens, d_x: jnp.sum(nnx.merge(graph, state).encode(tokens) * d_x)
            lowered = jax.jit(jax.grad(loss)).lower(state, tokens, d_x)
            assert ("stablehlo.scatter" in lowered.as_text()) == (platform == "cpu")
            step = lowered.compile()
            exchanges[platform] = executed_collectives(step.as_text())
            [gradients[platform]] = map(np.asarray, jax.tree.leaves(step(state, tokens, d_x)))
    np.testing.assert_allclose(gradients["gpu"], gradients["cpu"], rtol=1e-5, atol=1e-6)
    assert exchanges["gpu"] == exchanges["cpu"]
