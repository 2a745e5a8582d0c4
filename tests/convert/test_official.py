"""The official names and shapes, in and out."""

import dataclasses
import json
from collections import Counter

import jax
import numpy as np
import pytest
from flax import nnx

from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.attention.tensor_product import TensorProductAttentionConfig
from mlra_jax.attention.tied import TiedAttentionConfig
from mlra_jax.config import ConfigError, ModelConfig, RotaryScalingConfig
from mlra_jax.convert import (
    ConvertError,
    lazy_params_from_official,
    model_config_from_official,
    official_from_model_config,
    official_from_params,
    open_safetensors,
    params_from_official,
)
from mlra_jax.model import Transformer
from mlra_jax.model.layers import rotary_frequencies

VARIANTS = ("mlra_4", "mlra_2", "mla", "gqa", "mha", "mlra_4_gated")
LATENT = {
    "n_layer": 2,
    "n_head": 8,
    "n_embd": 12,
    "intermediate_size": 10,
    "vocab_size": 16,
    "block_size": 64,
    "q_lora_rank": 6,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 2,
    "bias": False,
    "dropout": 0.0,
}
OWN = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")
GROUPED = {k: v for k, v in LATENT.items() if k not in OWN} | {"head_dim": 4, "group_size": 2}
MHA = {k: v for k, v in GROUPED.items() if k != "group_size"}
ALONE = {k: v for k, v in MHA.items() if k != "head_dim"}
MFA = ALONE | {"head_dim": 6, "share_q_dim": 5}
TPA = ALONE | {"head_dim": 6, "rank": 2, "q_rank": 3}
TYPES = {
    **dict.fromkeys(("mla", "gla_2", "gla_4", "mlra_2", "mlra_4"), LATENT),
    **dict.fromkeys(("mla_gated", "gla_2_gated", "mlra_2_gated", "mlra_4_gated"), LATENT),
    **dict.fromkeys(
        ("mla_no_scale", "gla_2_no_scale", "mlra_2_no_scale", "mla_normal_initialization"), LATENT
    ),
    **dict.fromkeys(("gqa", "gqa_gated", "gqa_normal_initialization"), GROUPED),
    **dict.fromkeys(("gta", "gta_normal_initialization"), GROUPED),
    "mha": MHA,
    "mfa": MFA,
    **dict.fromkeys(("tpa", "tpa_normal_initialization"), TPA),
}


@pytest.fixture
def parity(repository):
    """`parity(variant)`: its configuration and its tensors, unread."""

    def load(variant):
        path = repository / "tests" / "parity" / f"{variant}.safetensors"
        official = json.loads(path.with_suffix(".json").read_text())
        return model_config_from_official(official["config"], variant), open_safetensors(path)

    return load


def random_params(config):
    rng = np.random.default_rng(0)
    state = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), nnx.Param)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), nnx.to_pure_dict(state))


@pytest.mark.smoke
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_official_tensor_leaves_again_with_the_same_name_shape_and_bytes(parity, variant):
    config, tensors = parity(variant)
    again = official_from_params(params_from_official(tensors, config), config)
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        before, after = np.asarray(tensor), np.asarray(again[name])
        assert (
            (after.shape, after.dtype)
            == (before.shape, before.dtype)
            == (again[name].shape, again[name].dtype)
        )
        assert after.tobytes() == before.tobytes(), name


@pytest.mark.parametrize("model_type", TYPES)
def test_every_parameter_of_every_official_model_returns_from_its_tensors(model_type):
    config = model_config_from_official(TYPES[model_type], model_type)
    params = random_params(config)
    tensors = official_from_params(params, config)
    assert sum(np.prod(t.shape) for t in tensors.values()) == sum(x.size for x in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, params_from_official(tensors, config), params)


@pytest.mark.parametrize("model_type", TYPES)
def test_official_configuration_returns_from_ours(model_type):
    config = model_config_from_official(TYPES[model_type], model_type)
    assert official_from_model_config(config, block_size=64) == TYPES[model_type] | {"model_type": model_type}
    assert model_config_from_official(TYPES[model_type] | {"model_type": model_type}) == config


def test_fields_become_the_sizes_that_they_mean():
    config = model_config_from_official(LATENT, "mlra_2")
    attention = LatentAttentionConfig(4, 2, q_lora_rank=6, kv_lora_rank=16, d_nope=5, d_rope=2)
    sizes = {"vocab_size": 16, "n_layers": 2, "d_model": 12, "n_heads": 8, "d_ff": 10}
    assert config == ModelConfig(**sizes, attention=attention)
    assert model_config_from_official(GROUPED, "gqa").attention == GroupedAttentionConfig(4, 4)
    assert model_config_from_official(MHA, "mha").attention == GroupedAttentionConfig(8, 4)
    assert model_config_from_official(MHA, "mqa").attention == GroupedAttentionConfig(1, 4)
    assert model_config_from_official(MFA, "mfa").attention == GroupedAttentionConfig(1, 6, q_lora_rank=5)
    assert model_config_from_official(GROUPED, "gta").attention == TiedAttentionConfig(4, 4)
    assert model_config_from_official(TPA, "tpa").attention == TensorProductAttentionConfig(2, 3, 6)
    assert model_config_from_official(LATENT, "mlra_2_gated").gated_attention
    assert not model_config_from_official(LATENT, "mlra_2_no_scale").attention.scale_latents
    assert model_config_from_official(MHA, "mha_normal_initialization").output_init == "normal"


def test_names_of_gla_2_and_of_gates_are_the_official_ones():
    gla = official_from_params(random_params(c := model_config_from_official(LATENT, "gla_2_gated")), c)
    assert {k.removeprefix("transformer.h.1.attn.") for k in gla if ".h.1.attn." in k} == {
        *("c_proj.weight", "gated_proj.weight", "q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight"),
        *("kv_a_proj_with_mqa.weight", "kv_a_layernorm_1.weight", "kv_a_layernorm_2.weight"),
        *("kv_b_proj_1.weight", "kv_b_proj_2.weight"),
    }
    # Heads 4 to 7 read latent 1: out axis head-major, within a head 5 key values, then 5 value values.
    params = random_params(c)["layers"]["attention"]
    up = np.asarray(gla["transformer.h.1.attn.kv_b_proj_2.weight"]).reshape(4, 2, 5, 8)
    np.testing.assert_array_equal(up[2, 0], params["w_uk"][1, 0, 6].T)
    np.testing.assert_array_equal(up[2, 1], params["w_uv"][1, 0, 6].T)
    gqa = official_from_params(random_params(c := model_config_from_official(GROUPED, "gqa_gated")), c)
    assert gqa["transformer.h.0.attn.c_gated.weight"].shape == (32, 12)


def test_missing_unknown_and_misshapen_tensors_are_listed_all_at_once_with_both_shapes(parity):
    config, tensors = parity("mla")
    broken = dict(tensors)
    del broken["layernorm.weight"], broken["transformer.h.1.attn.c_proj.weight"]
    broken["transformer.h.0.attn.rotary.inv_freq"] = np.zeros(4, np.float32)
    broken["transformer.wte.weight"] = np.zeros((256, 48), np.float32)
    with pytest.raises(ConvertError) as error:
        params_from_official(broken, config)
    assert str(error.value).splitlines()[1:] == [
        "  - layernorm.weight: missing, expected (48,)",
        "  - transformer.h.1.attn.c_proj.weight: missing, expected (48, 64)",
        "  - transformer.h.0.attn.rotary.inv_freq: (4,), not in the model",
        "  - transformer.wte.weight: (256, 48), expected (257, 48)",
    ]


def test_parameters_of_another_model_are_refused_with_both_shapes(parity):
    config, tensors = parity("mla")
    params = params_from_official(tensors, config)
    del params["final_norm"]
    params["layers"]["mlp"]["w_up"] = params["layers"]["mlp"]["w_up"][:1]
    with pytest.raises(ConvertError) as error:
        official_from_params(params, config)
    assert str(error.value).splitlines()[1:] == [
        "  - final_norm.gain: missing, expected (48,)",
        "  - layers.mlp.w_up: (1, 48, 80), expected (2, 48, 80)",
    ]


def test_output_matrix_is_taken_if_it_is_the_token_matrix_and_written_if_asked(parity):
    config, tensors = parity("gqa")
    params = params_from_official(tensors, config)
    written = official_from_params(params, config, with_head=True)
    assert set(written) - set(tensors) == {"lm_head.weight"}
    jax.tree.map(np.testing.assert_array_equal, params_from_official(written, config), params)
    untied = np.asarray(tensors["transformer.wte.weight"]).copy()
    untied[3, 4] += 1
    with pytest.raises(ConvertError, match=r"lm_head.weight differs from transformer.wte.weight"):
        params_from_official(tensors | {"lm_head.weight": untied}, config)
    with pytest.raises(ConvertError, match=r"lm_head.weight: \(3,\), expected \(257, 48\)"):
        params_from_official(tensors | {"lm_head.weight": np.zeros(3, np.float32)}, config)


def test_lazy_parameters_are_made_layer_by_layer_from_their_own_tensors(parity):
    config, tensors = parity("mlra_4")
    reads = []

    def counted(name, tensor):
        return dataclasses.replace(tensor, read=lambda: (reads.append(name), tensor.read())[1])

    lazy = lazy_params_from_official({name: counted(name, t) for name, t in tensors.items()}, config)
    assert reads == []
    eager = params_from_official(tensors, config)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(lazy) == shapes(eager)
    np.testing.assert_array_equal(
        np.asarray(lazy["layers"]["attention"]["w_uk"][1]), eager["layers"]["attention"]["w_uk"][1]
    )
    assert reads == ["transformer.h.1.attn.kv_b_proj"]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, lazy), eager)
    # Once for each parameter that it is a part of.
    assert Counter(reads)["transformer.h.0.attn.kv_b_proj"] == 2
    assert Counter(reads)["transformer.h.1.mlp.c_fc1.weight"] == 1
    # Lazy parameters go out as well.
    again = official_from_params(lazy, config)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(np.asarray(again[name]), np.asarray(tensor), err_msg=name)


def test_parameters_are_converted_to_their_configured_type(parity):
    config, tensors = parity("mha")
    low = params_from_official(tensors, dataclasses.replace(config, param_dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(low)} == {np.dtype(jax.numpy.bfloat16)}
    # bfloat16 tensors go into float32 parameters and out again without loss.
    halved = {name: np.asarray(t) for name, t in official_from_params(low, config).items()}
    again = official_from_params(params_from_official(halved, config), config)
    for name, tensor in halved.items():
        np.testing.assert_array_equal(np.asarray(again[name]), tensor.astype(np.float32))


@pytest.mark.parametrize(
    ("change", "model_type", "said"),
    [
        ({}, "nsa", ["model_type=nsa cannot be converted"]),
        ({}, "gta_gated", ["model_type=gta_gated cannot be converted"]),
        ({}, "gqa_no_scale", ["model_type=gqa_no_scale cannot be converted"]),
        ({"model_type": None}, None, ["no model_type"]),
        (
            {"n_head": None, "q_lora_rank": None, "share_q_dim": 3, "n_layer": 0, "bias": True},
            "mla",
            [
                "n_head is missing",
                "q_lora_rank is missing",
                "share_q_dim=3 is not",
                "bias must",
                "n_layer=0 must",
            ],
        ),
        ({"n_embd": 2.5}, "mla", ["n_embd=2.5 must be a whole number"]),
        (
            {"rope_theta": 0, "rope_scaling": {"type": "longrope", "short_factor": [1]}},
            "mla",
            ["rope_theta=0 must be", "has the type longrope, which is not", "unknown field short_factor=[1]"],
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "beta_fast": 16}},
            "mla",
            ["no factor", "no original_max_position_embeddings"],
        ),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "mla", ["factor=0.5 must be at least 1"]),
        ({"n_head": 6}, "gla_4", ["n_heads=6 is not divisible"]),
        ({"kv_lora_rank": 18}, "mlra_4", ["kv_lora_rank=18 is not divisible"]),
    ],
)
def test_a_configuration_that_is_no_official_one_is_refused_with_every_fault(change, model_type, said):
    config = {k: v for k, v in (LATENT | change).items() if v is not None}
    with pytest.raises(ConfigError) as error:
        model_config_from_official(config, model_type)
    assert len(error.value.faults) == len(said)
    for fault, part in zip(error.value.faults, said, strict=True):
        assert part in fault


V3 = {
    "type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        (None, RotaryScalingConfig()),
        ({"rope_type": "default"}, RotaryScalingConfig()),
        ({"type": "linear", "factor": 8.0}, RotaryScalingConfig("linear", 8.0)),
        (V3 | {"mscale": 1.0, "mscale_all_dim": 1.0}, RotaryScalingConfig("yarn", 40.0, 4096)),
        (V3, RotaryScalingConfig("yarn", 40.0, 4096, mscale_all_dim=0.0)),
    ],
)
def test_rope_scaling_is_read_and_written_as_other_models_have_it(rope, scaling):
    model = model_config_from_official(LATENT | {"rope_theta": 10000, "rope_scaling": rope}, "mla")
    assert model.rotary_scaling == scaling
    written = official_from_model_config(model, block_size=64)
    assert written.get("rope_scaling", {"type": "none"})["type"] == scaling.method
    assert model_config_from_official(written, "mla") == model


def test_an_attention_factor_is_the_magnitude_itself():
    model = model_config_from_official(LATENT | {"rope_scaling": V3 | {"attention_factor": 1.2}}, "mla")
    assert rotary_frequencies(model, 8).magnitude == pytest.approx(1.2)


def test_a_model_that_no_official_one_is_like_is_refused_with_every_reason():
    attention = LatentAttentionConfig(8, 8, kv_lora_rank=16, scale_latents=False)
    config = ModelConfig(n_heads=8, attention=attention, gated_attention=True, rope_base=5e5)
    config = dataclasses.replace(config, rotary_scaling=RotaryScalingConfig("ntk", 2.0))
    with pytest.raises(ConfigError) as error:
        official_from_model_config(config, block_size=64)
    assert [fault.split(",")[0] for fault in error.value.faults] == [
        "model.rope_base=500000.0",
        "There is no official model with n_latent_heads=8 and n_branches=8.",
        "model.rotary_scaling.method=ntk has no rope_scaling; it equals a larger model.rope_base",
        "There is no official model both gated and without scales.",
    ]
    with pytest.raises(ConfigError, match="n_latent_heads=8"):
        params_from_official({}, config)


@pytest.mark.parametrize(
    ("attention", "gated", "said"),
    [
        (GroupedAttentionConfig(2, 4, q_lora_rank=3), False, "q_lora_rank=3 and n_kv_heads=2"),
        (GroupedAttentionConfig(1, 4, q_lora_rank=3), True, "gated_attention and MFA"),
        (TiedAttentionConfig(2, 4), True, "gated_attention and GTA"),
        (TensorProductAttentionConfig(), True, "gated_attention and TPA"),
    ],
)
def test_a_model_of_the_other_attentions_that_no_official_one_is_like_is_refused(attention, gated, said):
    config = ModelConfig(n_heads=8, attention=attention, gated_attention=gated)
    with pytest.raises(ConfigError, match=f"There is no official model with {said}"):
        official_from_model_config(config, block_size=64)
    with pytest.raises(ConfigError, match=f"There is no official model with {said}"):
        params_from_official({}, config)
