"""A checkpoint of any training mesh arrives on any decode mesh bit for bit, and what does not fit is refused first."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlra_jax.checkpoints import CheckpointError
from mlra_jax.cli.configs import load_config
from mlra_jax.config import ConfigError, MeshConfig, ModelConfig
from mlra_jax.generation import load
from mlra_jax.generation.load import abstract_params, decode_devices, load_model, splits_heads
from mlra_jax.model import to_decode
from mlra_jax.model.weights import attention_weights
from mlra_jax.sharding import decode_rules, make_mesh


@pytest.mark.parametrize(
    ("sizes", "split_heads"), [((1, 1, 4, 1), "auto"), ((1, 1, 8, 1), "no"), ((2, 1, 2, 2), "yes")]
)
def test_loaded_parameters_are_those_saved_laid_out_for_decoding(sizes, split_heads, checkpoint, params_of):
    loaded = load_model(checkpoint, MeshConfig(*sizes), split_heads=split_heads)
    with jax.set_mesh(loaded.mesh):
        expected = to_decode(loaded.config.model, params_of("mlra_4"), decode_rules(split_heads != "no"))
    pairs = list(zip(jax.tree.leaves(loaded.model), jax.tree.leaves(expected), strict=True))
    assert len(pairs) > 20
    for ours, theirs in pairs:
        assert ours.sharding == theirs.sharding
        assert np.array_equal(ours, theirs)


def test_the_training_layout_scores_whole_sequences_with_the_parameters_saved(checkpoint, params_of):
    loaded = load_model(checkpoint, MeshConfig(1, 2, 2, 1), layout="train")
    held = nnx.to_pure_dict(nnx.state(loaded.model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, held, params_of("mlra_4"))
    w_qb = loaded.model.layers.attention.w_qb[...]
    assert w_qb.addressable_shards[0].data.size * 4 == w_qb.size
    tokens = np.arange(12).reshape(2, 6)
    with jax.set_mesh(loaded.mesh):
        weights = attention_weights(loaded.model, tokens, layer=1)
    assert weights.shape == (4, 2, 8, 6, 6)
    one = load_model(checkpoint, layout="train")  # on one device
    with jax.set_mesh(one.mesh):
        np.testing.assert_allclose(attention_weights(one.model, tokens, layer=1), weights, rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match="n_heads=8 is not divisible by mesh axis tensor=3"):
        load_model(checkpoint, MeshConfig(1, 1, 3, 1), layout="train")


def test_heads_are_whole_on_gpus_where_that_spares_exchanges_and_costs_little():
    auto = lambda name, tensor, platform="gpu": splits_heads(
        "auto", load_config(name).model, tensor, platform
    )
    assert not auto("mlra_4", 4)
    assert not auto("mlra_2", 2)
    assert auto("mlra_4", 4, "tpu")
    assert auto("mla", 4)  # nothing to spare: each head reads one latent
    assert auto("gqa", 4)
    large = dataclasses.replace(load_config("mlra_4").model, n_heads=128, d_model=7168)
    assert splits_heads("auto", large, 4, "gpu")
    assert splits_heads("yes", load_config("mlra_4").model, 4, "gpu")
    assert not splits_heads("no", large, 4, "tpu")


@pytest.mark.parametrize("variant", ["mlra_4", "mlra_2", "gla_2", "mla", "gqa"])
@pytest.mark.parametrize("split_heads", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 4, 1), (1, 1, 8, 1), (2, 1, 2, 2)])
def test_no_device_reads_more_than_its_share_of_any_array(variant, split_heads, sizes, config_of):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    tensor = sizes[2]
    abstract = abstract_params(config_of(variant), decode_rules(split_heads), mesh)
    for path, leaf in jax.tree.leaves_with_path(abstract):
        held = int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
        divides = any(size % tensor == 0 for size in leaf.shape)
        assert held * (tensor if divides else 1) == leaf.size, jax.tree_util.keystr(path)


def test_weights_may_be_held_in_bfloat16_and_norm_gains_stay_float32(checkpoint, params_of):
    loaded = load_model(checkpoint, MeshConfig(1), param_dtype="bfloat16")
    types = {}
    for path, leaf in jax.tree.leaves_with_path(loaded.model):
        types.setdefault("gain" in jax.tree_util.keystr(path), set()).add(str(leaf.dtype))
    assert types == {True: {"float32"}, False: {"bfloat16"}}
    table = params_of("mlra_4")["embedding"]["table"]
    held = loaded.model.embedding.table[...]
    assert np.array_equal(held, jnp.asarray(table).astype(jnp.bfloat16))


def test_auto_keeps_the_stored_type_on_cpu(checkpoint):
    assert load_model(checkpoint, MeshConfig(1)).model.embedding.table[...].dtype == jnp.float32


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (
            MeshConfig(1, 1, 16, 1),
            r"mesh of tensor=16 needs 16 devices; JAX sees 8 \(cpu\); simulate them with XLA_",
        ),
        (MeshConfig(1, 1, 3, 1), r"n_latent_heads=4 \(each read by 8 query heads\) cannot be laid out"),
        (MeshConfig(1, 2, 4, 1), "decoding does not split parameters over fsdp"),
        (MeshConfig(0), "mesh.data=0 must be at least 1"),
        (MeshConfig(-1, 1, -1), "At most one mesh size may be -1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_read(mesh, words, checkpoint, monkeypatch):
    monkeypatch.setattr(load, "load_params", lambda *_: pytest.fail("read parameters"))
    with pytest.raises(ConfigError, match=words):
        load_model(checkpoint, mesh)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"split_heads": "Yes"}, "split_heads='Yes' must be one of auto, yes, no. Did you mean yes"),
        ({"param_dtype": "float16"}, "param_dtype='float16' must be one of auto, float32, bfloat16"),
    ],
)
def test_a_misspelt_choice_is_refused(choice, words, checkpoint):
    with pytest.raises(ConfigError, match=words):
        load_model(checkpoint, MeshConfig(1), **choice)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "load_params", lambda *_: pytest.fail("read parameters"))
    monkeypatch.setattr(load, "get_tokenizer", lambda name: type("Big", (), {"n_vocab": 265})())
    with pytest.raises(ConfigError, match="tokenizer byte has 265 ids, the model's vocabulary 264"):
        load_model(checkpoint, MeshConfig(1))


def test_a_checkpoint_that_is_not_there_is_named(tmp_path, checkpoint):
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        load_model(str(tmp_path / "absent"), MeshConfig(1))
    with pytest.raises(CheckpointError, match=r"No checkpoint of step 5 .* it has \[7\]"):
        load_model(checkpoint, MeshConfig(1), step=5)


def test_decode_takes_the_first_devices_or_all_with_minus_one():
    assert decode_devices(MeshConfig(1, 1, 2, 2)) == jax.devices()[:4]
    assert decode_devices(MeshConfig(-1, 1, 2, 1)) == jax.devices()


def test_with_several_processes_the_mesh_must_use_all_devices(monkeypatch):
    monkeypatch.setattr(load.jax, "process_count", lambda: 2)
    assert len(decode_devices(MeshConfig(1, 1, 8, 1))) == 8
    with pytest.raises(ConfigError, match="uses 4 of 8 devices; with 2 processes it must use all of them"):
        decode_devices(MeshConfig(1, 1, 4, 1))


def test_the_full_size_model_is_read_in_quarters_on_four_devices():
    mesh = make_mesh(MeshConfig(1, 1, 4, 1), jax.devices()[:4])
    leaves = jax.tree.leaves(abstract_params(ModelConfig(), decode_rules(), mesh))
    total = sum(leaf.size for leaf in leaves)
    assert total > 2.8e9
    assert sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in leaves) == total // 4
