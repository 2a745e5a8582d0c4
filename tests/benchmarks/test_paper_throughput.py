"""The paper's throughput table: where each attention runs, what is made of its time, and what is written."""

import json

import pytest

from benchmarks import paper_throughput
from benchmarks.paper import THROUGHPUT
from benchmarks.paper_throughput import MESHES, model_config, place, tokens_per_ms, what_ran


def test_the_meshes_are_the_paper_s_eight_devices():
    assert set(MESHES) == set(THROUGHPUT)
    assert {tensor * data for tensor, data in MESHES.values()} == {8}


@pytest.mark.parametrize(
    ("variant", "n_devices", "runs"),
    [
        ("mlra_4", 8, (4, 2, False, "all 8 devices")),
        ("mlra_4", 4, (4, 1, False, "4 of 8 devices; between these and the others nothing passes")),
        ("mlra_4", 2, (4, 1, True, "one device's share of 4 x 2, without the collectives")),
        ("gla_2", 5, (2, 2, False, "4 of 8 devices; between these and the others nothing passes")),
        ("mla", 1, (1, 1, False, "1 of 8 devices; between these and the others nothing passes")),
        ("gqa", 4, (8, 1, True, "one device's share of 8 x 1, without the collectives")),
    ],
)
def test_as_much_of_the_mesh_runs_as_there_are_devices(variant, n_devices, runs):
    where = place(variant, model_config(variant), n_devices, split_heads=True)
    layer = {"variant": variant, "tensor": where.tensor, "data": where.data, "share": where.share}
    assert (where.tensor, where.data, where.share, what_ran(layer)) == runs


@pytest.mark.parametrize(
    ("variant", "data", "share", "batch"),
    [("mla", 1, False, 16), ("mla", 8, False, 128), ("mlra_4", 1, True, 64), ("gqa", 1, True, 128)],
)
def test_tokens_are_those_of_the_whole_batch_however_much_of_it_ran(variant, data, share, batch):
    layer = {"variant": variant, "data": data, "share": share, "batch": batch, "us": 200.0}
    assert tokens_per_ms(layer) == 128 / 0.2


@pytest.mark.smoke
def test_the_command_writes_table_and_figure_that_can_be_drawn_again(
    few_layers, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(paper_throughput, "BATCH", 16)
    options = ["--size", "tiny", "--cases", "gla_2", "--contexts", "256", "--runs", "1"]
    assert paper_throughput.main([*options, "--out", str(tmp_path)]) == 0
    stem = tmp_path / "paper_throughput_cpu"
    record = json.loads(stem.with_suffix(".json").read_text())
    ran = [(r["variant"], r["tensor"], r["data"], r["heads"], r["batch"]) for r in record["layers"]]
    assert ran == [("gla_2", 2, 4, "split", 16)]
    page = stem.with_suffix(".md").read_text()
    assert "GLA-2: all 8 devices; query heads split" in page
    assert stem.with_suffix(".png").stat().st_size > 10_000
    stem.with_suffix(".png").unlink()
    assert paper_throughput.main(["--redraw", str(stem.with_suffix(".json"))]) == 0
    assert stem.with_suffix(".png").exists()
    assert "| 256 | " in capsys.readouterr().out
