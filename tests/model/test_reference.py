"""`mlra_jax.reference`, the equations in one file: against NumPy, and every other family's module against it.

Latent attention of any sizes is held to it in test_latent.py.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import mlra_jax as mlra
from mlra_jax import reference
from mlra_jax.config import ModelConfig, RotaryScalingConfig
from tests.definitions import YARN, deepseek_yarn


def random_layer(config, rng):
    """A layer whose parameters are all random, and these as a dictionary."""
    graph, state = nnx.split(nnx.eval_shape(lambda: config.attention.module()(config, rngs=nnx.Rngs(0))))
    value = lambda x: jnp.asarray(rng.standard_normal(x.shape) / math.sqrt(x.shape[0]), jnp.float32)
    params = jax.tree.map(value, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state), params


def rotated(x, position, radians, magnitude):
    angle, (a, b) = position * radians, np.split(x * magnitude, 2)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])


def latent_by_loops(p, a, x, radians, magnitude, sharper):
    """MLRA of one sequence x [T, D] in float64, one head, branch and query at a time: weights and output."""
    (length, d), n_heads, h = x.shape, p["w_qb"].shape[1], a.d_nope
    norm = lambda x, gain: x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * gain
    q = norm(x @ p["w_qa"], p["q_norm"]["gain"]) * math.sqrt(d / a.q_lora_rank)
    latent = norm(np.einsum("TD,DLC->TLC", x, p["w_kva"]), p["kv_norm"]["gain"]) * math.sqrt(d / a.d_latent)
    turned = lambda x, t: rotated(x, t, radians, magnitude)
    k_rope = np.array([turned(k, t) for t, k in enumerate(x @ p["w_kr"])])
    weights, out = np.zeros((a.n_branches, n_heads, length, length)), np.zeros((length, d))
    for n in range(n_heads):
        group = n * a.n_groups // n_heads
        for j, read in enumerate(range(group, a.n_latent_heads, a.n_groups)):
            k, v = latent[:, read] @ p["w_uk"][j, n], latent[:, read] @ p["w_uv"][j, n]
            for t in range(length):
                query = q[t] @ p["w_qb"][:, n]
                scores = k[: t + 1] @ query[:h] + k_rope[: t + 1] @ turned(query[h:], t)
                e = np.exp(scores * sharper / math.sqrt(h + a.d_rope))
                weights[j, n, t, : t + 1] = e / e.sum()
                gate = 1 / (1 + np.exp(-x[t] @ p["output"]["w_gate"][:, n]))
                y = weights[j, n, t] @ v / math.sqrt(a.n_branches)
                out[t] += (gate * y) @ p["output"]["w_o"][n]
    return weights, out


SIZES = {"n_layers": 2, "d_model": 10, "n_heads": 6, "d_ff": 8, "vocab_size": 16}
MLRA = ModelConfig(
    **SIZES,
    attention=mlra.LatentAttentionConfig(6, 2, q_lora_rank=7, kv_lora_rank=30, d_nope=4, d_rope=6),
    gated_attention=True,
    output_init="normal",
    init_std=0.3,
    compute_dtype="float32",
)


@pytest.mark.parametrize("scaling", [RotaryScalingConfig(), YARN], ids=["none", "yarn"])
def test_the_equations_are_those_of_loops_over_heads_and_branches(scaling):
    rng, config = np.random.default_rng(0), dataclasses.replace(MLRA, rotary_scaling=scaling)
    layer, params = random_layer(config, rng)
    x = rng.standard_normal((2, 5, config.d_model)).astype(np.float32)
    turn = 10000.0 ** (-np.arange(3) / 3), 1.0, 1.0
    if scaling is YARN:
        mscale = lambda by: 0.1 * by * math.log(4.0) + 1
        turn = deepseek_yarn(6, 1e4, 4.0, 8, 1.0, 0.01), mscale(1.5) / mscale(0.5), mscale(0.5) ** 2
    as_numpy = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    expected = [latent_by_loops(as_numpy, config.attention, row.astype(np.float64), *turn) for row in x]
    weights, out = (np.stack(part) for part in zip(*expected, strict=True))
    compiled = jax.jit(reference.attention, static_argnums=1)
    np.testing.assert_allclose(compiled(params, config, x), out, rtol=0, atol=2e-5)
    np.testing.assert_allclose(mlra.attention_weights(layer, x), weights.swapaxes(0, 1), rtol=0, atol=2e-6)


@st.composite
def other_families(draw):
    groups, half = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    attention = draw(
        st.sampled_from(
            [
                mlra.GroupedAttentionConfig(groups, 2 * half),
                mlra.GroupedAttentionConfig(groups, 2 * half, q_lora_rank=draw(st.integers(1, 9))),
                mlra.TiedAttentionConfig(groups, 4 * half),
                mlra.TensorProductAttentionConfig(draw(st.integers(1, 3)), draw(st.integers(1, 3)), 2 * half),
            ]
        )
    )
    gated, heads = draw(st.booleans()), groups * draw(st.integers(1, 3))
    scaling = draw(st.sampled_from([RotaryScalingConfig(), YARN]))
    return dataclasses.replace(
        MLRA, n_heads=heads, attention=attention, gated_attention=gated, rotary_scaling=scaling
    )


@settings(max_examples=8, deadline=None, derandomize=True)
@given(config=other_families(), length=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_modules_of_the_other_families_give_what_the_equations_give(config, length, seed):
    assert config.faults() == []
    rng = np.random.default_rng(seed)
    layer, params = random_layer(config, rng)
    x = jnp.asarray(rng.standard_normal((2, length, config.d_model)), jnp.float32)
    expected = jax.jit(reference.attention, static_argnums=1)(params, config, x)
    out = jax.jit(lambda layer, x: layer(x))(layer, x)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))


def last_layer_of(model, tokens):
    first, second = model.blocks()
    x_BTD = sum(first(model.embedding.encode(tokens)))
    return mlra.attention_weights(second.attention, second.attention_norm(x_BTD))


@pytest.mark.parametrize(("stacked", "sizes"), [(True, (1, 2, 2, 1)), (False, ())])
def test_the_weights_of_a_model_are_those_of_its_layers(stacked, sizes, on_mesh):
    tokens = np.random.default_rng(0).integers(0, 16, (2, 5))
    with on_mesh(*sizes):
        model = jax.jit(lambda: mlra.Transformer(MLRA, rngs=nnx.Rngs(0), stacked=stacked))()
        weights = mlra.attention_weights(model, tokens)
        np.testing.assert_array_equal(mlra.attention_weights(model, tokens, layer=1), weights[1])
        last = jax.jit(last_layer_of)(model, tokens)
    np.testing.assert_allclose(weights[1], last, rtol=0, atol=1e-5)
    assert weights.shape == (2, 2, 2, 6, 5, 5)  # layers, branches, sequences, heads, queries, keys
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    assert not np.triu(weights, 1).any()
    assert np.abs(weights[0] - weights[1]).max() > 0.01
    with pytest.raises(ValueError, match=r"layer=2 .* 0 to 1"):
        mlra.attention_weights(model, tokens, layer=2)


def test_the_file_is_as_long_as_the_pages_say(repository):
    assert len((repository / "mlra_jax/reference.py").read_text().splitlines()) <= 120


def test_what_the_equations_do_not_know_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Own(mlra.LatentAttentionConfig):
        """Whose module may compute something else."""

    config = dataclasses.replace(MLRA, attention=Own(2, 2, kv_lora_rank=8, q_lora_rank=4, d_nope=4, d_rope=4))
    layer, _ = random_layer(config, np.random.default_rng(0))
    with pytest.raises(NotImplementedError, match="does not know Own"):
        mlra.attention_weights(layer, jnp.zeros((1, 2, MLRA.d_model)))
    decode = nnx.eval_shape(lambda: mlra.LatentAttention(MLRA, rngs=nnx.Rngs(0), layout="decode"))
    with pytest.raises(NotImplementedError, match="layout='train'"):
        mlra.attention_weights(decode, jnp.zeros((1, 2, MLRA.d_model)))
