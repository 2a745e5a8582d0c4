"""`mlra-export`: a folder with all of a checkpoint, that returns bit for bit, and that engines load part by part."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors
from flax import nnx
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.attention.tensor_product import TensorProductAttentionConfig
from mlra_jax.attention.tied import TiedAttentionConfig
from mlra_jax.checkpoints import CheckpointError, lazy_params, load_config, save_params
from mlra_jax.cli import convert, export
from mlra_jax.config import ConfigError, DataConfig, ModelConfig, TrainConfig, from_dict
from mlra_jax.convert import files
from mlra_jax.data.tokenizers import JsonTokenizer, get_tokenizer, json_description
from mlra_jax.generation.load import abstract_params
from mlra_jax.lazy_arrays import LazyTensor
from mlra_jax.model import Transformer, to_decode
from mlra_jax.serving import huggingface
from mlra_jax.sharding import AxisRules

LATENT = {"q_lora_rank": 20, "kv_lora_rank": 64, "d_nope": 16, "d_rope": 8}
ATTENTIONS = {
    "mlra_4": LatentAttentionConfig(4, 4, **LATENT),
    "gqa": GroupedAttentionConfig(n_kv_heads=2, d_head=16),
    "gta": TiedAttentionConfig(n_tied_heads=2, d_head=16),
    "tpa": TensorProductAttentionConfig(d_head=16, rank=2, q_rank=3),
}
RULES = AxisRules.of(batch="data", mlp="model", vocab="model", heads="model", kv_head_shards="model")


def run_config(name="mlra_4", **data):
    sizes = {"vocab_size": 264, "n_layers": 2, "d_model": 48, "n_heads": 8, "d_ff": 80}
    model = ModelConfig(**sizes, attention=ATTENTIONS[name], gated_attention=name == "mlra_4")
    return TrainConfig(model=model, data=DataConfig(**{"tokenizer": "byte", "seq_len": 96} | data))


def random_params(config):
    rng = np.random.default_rng(0)
    state = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), nnx.Param)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), nnx.to_pure_dict(state))


def mesh_of(tensor, kind=AxisType.Auto):
    return jax.make_mesh((1, tensor), ("data", "model"), (kind,) * 2, devices=jax.devices()[:tensor])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose parameters were saved from four devices."""
    folder, config = tmp_path_factory.mktemp("export") / "run", run_config()
    abstract = abstract_params(config.model, RULES, mesh_of(4))
    params = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), random_params(config.model), abstract)
    save_params(folder, params, config)
    return folder


@pytest.fixture(scope="module")
def exported(run):
    """Its folder, in several files."""
    out = run.with_name("exported")
    assert export.main([str(run), "--out", str(out), "--max-file-gb", "1e-4"]) == 0
    return out


class InSlices:
    """`safe_open` for those who read no tensor whole."""

    def __init__(self, *args, **kwargs):
        self.file = safetensors.safe_open(*args, **kwargs)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __getattr__(self, name):
        assert name != "get_tensor", "a whole tensor was read"
        return getattr(self.file, name)


def refusal(capsys, main, *argv):
    with pytest.raises(SystemExit) as error:
        main([str(a) for a in argv])
    assert error.value.code == 2
    return capsys.readouterr().err


def same_parameters(folder, expected):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), y), lazy_params(folder), expected)


def test_the_folder_says_what_engines_read_and_returns_with_the_same_bytes(run, exported, tmp_path, capsys):
    described = json.loads((exported / "config.json").read_text())
    assert {
        "architectures": ["MLRAForCausalLM"],
        "model_type": "mlra",
        "torch_dtype": "bfloat16",
        "vocab_size": 264,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 96,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "n_tokens": 257,
    }.items() <= described.items()
    assert from_dict(described["mlra_jax"]).model == run_config().model
    index = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"]
    parts = sorted(exported.glob("model-*-of-*.safetensors"))
    assert len(parts) > 2
    assert {name: part.name for part in parts for name in load_file(part)} == index
    assert "layers.1.attention.w_kva" in index
    assert not list(exported.parent.glob("exported.*"))

    back = tmp_path / "back"
    assert convert.main(["from-export", str(exported), "--out", str(back)]) == 0
    same_parameters(back, random_params(run_config().model))
    config = load_config(back)
    assert (config.model, config.data.tokenizer, config.data.seq_len) == (run_config().model, "byte", 96)
    assert "exists; name another --out" in refusal(capsys, export.main, run, "--out", exported)
    assert "must be a local folder" in refusal(capsys, export.main, run, "--out", "gs://bucket/folder")
    with pytest.raises(CheckpointError, match="mlra-convert makes one of the safetensors files"):
        load_config(exported)
    assert "use mlra-convert from-export" in refusal(
        capsys, convert.main, "from-official", exported, "--out", tmp_path / "official"
    )


@pytest.mark.parametrize("name", ["gqa", "gta", "tpa"])
def test_every_attention_returns_though_engines_refuse_it(name, tmp_path):
    config = run_config(name)
    save_params(tmp_path / "run", random_params(config.model), config)
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert convert.main(["from-export", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 0
    same_parameters(tmp_path / "back", random_params(config.model))
    with pytest.raises(ConfigError, match="hold this package's latent heads in their pages"):
        huggingface.load(tmp_path / "out", RULES, mesh_of(2))


def test_a_failure_leaves_no_folder(run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "write_weights", full)
    with pytest.raises(SystemExit):
        export.main([str(run), "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_each_device_reads_its_own_part_alone_in_the_decode_layout(exported, monkeypatch, kind):
    config = dataclasses.replace(run_config().model, param_dtype="bfloat16")
    parts = []

    def part(self, index, read=LazyTensor.part):
        values = read(self, index)
        parts.append((values.size, self.size, any(n % 4 == 0 for n in self.shape)))
        return values

    monkeypatch.setattr(LazyTensor, "part", part)
    monkeypatch.setattr(files, "safe_open", InSlices)
    model = huggingface.load(exported, RULES, mesh_of(4, kind))
    assert parts
    assert all(size * 4 == whole for size, whole, divides in parts if divides)

    cast = lambda path, x: x if path[-1].key == "gain" else x.astype("bfloat16")
    params = jax.tree_util.tree_map_with_path(cast, random_params(config))
    with jax.set_mesh(mesh_of(4, kind)):
        expected = to_decode(config, jax.tree.map(jax.numpy.asarray, params), RULES)
    pairs = list(zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True))
    assert len(pairs) > 20
    for ours, theirs in pairs:
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
        assert ours.dtype == theirs.dtype
        for mine, his in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
            assert mine.index == his.index
            assert np.array_equal(mine.data, his.data)
    split = model.layers[0].attention.w_uk[...].addressable_shards
    assert len({str(shard.index) for shard in split}) == 4


def test_a_description_alone_reads_the_checkpoint_that_it_names(run, exported, tmp_path):
    described = huggingface.describe(load_config(run), checkpoint=str(run))
    for name, content in described.items():
        (tmp_path / name).write_text(content)
    models = [huggingface.load(folder, RULES, mesh_of(1)) for folder in (tmp_path, exported)]
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, models))


def test_what_does_not_fit_is_said_before_anything_is_read(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(LazyTensor, "part", lambda *_: pytest.fail("read parameters"))
    with pytest.raises(ConfigError, match=r"n_latent_heads=4 .* cannot be laid out on mesh axis tensor=3"):
        huggingface.load(exported, RULES, mesh_of(3))
    with pytest.raises(ValueError, match=r"No file .*config.json; expected a folder that mlra-export wrote"):
        huggingface.load(tmp_path, RULES, mesh_of(1))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="was not written by mlra-export: it has no mlra_jax"):
        huggingface.load(tmp_path, RULES, mesh_of(1))
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    tensors = {k: v for part in exported.glob("*.safetensors") for k, v in load_file(part).items()}
    del tensors["layers.1.mlp.w_up"]
    tensors["final_norm.gain"] = tensors["final_norm.gain"][:-1]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        huggingface.load(tmp_path, RULES, mesh_of(1))
    assert str(error.value).splitlines()[1:] == [
        "  - final_norm.gain: (47,) in the checkpoint, (48,) in the model",
        "  - layers.mlp.w_up: (1, 48, 80) in the checkpoint, (2, 48, 80) in the model",
    ]


TEXT = "It's  10 o'clock…\n\n\tnaïve <|endoftext|> 漢字 \x00é  x   "


@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_tokenizer_json_gives_the_ids_of_training(name, tmp_path):
    ours = get_tokenizer(name)
    (tmp_path / "tokenizer.json").write_text(json.dumps(json_description(name)))
    theirs = JsonTokenizer(tmp_path / "tokenizer.json")
    assert theirs.encode(TEXT) == ours.encode(TEXT)
    assert theirs.decode(ours.encode(TEXT)) == TEXT
    assert (theirs.n_vocab, theirs.eot_id) == (ours.n_vocab, ours.eot_id)
    assert list(theirs.byte_lengths()) == list(ours.byte_lengths())


def test_a_tokenizers_file_and_its_chat_template_go_along(tmp_path):
    description = json_description("byte")
    added = description | {"post_processor": {"type": "ByteLevel"}, "truncation": {"max_length": 1}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(added))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    config = run_config(tokenizer=str(tmp_path / "tokenizer.json"))
    written = {name: json.loads(text) for name, text in huggingface.describe(config, max_len=50).items()}
    assert written["tokenizer.json"] == description  # without what adds or cuts tokens
    assert written["tokenizer_config.json"]["chat_template"] == "{{ messages }}"
    assert not written["tokenizer_config.json"]["split_special_tokens"]
    assert written["config.json"]["max_position_embeddings"] == 50
    assert (
        written["config.json"]["mlra_jax"]["data"]["tokenizer"] == "tokenizer.json"
    )  # and no path of this machine
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=200))
    with pytest.raises(ConfigError, match="has 257 ids, the model's vocabulary 200"):
        huggingface.describe(small)
