"""Layers by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlra_jax.config import MeshConfig
from mlra_jax.model import layers
from mlra_jax.sharding import decode_rules, make_mesh

X = np.random.default_rng(0).normal(size=(4, 2, 32)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(2, 48, 32)).astype(np.float32)


@pytest.mark.parametrize(
    ("rows", "data", "length", "summed"),
    [(1, 1, 1, True), (4, 4, 1, True), (4, 2, 1, False), (1, 1, 2, False)],
)
@pytest.mark.parametrize("split", ["output", "sum"])
def test_a_single_row_of_a_gpu_is_multiplied_and_summed_and_its_product_is_the_same(
    monkeypatch, rows, data, length, summed, split
):
    monkeypatch.setattr(layers, "current_device", lambda: ("gpu", "NVIDIA H100 80GB HBM3"))
    rules = decode_rules()
    x_axes = ("batch", None, None if split == "output" else "mlp")
    w_axes = (None, "mlp", None) if split == "output" else (None, None, "mlp")
    out = ("batch", None, None, "mlp" if split == "output" else None)

    def product(x, w):
        return layers.row_product(rules, rules.constrain(x, *x_axes), rules.constrain(w, *w_axes), out)

    x = X[:rows, :length]
    with jax.set_mesh(make_mesh(MeshConfig(data=data, tensor=2), jax.devices()[: 2 * data])):
        assert ("dot_general" not in str(jax.make_jaxpr(product)(x, W))) == summed
        y = jax.jit(product)(x, W)
        assert y.sharding.spec == rules.spec(*out)
    np.testing.assert_allclose(np.asarray(y), np.einsum("btk,gfk->btgf", x, W), rtol=1e-5, atol=1e-5)


def test_logits_of_a_single_row_are_float32():
    rules = decode_rules()
    x, w = jnp.ones((1, 1, 32), jnp.bfloat16), jnp.ones((8, 32), jnp.bfloat16)
    assert layers.row_product(rules, x, w, (None,) * 3, jnp.dtype(jnp.float32)).dtype == jnp.float32
