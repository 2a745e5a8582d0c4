"""`mlra-convert`: official weights to a checkpoint and back."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mlra_jax.checkpoints import Checkpoints, lazy_params, load_config
from mlra_jax.cli.configs import parse_train_args
from mlra_jax.cli.convert import main
from mlra_jax.config import ConfigError
from mlra_jax.convert import open_weights, split_latents
from mlra_jax.textfiles import TextError
from tests.convert.torch_writer import write_torch


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
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.json"]

    assert main(["to-official", str(run), "--out", str(tmp_path / "with_head"), "--with-head"]) == 0
    tied = load_file(tmp_path / "with_head" / "model.safetensors")
    np.testing.assert_array_equal(tied["lm_head.weight"], tied["transformer.wte.weight"])

    # Neither direction writes over what is there.
    assert "exists" in refusal(capsys, "from-official", official, "--out", run)
    assert "exists" in refusal(capsys, "to-official", run, "--out", back)


def test_pytorch_files_in_several_parts_become_the_same_checkpoint_and_leave_in_several(official, tmp_path):
    tensors = load_file(official / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    names = sorted(tensors)
    files = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "config.json").write_bytes((official / "config.json").read_bytes())
    for file, part in files.items():
        write_torch(torch / file, {name: tensors[name] for name in part})
    weight_map = {name: file for file, part in files.items() for name in part}
    (torch / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )

    assert main(["from-official", str(torch), "--out", str(tmp_path / "run")]) == 0
    back = ["to-official", str(tmp_path / "run"), "--out", str(tmp_path / "back"), "--max-file-gb", "1e-4"]
    assert main(back) == 0
    read = open_weights(tmp_path / "back")
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 2
    assert {k: np.asarray(v).tobytes() for k, v in read.items()} == {
        k: v.tobytes() for k, v in tensors.items() if k != "lm_head.weight"
    }


KILLED = """
import os, signal, sys, contextlib
from mlra_jax.cli import convert

@contextlib.contextmanager
def progress(total, verb):
    done = 0
    def update(n):
        nonlocal done
        done += n
        if done > total / 2:
            os.kill(os.getpid(), signal.SIGKILL)
    yield update

convert.byte_progress = progress
convert.main(sys.argv[1:])
"""


def test_a_killed_conversion_leaves_nothing_that_looks_complete_and_can_be_made_again(
    official, tmp_path, capsys, repository
):
    """Killed after half of the bytes; the second time as ever."""
    run, back = tmp_path / "run", tmp_path / "back"
    environment = os.environ | {"PYTHONPATH": str(repository), "JAX_PLATFORMS": "cpu"}

    def kill(*argv):
        command = [sys.executable, "-c", KILLED, *map(str, argv)]
        assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL

    kill("from-official", official, "--out", run)
    assert any((run / "checkpoints").iterdir())
    assert "No complete checkpoint" in refusal(capsys, "to-official", run, "--out", back)
    assert main(["from-official", str(official), "--out", str(run)]) == 0
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["0"]

    kill("to-official", run, "--out", back)
    assert not back.exists()
    assert main(["to-official", str(run), "--out", str(back)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "official", "run"]


def test_training_takes_a_converted_checkpoint_with_its_own_configuration(official, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["from-official", str(official), "--out", str(run), "--tokenizer", "byte"]) == 0
    text = (run / "config.json").read_text()
    (run / "config.json").write_bytes(text.encode("utf-8-sig").replace(b"\n", b"\r\n"))  # saved on Windows
    config = parse_train_args([str(run / "config.json"), "--steps", "2"], prog="train.py")
    assert (config.run_dir, config.steps, config.data.seq_len) == (str(run), 2, 64)
    with contextlib.closing(Checkpoints(config.run_dir, config.checkpoint)) as checkpoints:
        assert not (checkpoints.directory / "0" / "optimizer").exists()
        assert checkpoints.check_config(0, config) == ["steps: 100001 -> 2"]
    shutil.copytree(run, tmp_path / "copy")
    assert parse_train_args([str(tmp_path / "copy" / "config.json")]).run_dir == str(tmp_path / "copy")
    assert f"names {run} as its run's folder, and was moved or copied" in capsys.readouterr().err
    assert parse_train_args([str(tmp_path / "copy" / "config.json"), "--out", "x"]).run_dir == "x"
    shutil.copy(run / "config.json", tmp_path)  # a configuration without a run
    assert parse_train_args([str(tmp_path / "config.json")]).run_dir == str(run)
    (run / "config.json").write_bytes(b'{"name": "\xff"}')
    with pytest.raises(TextError, match=r"config.json, line 1, byte 11 is not UTF-8 text"):
        parse_train_args([str(run / "config.json")])
    (run / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config.json: The configuration=\[\] must be TrainConfig"):
        parse_train_args([str(run / "config.json")])


def test_an_mla_becomes_a_run_of_an_mlra_that_training_takes(repository, tmp_path, capsys):
    parity = repository / "tests/parity"
    config = json.loads((parity / "mla.json").read_text())["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ["--config", str(tmp_path / "config.json"), "--model-type", "mla", "--tokenizer", "byte"]
    mla, mlra = tmp_path / "mla", tmp_path / "mlra"
    assert main(["from-official", str(parity / "mla.safetensors"), "--out", str(mla), *options]) == 0
    assert main(["split-latents", str(mla), "--out", str(mlra)]) == 0  # into four, read by all heads
    before, after = load_config(mla), parse_train_args([str(mlra / "config.json")], prog="train.py")
    assert (after.run_dir, after.data) == (str(mlra), before.data)
    assert after.model.attention == dataclasses.replace(
        before.model.attention, n_latent_heads=4, n_branches=4
    )
    stored, _ = split_latents(lazy_params(mla), before.model, 4, 4)
    same = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    jax.tree.map(same, lazy_params(mlra), stored)

    capsys.readouterr()
    assert "exists" in refusal(capsys, "split-latents", mla, "--out", mlra)
    again = ("split-latents", mlra, "--out", tmp_path / "again")
    assert "must be twice, or another multiple of, the 4 of the model" in refusal(capsys, *again)
    assert not (tmp_path / "again").exists()


def test_configuration_and_type_can_be_given_apart_from_the_weights(official, tmp_path):
    fields = json.loads((official / "config.json").read_text())
    del fields["model_type"]
    (official / "config.json").unlink()
    (tmp_path / "fields.json").write_text(json.dumps(fields), encoding="utf-8-sig")
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
