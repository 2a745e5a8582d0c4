"""Small programs."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from benchmarks import attention_layer, decode_step


@pytest.fixture
def few_layers(monkeypatch):
    """Programs of two layers, each run once; random weights need no compiling."""

    def draw(key, x, mean):
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        values = (mean + 0.02 * rng.standard_normal(x.shape)).astype(x.dtype)
        mesh = jax.sharding.get_mesh()
        return jax.device_put(values, NamedSharding(mesh, x.sharding.spec))

    monkeypatch.setattr(attention_layer, "MOST_LAYERS", 2)
    monkeypatch.setattr(attention_layer, "PROGRAM_US", 0.0)
    monkeypatch.setattr(decode_step, "_random", draw)
