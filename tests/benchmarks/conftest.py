"""Small programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention_layer, decode_step


@pytest.fixture
def few_layers(monkeypatch):
    """Programs of two layers, each run once; random weights need no compiling."""

    def draw(key, x, mean):
        values = mean + 0.02 * np.random.default_rng(len(x.shape)).standard_normal(x.shape)
        return jax.sharding.reshard(jnp.asarray(values.astype(x.dtype)), x.sharding.spec)

    monkeypatch.setattr(attention_layer, "MOST_LAYERS", 2)
    monkeypatch.setattr(attention_layer, "PROGRAM_US", 0.0)
    monkeypatch.setattr(decode_step, "_random", draw)
