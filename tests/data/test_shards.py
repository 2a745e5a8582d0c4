"""The shard format: what is written is read back, and what is broken is named and refused."""

import functools
import json
import re
import sys
import zlib

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax.data.shards import (
    HEADER_BYTES,
    DataError,
    ShardWriter,
    header_fault,
    open_files,
    open_shards,
    without_tokenizer,
)


def write(folder, tokens, split="train", shard_tokens=10**8, name="text"):
    with ShardWriter(folder, name, split, shard_tokens) as writer:
        writer.write(np.asarray(tokens))
    return writer.paths


@pytest.fixture
def bucket():
    """A folder in fsspec's bucket in memory, and a function that copies files into it."""
    fs = fsspec.filesystem("memory")
    fs.makedirs("/shards")

    def put(paths):
        for path in paths:
            fs.pipe_file(f"/shards/{path.name}", path.read_bytes())
        return "memory://shards"

    yield put
    fs.rm("/shards", recursive=True)


@settings(max_examples=30, deadline=None)
@given(
    pieces=st.lists(st.lists(st.integers(0, 65535), max_size=9), max_size=6), shard_tokens=st.integers(1, 12)
)
def test_any_stream_of_tokens_is_read_back_from_shards_of_the_asked_size(
    tmp_path_factory, pieces, shard_tokens
):
    folder = tmp_path_factory.mktemp("shards")
    everything = [i for piece in pieces for i in piece]
    with ShardWriter(folder, "x", "train", shard_tokens) as writer:
        for piece in pieces:
            writer.write(np.array(piece, np.int32))
    assert writer.n_tokens == len(everything)
    if not everything:
        assert not list(folder.iterdir())
        return
    shards = open_shards(str(folder), "train")
    assert all(n == shard_tokens for n in shards.n_tokens[:-1])
    assert 0 < shards.n_tokens[-1] <= shard_tokens
    read = [shards.read([(s, 0)], n)[0] for s, n in enumerate(shards.n_tokens)]
    assert np.concatenate(read).tolist() == everything


def test_file_is_256_int32_of_header_and_then_uint16_all_little_endian(tmp_path):
    (path,) = write(tmp_path, [1, 2, 65535])
    data = path.read_bytes()
    header = np.zeros(256, "<i4")
    tokens = np.array([1, 2, 65535], "<u2").tobytes()
    header[:4] = 20240520, 1, 3, 1
    header.view("<u4")[4] = zlib.crc32(tokens)
    assert data == header.tobytes() + tokens


def test_one_flipped_bit_of_a_token_is_found_where_asked_and_every_such_shard_is_named(tmp_path, bucket):
    paths = write(tmp_path, np.arange(30), shard_tokens=6)
    folders = str(tmp_path), bucket(paths)
    for path in paths[1], paths[3]:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    open_shards(str(tmp_path), "train")
    open_shards(folders[1], "train", verify=True)  # copied before
    bucket(paths)
    for folder in folders:
        with pytest.raises(DataError) as error:
            open_shards(folder, "train", verify=True)
        assert [fault.split(" is corrupted: ")[0][-10:] for fault in error.value.faults] == [
            "000002.bin",
            "000004.bin",
        ]


def test_a_shard_of_another_writer_without_a_checksum_is_taken_as_it_is(tmp_path):
    (path,) = write(tmp_path, [1, 2, 3])
    data = bytearray(path.read_bytes())
    data[12:20] = bytes(8)
    path.write_bytes(data)
    assert open_shards(str(tmp_path), "train", verify=True).n_tokens == [3]


def test_shards_tell_their_tokenizer_and_another_one_is_refused(tmp_path, bucket, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    for name, tokenizer in (("a", ""), ("b", "byte"), ("c", "byte")):
        with ShardWriter("shards", name, "train", tokenizer=tokenizer) as writer:
            writer.write(np.array([1, 2, 3]))
    paths = sorted((tmp_path / "shards").iterdir())
    assert without_tokenizer(paths[1].read_bytes()) == paths[0].read_bytes() != paths[1].read_bytes()
    remote = bucket(paths)
    for folder in ("shards", remote):
        assert open_shards(folder, "train", verify=True, tokenizer="byte").n_tokens == [3, 3, 3]
        for opened in (open_files, functools.partial(open_shards, split="train")):
            with pytest.raises(DataError) as error:
                opened(folder, tokenizer="gpt2")
            assert re.search(
                r"b_train_000001.bin and 1 more were made with the tokenizer byte \(vocabulary 394ecf8e\), "
                r"not with gpt2 \(vocabulary 08f8f6dd\); name that tokenizer, or make shards with mlra-prepare",
                str(error.value),
            )
        assert open_files(f"{folder}/a_train_000001.bin", tokenizer="gpt2").n_tokens == [
            3
        ]  # it does not tell

    # One that is not on this machine is compared by name: training from shards needs no tokenizer.
    tokens = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "</s>", "special": True}]}
    (tmp_path / "own.json").write_text(json.dumps(tokens))
    with ShardWriter("shards", "d", "val", tokenizer="own.json") as writer:
        writer.write(np.array([0, 1]))
    (tmp_path / "own.json").unlink()
    assert open_shards("shards", "val", tokenizer="elsewhere/own.json").n_tokens == [2]
    with pytest.raises(DataError, match=r"not with other.json, which cannot be read here; name"):
        open_shards("shards", "val", tokenizer="other.json")


def test_validation_is_numbered_from_0_and_training_from_1(tmp_path):
    names = [p.name for p in write(tmp_path, [1] * 5, "val", 3) + write(tmp_path, [1] * 5, "train", 3)]
    assert names == [
        "text_val_000000.bin",
        "text_val_000001.bin",
        "text_train_000001.bin",
        "text_train_000002.bin",
    ]
    assert sum(open_shards(str(tmp_path), "val").n_tokens) == 5


def test_an_interrupted_writer_leaves_no_shard_that_looks_whole(tmp_path):
    def interrupted():
        with ShardWriter(tmp_path, "x", "train", 4) as writer:
            writer.write(np.arange(6))
            assert [p.name for p in sorted(tmp_path.iterdir())] == [
                "x_train_000001.bin",
            ]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["x_train_000001.bin"]
    assert open_shards(str(tmp_path), "train").n_tokens == [4]


@pytest.mark.parametrize("bad", [-1, 65536])
def test_ids_beyond_16_bits_are_refused(tmp_path, bad):
    with pytest.raises(DataError, match="16-bit ids"):
        write(tmp_path, [0, bad])


def test_all_broken_shards_are_named_at_once(tmp_path, bucket):
    paths = write(tmp_path, range(60), shard_tokens=10)
    whole = paths[0].read_bytes()
    paths[1].write_bytes(whole[:-6])  # truncated tokens
    paths[2].write_bytes(whole[: HEADER_BYTES - 1])  # truncated header
    paths[3].write_bytes(b"\1" + whole[1:])  # magic
    paths[4].write_bytes(whole[:4] + b"\2" + whole[5:])  # version
    paths[5].write_bytes(whole + b"\0\0")  # longer than promised
    for where in str(tmp_path), bucket(paths):
        with pytest.raises(DataError) as error:
            open_shards(where, "train")
        for fault, name, words in zip(
            error.value.faults,
            ["000002", "000003", "000004", "000005", "000006"],
            [
                "truncated: its header promises 10 tokens, 1,044 bytes, but it has 1,038",
                "broken: 1,023 bytes",
                "not a token shard",
                "has version 2",
                "broken: its header promises 10 tokens",
            ],
            strict=True,
        ):
            assert f"{where}/text_train_{name}.bin" in fault.replace("///", "//")
            assert words in fault


@given(header=st.binary(min_size=0, max_size=HEADER_BYTES), size=st.integers(0, 2**40))
def test_no_random_header_is_accepted(header, size):
    assert header_fault("x", header, size) is not None


def test_local_and_bucket_shards_read_the_same_spans(tmp_path, bucket):
    paths = write(tmp_path, np.random.default_rng(0).integers(0, 65536, 1000), shard_tokens=300)
    spans = [(3, 5), (0, 0), (2, 207), (0, 207)]
    local, remote = open_shards(str(tmp_path), "train"), open_shards(bucket(paths), "train")
    assert list(local.n_tokens) == list(remote.n_tokens) == [300, 300, 300, 100]
    assert local.read(spans, 93).dtype == np.int32
    np.testing.assert_array_equal(local.read(spans, 93), remote.read(spans, 93))
    assert local.read([], 93).shape == remote.read([], 93).shape == (0, 93)
    past_the_end = [(3, 98), (0, 299), (3, 0)]
    np.testing.assert_array_equal(local.read(past_the_end, 101), remote.read(past_the_end, 101))
    assert (local.read(past_the_end, 101) == -1).sum(axis=1).tolist() == [99, 100, 1]


def test_a_file_or_a_folder_of_any_shards_can_be_opened(tmp_path, bucket):
    paths = write(tmp_path, [1, 2, 3], "val") + write(tmp_path, [4, 5, 6, 7], "train", shard_tokens=3)
    (tmp_path / "readme.txt").write_text("no shard")
    remote = bucket(paths)
    for folder in (str(tmp_path), remote):
        assert sorted(open_files(folder).n_tokens) == [1, 3, 3]
        (n_tokens,) = open_files(f"{folder}/{paths[2].name}").n_tokens
        assert n_tokens == 1
    with pytest.raises(DataError, match=r"no file or folder .*/absent.bin; expected a shard or a folder"):
        open_files(f"{tmp_path}/absent.bin")
    with pytest.raises(DataError, match=r"readme.txt holds no \*.bin shard"):
        open_files(f"{tmp_path}/readme.txt")


def test_a_bucket_shard_that_changes_or_vanishes_is_named(tmp_path, bucket):
    (path,) = write(tmp_path, range(100))
    shards = open_shards(bucket([path]), "train")
    path.write_bytes(path.read_bytes()[:-50])
    bucket([path])
    with pytest.raises(DataError, match=r"text_train_000001.bin, tokens 60 to 100: got 30 bytes"):
        shards.read([(0, 60)], 40)
    fsspec.filesystem("memory").rm("/shards/text_train_000001.bin")
    with pytest.raises(
        DataError, match=r"text_train_000001.bin, tokens 0 to 40 failed with FileNotFoundError"
    ):
        shards.read([(0, 0)], 40)


def test_missing_folder_and_missing_shards_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        open_shards(str(tmp_path / "nowhere"), "train")
    write(tmp_path, [1, 2], "val")
    (tmp_path / "notes_train_1.txt").write_text("no shard")
    with pytest.raises(DataError, match=r"holds no \*_train_\*\.bin shard \(2 other files\).*mlra-prepare"):
        open_shards(str(tmp_path), "train")
    with pytest.raises(DataError, match="no storage called nonsense://"):
        open_shards("nonsense://x", "train")


def test_a_bucket_without_its_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # importing it fails
    with pytest.raises(DataError, match=r"pip install 'mlra_jax\[gcs\]'"):
        open_shards("gs://bucket/folder", "train")
