"""The transformer around attention: sizes, layers, initial values, layouts."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.attention.kv_cache import Cache, values_per_token
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.attention.tensor_product import TensorProductAttentionConfig
from mlra_jax.attention.tied import TiedAttentionConfig
from mlra_jax.cli.configs import load_config
from mlra_jax.config import ConfigError
from mlra_jax.convert import model_config_from_official, official_from_model_config
from mlra_jax.model import Transformer, from_params, to_decode
from mlra_jax.model.layers import Embedding, RMSNorm, SwiGLU
from mlra_jax.ops.rotary import frequencies, rotate
from mlra_jax.sharding import AxisRules
from tests import definitions

TINY = dataclasses.replace(
    definitions.TINY,
    attention=LatentAttentionConfig(2, 1, q_lora_rank=8, kv_lora_rank=16, d_nope=4, d_rope=4),
)
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 8), dtype=np.int32)


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def initial_params(config):
    return jax.jit(lambda: params_of(Transformer(config, rngs=nnx.Rngs(0))))()


def sizes_by_part(config):
    """Parameters in all, in the attention and in the MLP of one layer, counted on shapes alone."""
    params = params_of(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
    layers = params["layers"]
    return (
        count(params),
        count(layers["attention"]) // config.n_layers,
        count(layers["mlp"]) // config.n_layers,
    )


def official_runs(repository):
    stored = json.loads((repository / "tests" / "parity" / "official_configs.json").read_text())
    return {
        name: run | {"model": run["model"] | {"vocab_size": stored["vocab_size"]}}
        for name, run in stored["runs"].items()
    }


@pytest.mark.smoke
def test_every_official_run_has_a_configuration_with_its_exact_sizes_counted_without_allocating(repository):
    runs = official_runs(repository)
    assert len(runs) == 30
    for name, run in runs.items():
        config = load_config(name).model
        assert config == model_config_from_official(run["model"], run["model_type"]), name
        expected = run["n_params"], run["attn_params_per_layer"], run["mlp_params_per_layer"]
        assert sizes_by_part(config) == expected, name
        assert values_per_token(config) == run["kv_cache_values_per_token_per_layer"], name
        assert official_from_model_config(config, block_size=2048).items() >= run["model"].items(), name


def test_illegal_configuration_is_refused_with_every_fault():
    attention = LatentAttentionConfig(4, 3, kv_lora_rank=10, d_rope=3)
    with pytest.raises(ConfigError) as error:
        Transformer(dataclasses.replace(TINY, attention=attention, norm_eps=0.0), rngs=nnx.Rngs(0))
    assert len(error.value.faults) == 4


ATTENTIONS = pytest.mark.parametrize(
    "attention",
    [
        TINY.attention,
        GroupedAttentionConfig(n_kv_heads=2, d_head=8),
        GroupedAttentionConfig(n_kv_heads=1, d_head=8, q_lora_rank=6),
        TiedAttentionConfig(n_tied_heads=2, d_head=8),
        TensorProductAttentionConfig(rank=3, q_rank=2, d_head=8),
    ],
    ids=["latent", "grouped", "mfa", "gta", "tpa"],
)


@ATTENTIONS
def test_an_attention_by_itself_refuses_misspelt_choices(attention):
    config = dataclasses.replace(TINY, attention=attention)
    cls = attention.module()
    with pytest.raises(ConfigError, match=r"model\.output_init='zero' must be one of zeros, normal"):
        cls(dataclasses.replace(config, output_init="zero"), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="layout='decoding' must be one of train, decode"):
        cls(config, rngs=nnx.Rngs(0), layout="decoding")


@ATTENTIONS
def test_initial_model_predicts_from_the_current_token_alone(attention):
    config = dataclasses.replace(TINY, attention=attention)
    params = initial_params(config)
    table = np.asarray(params["embedding"]["table"])
    x = table[TOKENS]
    x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    logits = jax.jit(lambda params: from_params(config, params)(TOKENS))(params)
    np.testing.assert_allclose(logits, x @ table.T, atol=1e-5)


def test_initial_values_are_normal_but_for_gains_and_output_projections():
    config = dataclasses.replace(TINY, d_model=64, vocab_size=256, gated_attention=True, init_std=0.1)
    zero_outputs, normal_outputs = (
        nnx.traversals.flatten_mapping(initial_params(c), sep=".")
        for c in (config, dataclasses.replace(config, output_init="normal"))
    )
    outputs = {"layers.attention.output.w_o", "layers.mlp.w_down"}
    for name, value in zero_outputs.items():
        if name.endswith("gain"):
            assert np.all(value == 1), name
        elif name in outputs:
            assert np.all(value == 0), name
            assert abs(np.std(normal_outputs[name]) - 0.1) < 0.01, name
        else:
            assert abs(np.std(value) - 0.1) < 0.01, name
            assert not np.allclose(value[0], value[1]), f"{name}: layers (or rows) are copies"


def test_initial_factors_of_tpa_are_uniform_within_the_official_bounds():
    attention = TensorProductAttentionConfig(rank=3, q_rank=5, d_head=16)
    params = initial_params(dataclasses.replace(TINY, d_model=64, n_heads=8, attention=attention))
    for x, r in (("q", 5), ("k", 3), ("v", 3)):
        for name, fans in ((f"w_a{x}", 8 * r + 64 * r), (f"w_b{x}", r * 16 + 64 * 16)):
            value, bound = params["layers"]["attention"][name], math.sqrt(6 / fans)
            assert 0.95 * bound < np.abs(value).max() < 1.0001 * bound, name
            assert abs(np.std(value) - bound / math.sqrt(3)) < 0.05 * bound, name


def test_initial_values_on_a_mesh_are_those_without_one(on_mesh):
    make = lambda: params_of(Transformer(TINY, rngs=nnx.Rngs(0)))
    whole = make()
    with on_mesh(1, 2, 2, 2):
        split = jax.jit(make)()
    assert split["layers"]["mlp"]["w_up"].addressable_shards[0].data.shape == (2, 8, 12)
    jax.tree.map(np.testing.assert_array_equal, split, whole)


def test_last_logits_of_decoding_are_those_after_each_rows_last_new_token():
    rules = AxisRules()
    params = initial_params(dataclasses.replace(TINY, output_init="normal", init_std=0.3))
    model = to_decode(TINY, params, rules)
    n_new = np.array([3, 8], np.int32)
    run = lambda which: jax.jit(lambda model, cache: model.decode(TOKENS, cache, n_new, logits=which)[0])(
        model, Cache.create(TINY, rules, 2, 8)
    )
    every, last = run("all"), run("last")
    assert last.shape == (2, 1, 32)
    np.testing.assert_allclose(last[:, 0], np.asarray(every)[[0, 1], n_new - 1], atol=1e-6)


@ATTENTIONS
def test_a_feature_major_cache_gives_the_same_logits(attention):
    config = dataclasses.replace(TINY, output_init="normal", init_std=0.3, attention=attention)
    model = to_decode(config, initial_params(config), AxisRules())
    n_new, one = np.array([3, 7], np.int32), np.ones(2, np.int32)
    step = jax.jit(lambda *args: model.decode(*args))

    def run(layout):
        cache = Cache.create(config, AxisRules(), 2, 8, layout=layout, page_size=4)
        assert cache.capacity == 8
        _, cache = step(TOKENS, cache, n_new)
        return step(TOKENS[:, :1], cache, one)[0]

    np.testing.assert_allclose(run("feature_major"), run("token_major"), atol=1e-6)


def test_each_layout_refuses_what_the_other_runs():
    make = lambda layout: nnx.eval_shape(lambda: Transformer(TINY, rngs=nnx.Rngs(0), layout=layout))
    cache = Cache.create(TINY, AxisRules(), 2, 8)
    with pytest.raises(
        NotImplementedError, match="training layout cannot decode; convert it with `to_decode`"
    ):
        make("train").decode(TOKENS, cache, np.array([8, 8], np.int32))
    with pytest.raises(
        NotImplementedError, match="decode layout runs `decode`; build one with layout='train'"
    ):
        make("decode")(TOKENS)
    with pytest.raises(ConfigError, match=r"logits='lst' must be one of all, last\. Did you mean last"):
        make("decode").decode(TOKENS, cache, np.array([8, 8], np.int32), logits="lst")


def test_donated_parameters_are_gone_once_they_are_laid_out_for_decoding():
    params = initial_params(TINY)
    kept = params_of(to_decode(TINY, params, AxisRules()))
    assert params.keys() == {"embedding", "layers", "final_norm"}
    donated = params_of(to_decode(TINY, params, AxisRules(), donate=True))
    assert params == {}
    jax.tree.map(np.testing.assert_array_equal, donated, kept)


def test_half_the_heads_width_apart_elements_are_rotated_by_position_and_frequency():
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 6)).astype(np.float32)
    positions = np.array([[0, 1, 2], [7, 100, 1000]])
    z = (x[..., :3] + 1j * x[..., 3:]) * np.exp(
        1j * positions[:, :, None, None] * 100.0 ** (-2 * np.arange(3) / 6)
    )
    expected = np.concatenate([z.real, z.imag], axis=-1)
    np.testing.assert_allclose(
        rotate(jnp.asarray(x), jnp.asarray(positions), frequencies(6, 100.0)), expected, atol=1e-4
    )
    same = rotate(
        jnp.asarray(x), jnp.asarray(positions[0]), frequencies(6, 100.0)
    )  # one row of positions for all
    np.testing.assert_allclose(same[0], expected[0], atol=1e-4)


def test_rotary_tables_are_rounded_to_the_type_of_the_input():
    x = jnp.ones((1, 1, 2), jnp.bfloat16)
    out = rotate(x, jnp.array([3]), frequencies(2, 10000.0))
    assert out.dtype == jnp.bfloat16
    cos, sin = (jnp.asarray(f(3.0), jnp.bfloat16) for f in (math.cos, math.sin))
    assert out[0, 0].tolist() == [float(cos - sin), float(cos + sin)]


def test_rms_norm_rounds_to_the_type_of_its_input_before_the_float32_gain():
    norm = RMSNorm(TINY, (4,), (None,), rngs=nnx.Rngs(0), rules=AxisRules())
    gain = np.array([1.001, 0.3, -2.0, 1.0], np.float32)
    norm.gain[...] = jnp.asarray(gain)
    x = np.array([[0.1, -2.0, 3.0, 0.7]], np.float32)
    exact = x / np.sqrt(np.mean(x**2) + 1e-6)
    np.testing.assert_allclose(norm(jnp.asarray(x)), exact * gain, rtol=1e-6)
    low = jnp.asarray(x, jnp.bfloat16)
    exact = np.asarray(low, np.float32) / np.sqrt(np.mean(np.asarray(low, np.float32) ** 2) + 1e-6)
    out = norm(low)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float32) * gain)


def test_rms_norm_of_several_axes_has_statistics_over_the_last_alone():
    norm = RMSNorm(TINY, (2, 3), (None, None), rngs=nnx.Rngs(0), rules=AxisRules())
    x = np.array([[[1.0, 1.0, 1.0], [100.0, 100.0, 100.0]]], np.float32)
    np.testing.assert_allclose(norm(jnp.asarray(x)), np.ones((1, 2, 3)), rtol=1e-5)


def test_mlp_gates_the_up_projection_with_silu():
    mlp = SwiGLU(
        dataclasses.replace(TINY, output_init="normal", init_std=0.5), rngs=nnx.Rngs(0), rules=AxisRules()
    )
    x = np.random.default_rng(0).standard_normal((1, 2, 16)).astype(np.float32)
    gate, up, down = (np.asarray(w[...]) for w in (mlp.w_gate, mlp.w_up, mlp.w_down))
    expected = ((x @ gate) / (1 + np.exp(-(x @ gate))) * (x @ up)) @ down
    np.testing.assert_allclose(mlp(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)


def test_embedding_split_over_the_vocabulary_finds_every_row(on_mesh):
    ids = np.arange(32, dtype=np.int32).reshape(2, 16)
    with on_mesh(1, 1, 4, 2):
        rules = AxisRules.of(vocab="tensor")
        embedding = jax.jit(lambda: Embedding(TINY, rngs=nnx.Rngs(0), rules=rules))()
        assert embedding.table[...].addressable_shards[0].data.shape == (8, 16)
        rows = jax.jit(lambda e, ids: e.encode(ids))(embedding, ids)
    assert rows.dtype == jnp.float32
    np.testing.assert_array_equal(rows, np.asarray(embedding.table[...])[ids])
