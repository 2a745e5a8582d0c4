"""mlra-prepare: text in, the same text out of the shards; and what goes wrong is said before anything is written."""

import importlib.util
import itertools
import json
import re
import signal
import subprocess
import sys
import types

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax.cli import prepare
from mlra_jax.config import DataConfig
from mlra_jax.data import EvalBatches, TrainBatches, documents
from mlra_jax.data.documents import text_files
from mlra_jax.data.shards import DataError, ShardWriter, open_shards
from mlra_jax.data.tokenizers import ByteTokenizer


def needs(module):
    found = importlib.util.find_spec(module)
    return pytest.mark.skipif(not found, reason=f"the optional package {module} is not installed")


def read_back(folder, split):
    """The documents of one part, from the tokens on the disk."""
    shards = open_shards(str(folder), split)
    ids = np.concatenate([shards.read([(i, 0)], n)[0] for i, n in enumerate(shards.n_tokens)])
    assert ids[0] == 256  # end of text comes first
    ends = [*np.flatnonzero(ids == 256), len(ids)]
    return [ByteTokenizer().decode(ids[a + 1 : b]) for a, b in itertools.pairwise(ends)]


def run(*argv):
    return prepare.main([str(a) for a in argv])


def fault(capsys, *argv):
    """The message of a run that is refused."""
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def texts(tmp_path):
    """Three files in two folders: documents a, b, c, d in the order of the paths; two as Windows writes them."""
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "1.md").write_bytes("# a\r\nnaïve 🙂\r\n".encode("utf-8-sig"))
    rows = [{"text": "b\r\n", "id": 1}, {"text": " \n"}, {"text": "c"}]
    (folder / "2.jsonl").write_bytes("\r\n".join([*map(json.dumps, rows), "", ""]).encode("utf-8-sig"))
    (folder / "sub" / "3.txt").write_bytes(b"d\n" * 50)
    (folder / "ignored.py").write_text("not text")
    return folder


CONTENT = ["# a\nnaïve 🙂\n", "b\r\n", "c", "d\n" * 50]  # what a JSON string says, it means


def test_shards_read_back_as_the_documents_in_order_of_path(texts, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(texts, "--out", out, "--val-fraction", 0, "--shard-tokens", 16, "--name", "n") == 0
    assert read_back(out, "train") == CONTENT
    n_tokens = sum(len(text.encode()) + 1 for text in CONTENT)
    assert f"{n_tokens} tokens for training, 0 held out" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == [
        f"n_train_{i + 1:06d}.bin" for i in range(-(-n_tokens // 16))
    ]
    assert [p.name for p in tmp_path.iterdir() if p != texts] == ["out"]


def test_tails_hold_out_the_end_of_every_document_and_lose_nothing(texts, tmp_path):
    run(texts, "--out", tmp_path / "out", "--val-fraction", 0.25)
    train, val = (read_back(tmp_path / "out", split) for split in ("train", "val"))
    assert train[-1] + val[-1] == CONTENT[-1]
    assert val[-1] == "d\n" * 13  # the cut falls on a line break
    assert "".join(sorted("".join(train + val))) == "".join(sorted("".join(CONTENT)))


def test_a_hundred_documents_are_held_out_whole_whatever_their_order(tmp_path):
    rows = [json.dumps({"body": f"document {i}"}) for i in range(300)]
    parts = []
    for i, lines in enumerate((rows, rows[::-1])):
        path = tmp_path / f"{i}.jsonl"
        path.write_text("\n".join(lines))
        run(path, "--out", tmp_path / f"out{i}", "--text-field", "body", "--val-fraction", 0.2)
        parts.append({split: read_back(tmp_path / f"out{i}", split) for split in ("train", "val")})
    assert sorted(parts[0]["train"] + parts[0]["val"]) == sorted(f"document {i}" for i in range(300))
    assert 30 < len(parts[0]["val"]) < 90
    assert set(parts[0]["val"]) == set(parts[1]["val"])


@given(
    text=st.text(min_size=1),
    holdout=st.sampled_from(["documents", "tails"]),
    fraction=st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=200)
def test_splitting_a_document_loses_nothing(text, holdout, fraction):
    train, val = prepare.split_document(text, holdout, fraction)
    assert train + val == text
    if holdout == "documents":
        assert not train or not val
    if not fraction:
        assert not val


def test_what_is_prepared_is_what_training_reads(texts, tmp_path):
    run(texts, "--out", tmp_path / "out")
    config = DataConfig(path=str(tmp_path / "out"), seq_len=8, global_batch=2, order="sequential")
    rows = TrainBatches(config, 257, seed=0).rows(0)
    assert rows[0].tolist() == [256, *CONTENT[0].encode()][:9]
    assert EvalBatches.held_out(config, 257, 100).n_sequences >= 1


@needs("tokenizers")
def test_a_tokenizer_made_for_training_cuts_and_pads_nothing(texts, tmp_path):
    import tokenizers as library

    trained = library.ByteLevelBPETokenizer()
    trained.train_from_iterator(CONTENT, vocab_size=300, special_tokens=["</s>", "<s>"], show_progress=False)
    trained.save(str(tmp_path / "plain.json"))
    trained.enable_truncation(8)
    trained.enable_padding(length=16)
    trained.save(str(tmp_path / "training.json"))
    contents = []
    for name in ("plain", "training"):
        run(texts, "--out", tmp_path / name, "--tokenizer", tmp_path / f"{name}.json", "--val-fraction", 0)
        (shard,) = (tmp_path / name).iterdir()
        contents.append(shard.read_bytes()[1024:])
    assert contents[0] == contents[1]


def test_shards_are_refused_with_another_tokenizer_than_prepared_them(texts, tmp_path):
    run(texts, "--out", tmp_path / "out")
    config = DataConfig(path=str(tmp_path / "out"), seq_len=8, global_batch=2, tokenizer="gpt2")
    words = r"text_train_000001.bin was made with the tokenizer byte \(vocabulary 394ecf8e\), not with gpt2 \(vocab"
    with pytest.raises(DataError, match=words):
        TrainBatches(config, 50304, seed=0)
    with pytest.raises(DataError, match=r"text_val_000000.bin was made with the tokenizer byte"):
        EvalBatches.held_out(config, 50304, 1)


def test_an_existing_folder_is_kept_unless_told_otherwise(texts, tmp_path, capsys):
    out = tmp_path / "out"
    run(texts, "--out", out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert "--overwrite" in fault(capsys, texts / "2.jsonl", "--out", out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert run(texts / "2.jsonl", "--out", out, "--overwrite", "--val-fraction", 0) == 0
    assert read_back(out, "train") == CONTENT[1:3]
    (out / "thesis.tex").write_text("precious")
    assert "holds more than shards" in fault(capsys, texts, "--out", out, "--overwrite")
    assert (out / "thesis.tex").exists()


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A folder of files that are cut into a dozen chunks, and the shards that one process makes of them."""
    monkeypatch.setattr(documents, "CHUNK_BYTES", 1000)
    folder = tmp_path / "many"
    folder.mkdir()
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, 8))) for _ in range(100)]
    for i in range(3):
        rows = [{"text": " ".join(rng.choice(words, rng.integers(1, 20)))} for _ in range(40)]
        (folder / f"{i}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        (folder / f"{i}.txt").write_text("ü\n" * 700)
    run(folder, "--out", tmp_path / "one", *MANY, "--workers", 1)
    shards = contents(tmp_path / "one")
    assert len(shards) > 10
    assert len(documents.chunks_of(text_files([str(folder)]))) > 12
    return folder, shards


MANY = ("--shard-tokens", 1000)


def test_wherever_a_file_is_cut_each_of_its_lines_is_read_once_and_named_by_its_number(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"line {i}"}) for i in range(8)) + "\n\n[]\n")
    for size in range(1, path.stat().st_size + 2):
        read, faults = [], []
        for chunk in documents.chunks_of([path], size):
            try:
                for text, _ in chunk.documents("text"):
                    read.append(text)
            except DataError as error:
                faults.append(str(error).split(": no text")[0])
        assert read == [f"line {i}" for i in range(8)]
        assert faults == [f"{path}, line 10"]


@pytest.mark.parametrize("workers", [2, 3])
def test_shards_do_not_depend_on_the_number_of_processes(many, tmp_path, workers, capsys):
    folder, shards = many
    run(folder, "--out", tmp_path / "out", *MANY, "--workers", workers)
    assert contents(tmp_path / "out") == shards
    said = capsys.readouterr().err
    assert re.search(
        r"123 documents, [\d.]+kB of text; to make are about [\d,]+ tokens, [\d.]+kB on disk of ", said
    )
    assert re.search(rf" that are free. With {workers} process\(es\) that takes about \d\d:\d\d\.", said)


def test_a_preparation_killed_at_any_moment_goes_on_to_the_same_bytes_and_keeps_its_shards(
    many, tmp_path, monkeypatch, capsys
):
    """Killed by SIGKILL, with two processes at work, as the third shard has been written but not been recorded."""
    folder, shards = many
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    argv = [str(a) for a in (folder, "--out", out, *MANY)]
    script = f"""
import os, signal
from mlra_jax.cli import prepare
from mlra_jax.data import documents, shards
def main():
    documents.CHUNK_BYTES = 1000
    write, count = shards.write_whole, iter(range(100))
    def killed(path, content):
        write(path, content)
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    shards.write_whole = killed
    prepare.main({argv!r} + ["--workers", "2"])
if __name__ == "__main__":
    main()
"""
    (tmp_path / "killed.py").write_text(script)
    ended = subprocess.run([sys.executable, tmp_path / "killed.py"], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not out.exists()
    assert sorted(n.suffix for n in partial.iterdir()) == [".bin"] * 3 + [".unfinished"]
    with pytest.raises(
        DataError, match=r"out.partial is not finished: .* has still to make part 1/1 of it; the same"
    ):
        open_shards(str(partial), "train")
    kept = {p.name: (p.stat().st_ino, p.read_bytes()) for p in partial.glob("*_train_00000[12].bin")}

    assert (
        "out.partial was begun with other options: shard_tokens (was 1000), input files. Give the same"
        in fault(capsys, folder / "0.txt", "--out", out, "--shard-tokens", 3000)
    )

    class Again(Exception):
        pass

    def interrupted(*args):
        if args[0].n_shards >= 6:
            raise Again
        return write_shard(*args)

    write_shard = ShardWriter._write_shard
    with monkeypatch.context() as patch:  # in the middle once more, with the tokens that are in no shard yet
        patch.setattr(ShardWriter, "_write_shard", interrupted)
        with pytest.raises(Again):
            run(*argv)
    capsys.readouterr()
    assert run(*argv, "--workers", 1) == 0
    assert re.search(r"of text, \d+% of them done; to make are about", capsys.readouterr().err)
    assert contents(out) == shards
    assert {name: (out / name).stat().st_ino for name in kept} == {name: i for name, (i, _) in kept.items()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed.py", "many", "one", "out"]


@pytest.fixture(params=["local", "bucket"])
def target(request, tmp_path):
    """Where shards go: (URL, function that returns its files by name)."""
    if request.param == "local":
        yield str(tmp_path / "target"), lambda: contents(tmp_path / "target")
        return
    fs = fsspec.filesystem("memory")
    yield (
        "memory://target",
        lambda: {p.rpartition("/")[2]: fs.cat_file(p) for p in fs.ls("/target", detail=False)},
    )
    fs.rm("/target", recursive=True)


def test_several_commands_make_parts_of_one_folder_which_is_read_when_all_are_finished(
    many, target, tmp_path, capsys, monkeypatch
):
    folder, shards = many
    out, files = target
    argv = (folder, "--out", out, *MANY, "--workers", 1)
    monkeypatch.setattr(ShardWriter, "_write_shard", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*argv, "--part", "1/2")
    monkeypatch.undo()
    monkeypatch.setattr(documents, "CHUNK_BYTES", 1000)
    assert run(*argv, "--part", "2/2") == 0
    assert "Still to be made: part 1/2." in capsys.readouterr().out
    with pytest.raises(
        DataError, match=r"target is not finished: mlra-prepare has still to make part 1/2 of it"
    ):
        open_shards(out, "val")
    assert "is made in 2 part(s); give --part I/2" in fault(capsys, *argv, "--part", "1/3")
    second = files()
    assert run(*argv, "--part", "2/2") == 0
    assert "part 2/2 is finished" in capsys.readouterr().out
    assert run(*argv, "--part", "1/2") == 0
    assert "All 2 parts are finished." in capsys.readouterr().out
    made = {name: data for name, data in files().items() if name.endswith(".bin")}
    assert {int(name[-10:-4]) % 2 for name in made if "_train_" in name} == {0, 1}
    assert all(made[name] == data for name, data in second.items() if name.endswith(".bin"))
    tokens = lambda shards: np.concatenate([np.frombuffer(shard[1024:], "<u2") for shard in shards.values()])
    np.testing.assert_array_equal(np.sort(tokens(made)), np.sort(tokens(shards)))
    assert len(open_shards(out, "train", verify=True, tokenizer="byte").n_tokens) > 2
    assert "another --out" in fault(capsys, folder, "--out", out, *MANY)


def test_one_command_writes_straight_into_a_bucket_the_bytes_that_it_writes_into_a_folder(many, capsys):
    folder, shards = many
    fs = fsspec.filesystem("memory")
    run(folder, "--out", "memory://prepared", *MANY, "--workers", 1)
    try:
        assert {p.rpartition("/")[2]: fs.cat_file(p) for p in fs.ls("/prepared", detail=False)} == shards
        assert "exists; name another --out" in fault(capsys, folder, "--out", "memory://prepared")
    finally:
        fs.rm("/prepared", recursive=True)


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(many, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    said = fault(capsys, many[0], "--out", tmp_path / "out", "--workers", 1)
    assert re.search(r"out: about [\d.]+kB are needed, and 1.00kB are free; make room there", said)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing_behind(texts, tmp_path, monkeypatch, error):
    def interrupted(*_):
        raise error

    monkeypatch.setattr(ByteTokenizer, "encode_batch", interrupted)
    with pytest.raises((error, SystemExit)):
        run(texts, "--out", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["texts"]


def test_what_a_killed_run_left_is_not_taken_for_shards(texts, tmp_path):
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / "old_train_000001.bin").write_bytes(b"half")
    run(texts, "--out", tmp_path / "out", "--val-fraction", 0)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["text_train_000001.bin"]
    assert not left.exists()


def test_what_a_killed_replacement_left_does_not_hinder_the_next_one(texts, tmp_path):
    out, left = tmp_path / "out", tmp_path / "out.replaced"
    for folder in (out, left):
        folder.mkdir()
        (folder / "old_train_000001.bin").write_bytes(b"old")
    run(texts, "--out", out, "--overwrite", "--val-fraction", 0)
    assert [p.name for p in out.iterdir()] == ["text_train_000001.bin"]
    assert not left.exists()


def test_all_unreadable_files_are_named_at_once(texts, tmp_path, capsys):
    (texts / "latin.txt").write_bytes(b"un\ncaf\xe9")
    (texts / "latin.jsonl").write_bytes(b'{"text": "fine"}\n\n{"text": "\xff"}\n')
    (texts / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (texts / "other.jsonl").write_text('{"body": "elsewhere"}\n')
    (texts / "list.jsonl").write_text("[1]\n")
    message = fault(capsys, texts, "--out", tmp_path / "out")
    assert (
        "latin.txt, line 2, byte 4 is not UTF-8 text (unexpected end of data): save it as UTF-8." in message
    )
    assert "latin.jsonl, line 3, byte 11 is not UTF-8 text (invalid start byte)" in message
    assert "broken.jsonl, line 2 is not JSON" in message
    assert "other.jsonl, line 1: no text in the field 'text'; name another with --text-field" in message
    assert "list.jsonl, line 1: no text" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "Name either text files and folders, or one --hf-dataset."),
        (["{tmp}/nowhere"], "There is no file or folder {tmp}/nowhere."),
        (["{tmp}/empty"], "empty holds no .txt, .md, .jsonl file."),
        (["{tmp}/blank.txt"], "hold no text."),
        (
            ["{tmp}/blank.txt", "--val-fraction", "1"],
            "--val-fraction=1.0 must be at least 0 and less than 1.",
        ),
        (["{tmp}/blank.txt", "--shard-tokens", "0"], "--shard-tokens=0 must be"),
        (["{tmp}/blank.txt", "--name", "a/b"], "--name 'a/b' must be a part of a file name."),
        (["{tmp}/blank.txt", "--out", "nonsense://b/x"], "fsspec knows no storage called nonsense://"),
        (["{tmp}/blank.txt", "--part", "3/2"], "--part 3/2 must be I/N, such as 1/4"),
        (["{tmp}/one.txt", "--part", "2/2"], "--part 2/2: there are 1 files; use no more parts."),
        (["{tmp}/blank.txt", "--tokenizer", "gpt9"], "Unknown tokenizer 'gpt9'"),
        (
            ["{tmp}/one.txt", "--holdout", "documents"],
            "Nothing is left for validation with --holdout documents",
        ),
    ],
)
def test_user_errors_are_one_sentence_and_write_nothing(tmp_path, capsys, argv, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "one.txt").write_text("one document")
    before = sorted(tmp_path.iterdir())
    argv = [a.format(tmp=tmp_path) for a in argv]
    if "--out" not in argv:
        argv += ["--out", str(tmp_path / "out")]
    assert words.format(tmp=tmp_path) in fault(capsys, *argv)
    assert sorted(tmp_path.iterdir()) == before


def test_a_vocabulary_beyond_16_bits_is_refused_before_reading(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "n_vocab", 100_000)
    assert "has 100,000 ids; shards hold 16-bit ids" in fault(capsys, texts, "--out", tmp_path / "out")


def test_a_hugging_face_data_set_is_streamed(tmp_path, monkeypatch, capsys):
    asked = {}

    def load_dataset(*args, **kwargs):
        asked.update(kwargs, args=args)
        return iter([{"text": "one"}, {"text": ""}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    argv = ("--hf-dataset", "a/b", "--hf-config", "c", "--val-fraction", 0)
    run(*argv, "--out", tmp_path / "out")
    assert asked == {"args": ("a/b", "c"), "split": "train", "streaming": True}
    assert read_back(tmp_path / "out", "train") == ["one", "two"]
    assert "a/b has no text in the field 'body'; it has ['text']" in fault(
        capsys, *argv, "--text-field", "body", "--out", tmp_path / "out2"
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in fault(capsys, *argv, "--out", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_a_hugging_face_data_set_goes_on_where_it_was_interrupted_and_is_made_in_parts(
    tmp_path, monkeypatch, capsys
):
    class Rows:
        """As `datasets.IterableDataset`: rows in files, and where an iteration stands."""

        def __init__(self, files):
            self.files, self.at, self.read = files, 0, []

        num_shards = property(lambda self: len(self.files))
        shard = lambda self, num_shards, index: Rows(self.files[index::num_shards])
        state_dict = lambda self: {"at": self.at}

        def load_state_dict(self, state):
            self.at = state["at"]

        def __iter__(self):
            rows = [row for file in self.files for row in file]
            while self.at < len(rows):
                self.at += 1
                self.read.append(rows[self.at - 1])
                yield {"text": rows[self.at - 1]}

    made = []

    def load_dataset(*args, **kwargs):
        made.append(Rows([[f"file {i}, row {j}" for j in range(20)] for i in range(2)]))
        return made[-1]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(documents, "_BATCH_CHARACTERS", 30)
    argv = ("--hf-dataset", "a/b", "--shard-tokens", 64, "--workers", 1, "--val-fraction", 0.3)
    run(*argv, "--out", tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    with monkeypatch.context() as patch:
        write_shard = ShardWriter._write_shard
        patch.setattr(
            ShardWriter, "_write_shard", lambda *a: 1 / 0 if a[0].n_shards == 4 else write_shard(*a)
        )
        with pytest.raises(ZeroDivisionError):
            run(*argv, "--out", tmp_path / "out")
    assert run(*argv, "--out", tmp_path / "out") == 0
    assert contents(tmp_path / "out") == whole
    assert made[-1].read[-1] == made[0].read[-1]
    assert 0 < len(made[-1].read) < 30  # not those before

    for i in (1, 2):
        run(*argv, "--out", tmp_path / "parts", "--part", f"{i}/2")
    tokens = lambda out: np.concatenate(
        [
            np.frombuffer(data[1024:], "<u2")
            for name, data in contents(tmp_path / out).items()
            if name.endswith("bin")
        ]
    )
    np.testing.assert_array_equal(np.sort(tokens("parts")), np.sort(tokens("whole")))
    assert "--part 1/3: a/b has 2 files; use no more parts." in fault(
        capsys, *argv, "--out", tmp_path / "three", "--part", "1/3"
    )
