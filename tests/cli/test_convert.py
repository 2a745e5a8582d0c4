"""`mlra-convert`: official weights to a checkpoint and back."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlra_jax.cli.convert import main
from mlra_jax.training.checkpoints import load_config


@pytest.fixture
def official(repository, tmp_path):
    """A folder as the official code leaves it: weights and config.json."""
    folder = tmp_path / "official"
    folder.mkdir()
    stored = json.loads((repository / "tests/parity/mlra_2.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored["config"] | {"model_type": "mlra_2"}))
    (folder / "model.safetensors").write_bytes((repository / "tests/parity/mlra_2.safetensors").read_bytes())
    return folder


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as error:
        main([str(a) for a in argv])
    assert error.value.code == 2
    return capsys.readouterr().err


def test_weights_become_a_checkpoint_and_come_back_with_the_same_bytes(official, tmp_path, capsys):
    run, back = tmp_path / "run", tmp_path / "back"
    assert main(["from-official", str(official), "--out", str(run), "--tokenizer", "byte"]) == 0
    assert capsys.readouterr().out == f"{run}\n"
    config = load_config(run)
    assert (config.model.attention.n_branches, config.data.tokenizer, config.data.seq_len) == (2, "byte", 64)

    assert main(["to-official", str(run), "--out", str(back)]) == 0
    assert sorted(p.name for p in back.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((back / "config.json").read_text()) == json.loads(
        (official / "config.json").read_text()
    )
    before, after = load_file(official / "model.safetensors"), load_file(back / "model.safetensors")
    assert {k: v.tobytes() for k, v in after.items()} == {k: v.tobytes() for k, v in before.items()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "official", "run"]

    assert main(["to-official", str(run), "--out", str(tmp_path / "with_head"), "--with-head"]) == 0
    tied = load_file(tmp_path / "with_head" / "model.safetensors")
    np.testing.assert_array_equal(tied["lm_head.weight"], tied["transformer.wte.weight"])

    # Neither direction writes over what is there.
    assert "exists" in refusal(capsys, "from-official", official, "--out", run)
    assert "exists" in refusal(capsys, "to-official", run, "--out", back)


def test_configuration_and_type_can_be_given_apart_from_the_weights(official, tmp_path):
    fields = json.loads((official / "config.json").read_text())
    del fields["model_type"]
    (official / "config.json").unlink()
    (tmp_path / "fields.json").write_text(json.dumps(fields))
    weights, options = official / "model.safetensors", ["--config", tmp_path / "fields.json"]
    argv = ["from-official", weights, "--out", tmp_path / "run", *options, "--model-type", "mlra_2"]
    assert main([str(a) for a in argv]) == 0
    assert load_config(tmp_path / "run").model.n_heads == 4


def test_mistakes_are_one_sentence_and_leave_nothing_behind(official, tmp_path, capsys):
    out = tmp_path / "out"
    convert = lambda *argv: refusal(capsys, *argv, "--out", out)
    assert "No file" in convert("from-official", tmp_path / "nowhere.safetensors")
    assert "does not exist" in convert("to-official", tmp_path / "nowhere")
    assert "The tensors do not fit" in convert("from-official", official, "--model-type", "mlra_4")
    (official / "config.json").write_text("[1]")
    assert "must hold a JSON object" in convert("from-official", official)
    (official / "config.json").write_text("{")
    assert "is not JSON" in convert("from-official", official)
    (official / "config.json").unlink()
    assert "name the official configuration with --config" in convert("from-official", official)
    assert not out.exists()
