"""`mlra-evaluate`: a table, JSON, and mistakes in one sentence before parameters are read."""

import json
import math
import sys

import numpy as np
import pytest

from mlra_jax.cli import evaluate as cli
from mlra_jax.data.shards import ShardWriter
from mlra_jax.errors import UserError
from mlra_jax.evaluation import load

TEXT = b"What is written here is read by the model, one byte after the other." * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    for name in ("one", "two"):
        with ShardWriter(out, name, "val", tokenizer="byte") as writer:
            writer.write(np.array([256, *TEXT]))
    return out


def test_a_checkpoint_of_one_mesh_is_measured_on_another_as_table_and_json(
    checkpoint, folder, tmp_path, capsys
):
    out = tmp_path / "results.json"
    options = ["--mesh.data", "2", "--mesh.tensor", "2", "--seq-len", "64", "--json", str(out)]
    assert cli.main(["--checkpoint", checkpoint, "--data", str(folder), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(out.read_text())
    shards = report["perplexity"]["shards"]
    assert [s["name"] for s in shards] == [str(folder / f"{n}_val_000000.bin") for n in ("one", "two")]
    for shard in shards:
        assert shard["tokens"] == shard["n_bytes"] == len(TEXT)
        assert shard["perplexity"] == pytest.approx(math.exp(shard["nats_per_token"]))
        assert shard["bits_per_byte"] == pytest.approx(shard["nats_per_token"] / math.log(2))
    assert report["perplexity"]["mean"]["perplexity"] == pytest.approx(shards[0]["perplexity"], rel=1e-6)
    assert (report["mesh"]["tensor"], report["seq_len"], report["protocol"]) == (2, 64, "exact")
    assert report["checkpoint"].endswith("/3")
    assert [line.split()[1] for line in lines[2:]] == [*(s["name"] for s in shards), "mean"]
    assert f"{shards[0]['nats_per_token']:.4f}" in lines[2]
    assert len({len(line) for line in lines}) == 1


def test_what_does_not_fit_is_refused_before_parameters_are_read(
    checkpoint, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(load, "load_params", lambda *_: pytest.fail("read parameters"))
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # importing it fails
    monkeypatch.delitem(sys.modules, "mlra_jax.evaluation.harness", raising=False)
    data, needles = ["--data", str(folder)], ["--tasks", "mlra_needle"]
    cases = [
        ([*data, "--protocol", "paper"], "has 205 tokens; the paper protocol needs at least 577"),
        ([*data, "--batch-size", "0"], "--batch-size=0 must be at least 1"),
        ([*data, "--seq-len", "-1"], "--seq-len=-1 must be at least 0"),
        ([*data, "--mesh.data", "16"], "needs 16 devices; JAX sees 8"),
        (
            [*data, "--mesh.data", "1", "--mesh.context", "5"],
            "data.seq_len=96 is not divisible by twice mesh axis context=5",
        ),
        ([*data, "--json", str(tmp_path / "no" / "file.json")], "must be a file in a folder that exists"),
        ([*data, "--tokenizer", "nonsense"], "not with nonsense, which cannot be read here"),
        ([*data, "--step", "4"], "No checkpoint of step 4"),
        (["--data", "absent"], "There is no file or folder absent"),
        (["--tasks", "paper"], "--tasks needs lm-evaluation-harness: pip install 'mlra_jax[eval]'"),
        ([*needles, "--needle-lengths", "96", "60"], "A sequence of 60 tokens has no room for a needle"),
        (
            [*needles, "--needle-depths", "50", "101"],
            "--needle-depths=101 must be at least 0 and at most 100",
        ),
        ([*needles, "--needle-figure", "map.doc"], "--needle-figure map.doc must be a file that ends in"),
        (["--limit", "0"], "--limit=0 must be at least 1"),
        (
            [*data, "--tokenizer", "gpt2"],
            "and 1 more were made with the tokenizer byte (vocabulary 394ecf8e), not with gpt2",
        ),
    ]
    for options, words in cases:
        with pytest.raises(SystemExit) as ended:
            cli.main(["--checkpoint", checkpoint, *options])
        assert ended.value.code == 2
        captured = capsys.readouterr()
        assert words in captured.err
        assert not captured.out


def test_needles_are_looked_for_without_the_harness(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    out, figure = tmp_path / "results.json", tmp_path / "needle.png"
    options = [
        "--tasks",
        "mlra_needle",
        "--mesh.data",
        "1",
        "--needle-lengths",
        "96",
        "--needle-depths",
        "0",
        "100",
    ]
    options += ["--needle-samples", "3", "--needle-figure", str(figure), "--json", str(out)]
    assert cli.main(["--checkpoint", checkpoint, *options]) == 0
    assert capsys.readouterr().out.splitlines()[::2] == [
        "| tokens | at 0 % | at 100 % |",
        "|     96 |      0 |        0 |",
    ]
    report = json.loads(out.read_text())
    assert "perplexity" not in report
    assert report["mlra_needle"] == {
        "samples": 3,
        "digits": 5,
        "lengths": [96],
        "depths": [0, 100],
        "share": [[0, 0]],
    }
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_without_the_tokenizer_there_is_a_note_and_no_bits_per_byte(
    checkpoint, folder, tmp_path, capsys, monkeypatch
):
    def absent(name):
        raise UserError("It is not here.")

    monkeypatch.setattr(cli, "get_tokenizer", absent)
    out = tmp_path / "results.json"
    options = ["--mesh.data", "1", "--seq-len", "64", "--json", str(out)]
    shard = str(folder / "one_val_000000.bin")
    assert cli.main(["--checkpoint", checkpoint, "--data", shard, *options]) == 0
    assert "note: no bits per byte, for the tokenizer byte: It is not here." in capsys.readouterr().err
    (result,) = json.loads(out.read_text())["perplexity"]["shards"]
    assert result["bits_per_byte"] is None
    assert result["tokens"] == len(TEXT)
