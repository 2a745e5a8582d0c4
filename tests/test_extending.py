"""docs/extending.md: the attention that it defines works everywhere, with no file of the package edited."""

import dataclasses
import importlib
import json
import re
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlra_jax.attention.registry import attention_name, attention_type
from mlra_jax.checkpoints import find_step
from mlra_jax.cli.configs import load_config
from mlra_jax.cli.decode import main as decode
from mlra_jax.cli.describe import main as describe
from mlra_jax.cli.evaluate import main as evaluate
from mlra_jax.cli.prepare import main as prepare
from mlra_jax.cli.train import main as train
from mlra_jax.config import ConfigError, ExecutionConfig, MeshConfig, from_dict, to_dict
from mlra_jax.sharding import TRAIN_RULES, make_mesh

OPTIONS = """
--model.n_layers 1 --model.d_model 32 --model.d_ff 32 --model.attention.q_lora_rank 16 --data.micro_batch 1
--model.attention.kv_lora_rank 32 --model.attention.d_nope 8 --model.attention.d_rope 8 --data.seq_len 32
--checkpoint.every 4 --log.eval_sequences 8 --log.no_tensorboard --optim.warmup_steps 2 --optim.decay_steps 8
"""
SMALL = [*shlex.split(OPTIONS), "--compilation_cache", ""]


@pytest.fixture(scope="module")
def folder(repository, tmp_path_factory):
    """A user's folder, with the two files of the page, in which commands run."""
    folder = tmp_path_factory.mktemp("user")
    attention, run = re.findall(
        r"```python\n(.*?)```", (repository / "docs/extending.md").read_text(), re.DOTALL
    )
    (folder / "my_attention.py").write_text(attention)
    (folder / "my_run.py").write_text(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield folder
    sys.modules.pop("my_attention", None)


@pytest.mark.smoke
def test_it_trains_resumes_decodes_is_evaluated_and_described(folder, capsys):
    for steps in ("4", "6"):
        assert train(["my_run.py", *SMALL, "--steps", steps]) in (None, 0)
    assert find_step("runs/my_run").name == "6"
    assert "from step 4" in capsys.readouterr().err
    stored = json.loads((folder / "runs/my_run/config.json").read_text())
    assert stored["model"]["attention"]["type"] == "my_attention:TemperatureConfig"
    assert stored["model"]["attention"]["normalize_queries"] is True

    texts = []
    for tensor in ("1", "4"):
        prompt = ["--prompt", "ROMEO:", "--max_new_tokens", "8", "--temperature", "0"]
        assert decode(["--checkpoint", "runs/my_run", "--mesh.tensor", tensor, *prompt]) in (None, 0)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    (folder / "text.txt").write_text("To be, or not to be, that is the question:\n" * 32)
    prepare(["text.txt", "--out", "shards"])
    assert evaluate(["--checkpoint", "runs/my_run", "--data", "shards"]) in (None, 0)
    assert "| mean" in capsys.readouterr().out
    assert describe(["my_run.py", "--json"]) in (None, 0)
    assert json.loads(capsys.readouterr().out)["parameters"]["attention temperature"] == 3 * 4


@pytest.mark.parametrize(("form", "tensor"), [("expanded", 1), ("absorbed", 4), ("absorbed", 8)])
def test_its_cached_steps_give_its_full_forward_pass(folder, form, tensor):
    config = dataclasses.replace(load_config("my_run.py").model, n_heads=8)
    rng, length = np.random.default_rng(0), 6
    attention = config.attention.module()(
        config, rngs=nnx.Rngs(0), rules=TRAIN_RULES, execution=ExecutionConfig(attention_form=form)
    )
    attention.temperature[...] = jnp.asarray(rng.uniform(0.5, 2, 4), jnp.float32)
    attention.output.w_o[...] = jnp.asarray(rng.normal(size=attention.output.w_o.shape), jnp.float32)
    x_BTD = jnp.asarray(rng.normal(size=(2, length, config.d_model)), jnp.float32)
    expected = jax.jit(lambda attention, x: attention(x))(attention, x_BTD)
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, tensor, 1), jax.devices()[:tensor])):
        decoder = attention.to_decode()
        cache, outputs = decoder.init_cache(2, length), []
        step = jax.jit(lambda decoder, *args: decoder.decode(*args))
        for t in range(length):
            start, new = jnp.full(2, t), jnp.ones(2, jnp.int32)
            y_B1D, cache = step(decoder, x_BTD[:, t : t + 1], cache, start, new)
            outputs.append(np.asarray(y_B1D))
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), expected, rtol=0, atol=2e-4)


def test_a_family_that_cannot_be_found_again_is_refused_with_what_to_do(folder):
    config = load_config("my_run.py")
    stored = to_dict(config)
    assert from_dict(json.loads(json.dumps(stored))) == config
    stored["model"]["attention"]["type"] = "their_attention:Config"
    with pytest.raises(ConfigError, match=r"their_attention:Config cannot be imported.*PYTHONPATH"):
        from_dict(stored)
    for name, why in (
        ("mlra", "No attention is called 'mlra'; known: latent"),
        ("json:JSONDecoder", "must derive"),
    ):
        with pytest.raises(ConfigError, match=why):
            attention_type(name)
    again = importlib.reload(sys.modules["my_attention"])
    assert again.TemperatureConfig is not type(config.model.attention)
    with pytest.raises(ConfigError, match="would not be found again"):
        attention_name(type(config.model.attention))
