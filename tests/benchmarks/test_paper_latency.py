"""The paper's latency figure: measured anywhere, and drawn again from what was measured."""

import json

import pytest

from benchmarks import decode_attention, paper_latency
from benchmarks.paper import LATENCY_US
from mlra_jax.ops.decode.arg_specs import BENCHMARKS, SHARES


@pytest.fixture(autouse=True)
def few_calls(monkeypatch):
    """Programs of two calls."""
    monkeypatch.setattr(decode_attention, "PROGRAM_US", 0.0)


def test_the_shares_are_as_wide_as_the_paper_s_bandwidth_says():
    widths = {v: BENCHMARKS[f"{v} 1x2M"].cache_bytes / 2**22 for v in LATENCY_US}
    assert widths == {"gqa": 256, "mla": 576, "gla_2": 320, "mlra_4": 192}
    for variant, width in widths.items():  # at 2 M tokens the paper's kernels read 2.6 to 2.8 TB/s
        assert 2.6e12 < width * 2**22 / (LATENCY_US[variant][2**21] * 1e-6) < 2.8e12


@pytest.mark.smoke
def test_a_run_writes_times_table_and_figure_that_can_be_drawn_again(tmp_path, capsys):
    argv = ["--cases", "gqa", "mlra_4", "--lengths", "128", "--runs", "2", "--out", str(tmp_path)]
    argv += ["--page", "64", "--implementation", "xla"]
    assert paper_latency.main(argv) == 0
    stem = tmp_path / "paper_latency_cpu"
    record = json.loads(stem.with_suffix(".json").read_text())
    assert [row["case"] for row in record["rows"]] == ["gqa 1x128", "mlra_4 1x128"]
    assert record["command"].startswith("python -m benchmarks.paper_latency --cases gqa mlra_4 ")
    us = {v: row["timing"]["us"] for v, row in zip(("gqa", "mlra_4"), record["rows"], strict=True)}
    assert paper_latency.points(record) == {
        "gqa": {128: us["gqa"]}, "mla": {}, "gla_2": {}, "mlra_4": {128: us["mlra_4"]},
    }  # fmt: skip
    assert "| 128 | " in stem.with_suffix(".md").read_text()
    assert stem.with_suffix(".png").stat().st_size > 10_000
    stem.with_suffix(".png").unlink()
    assert paper_latency.main(["--redraw", str(stem.with_suffix(".json"))]) == 0
    assert stem.with_suffix(".png").exists()
    assert "| 128 | " in capsys.readouterr().out


def test_the_committed_measurement_of_decode_attention_can_be_drawn(repository, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(paper_latency, "draw", lambda path, panels, **text: drawn.append((panels, text)))
    results = repository / "benchmarks" / "results" / "decode_attention_nvidia_h100_80gb_hbm3.json"
    assert paper_latency.main(["--redraw", str(results), "--figure", str(tmp_path / "a.png")]) == 0
    [(panels, text)] = drawn
    [lines] = panels.values()
    by_label = {line.label: line for line in lines}
    assert set(by_label["MLRA-4, here"].points) == set(LATENCY_US["mlra_4"])
    assert by_label["MLRA-4, paper"].points == LATENCY_US["mlra_4"]
    assert by_label["MLRA-4, paper"].faint
    assert not by_label["MLRA-4, here"].faint
    assert "H100" in text["note"]
    assert "the paper's points" in text["note"]


def test_the_ratios_of_the_table_are_the_paper_s_time_over_ours_and_mla_s_over_mlra_4_s():
    row = lambda case, us: {"case": case, "timing": {"us": us}}
    [_, _, line] = paper_latency.table({"rows": [row("mla 1x2M", 437.1), row("mlra_4 1x2M", 308.2)]})
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == "2M"
    assert cells[4:7] == ["437.1", "874.2", "2.00"]
    assert cells[-2:] == ["1.42", "2.84"]


@pytest.mark.parametrize(
    ("name", "lengths"),
    [("mla 3x20000", (20000,) * 3), ("gqa 1x2K", (2048,)), ("mlra_4 all heads 1x1M", (2**20,))],
)
def test_a_share_can_be_measured_at_any_size(name, lengths):
    case = decode_attention.find_case(name)
    assert case.lengths == lengths
    assert case.width == SHARES[name.rpartition(" ")[0]].width
    assert decode_attention.select([name], quick=False) == [name]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lengths", "2G"], "'2G' is not a number of tokens such as 128K or 2M"),
        (
            ["--redraw", "nowhere.json"],
            "nowhere.json cannot be drawn; it must be what this command has written",
        ),
        (["--runs", "0"], "--runs must be at least 1"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence(argv, message, capsys):
    with pytest.raises(SystemExit):
        paper_latency.main(argv)
    assert message in capsys.readouterr().err
