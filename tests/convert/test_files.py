"""Files of weights: whole, in several parts, broken."""

import errno
import json
import resource
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlra_jax.convert import LazyTensor, open_safetensors, open_weights, write_safetensors, write_weights
from tests.convert.torch_writer import write_torch

RNG = np.random.default_rng(0)
TENSORS = {
    "a.b": RNG.standard_normal((3, 5)).astype(np.float32),
    "low": RNG.standard_normal((2, 2, 3)).astype(jnp.bfloat16),
    "half": RNG.standard_normal(7).astype(np.float16),
    "scalar": np.array(3.5),
    "empty": np.zeros((0, 4), np.float32),
    "transposed": RNG.standard_normal((4, 3)).astype(np.float32).T,
}


def test_what_is_written_is_what_the_official_library_and_we_read(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", TENSORS)
    ours, official = open_safetensors(tmp_path / "w.safetensors"), load_file(tmp_path / "w.safetensors")
    assert set(ours) == set(official) == set(TENSORS)
    for name, tensor in TENSORS.items():
        for read in (np.asarray(ours[name]), official[name]):
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert read.tobytes() == tensor.tobytes()
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_files_are_written_one_at_a_time(tmp_path):
    alive = []

    def read(i):
        assert len(alive) < 2, "the file before is still in memory"
        array = np.full(1000, i, np.float32)
        alive.append(i)
        weakref.finalize(array, alive.remove, i)
        return array

    lazy = {str(i): LazyTensor((1000,), np.dtype(np.float32), lambda i=i: read(i)) for i in range(5)}
    write_weights(tmp_path, lazy, max_file_bytes=8000)
    assert [np.asarray(t)[0] for t in open_weights(tmp_path).values()] == [0, 1, 2, 3, 4]


def test_a_folder_gives_the_tensors_of_all_its_files(tmp_path):
    save_file({"a": TENSORS["a.b"]}, tmp_path / "model-1.safetensors")
    save_file({"b": TENSORS["half"]}, tmp_path / "model-2.safetensors")
    assert set(open_weights(tmp_path)) == {"a", "b"}
    save_file({"b": TENSORS["half"]}, tmp_path / "model-3.safetensors")
    with pytest.raises(ValueError, match=r"model-3.safetensors holds b, which another file"):
        open_weights(tmp_path)


def test_a_folder_in_pytorchs_format_gives_its_weights_alone(tmp_path):
    write_torch(tmp_path / "pytorch_model-00001-of-00002.bin", {"a": TENSORS["a.b"]})
    write_torch(tmp_path / "pytorch_model-00002-of-00002.bin", {"b": TENSORS["low"]})
    (tmp_path / "optimizer.pt").write_bytes(b"anything")
    (tmp_path / "training_args.bin").write_bytes(b"anything")
    read = open_weights(tmp_path)
    assert {name: np.asarray(t).tobytes() for name, t in read.items()} == {
        "a": TENSORS["a.b"].tobytes(),
        "b": TENSORS["low"].tobytes(),
    }
    save_file({"c": TENSORS["half"]}, tmp_path / "model.safetensors")
    assert set(open_weights(tmp_path)) == {"c"}  # the same weights once more, in the format without code


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_the_files_that_an_index_lists_are_read_and_must_hold_what_it_says(tmp_path, kind):
    stem, suffix = kind.split(".")
    write = save_file if suffix == "safetensors" else (lambda tensors, path: write_torch(path, tensors))
    names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    index = tmp_path / f"{kind}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    with pytest.raises(
        FileNotFoundError, match=rf"lacks files that {index.name} lists: {names[0]}, {names[1]}"
    ):
        open_weights(tmp_path)
    write({"a": TENSORS["a.b"]}, tmp_path / names[0])
    write({"b": TENSORS["half"]}, tmp_path / names[1])
    write({"b": TENSORS["half"]}, tmp_path / f"{stem}-old.{suffix}")
    assert set(open_weights(tmp_path)) == {"a", "b"}
    listed = {"weight_map": {"a": names[1], "b": names[1], "c": names[0]}}
    index.write_text(json.dumps(listed), encoding="utf-8-sig")
    with pytest.raises(ValueError, match="do not hold what its index lists") as error:
        open_weights(tmp_path)
    assert str(error.value).splitlines()[1:] == [
        f"  - a: listed in {names[1]}, found in {names[0]}",
        f"  - c: listed in {names[0]}, found in none",
    ]
    index.write_text("[]")
    with pytest.raises(ValueError, match="is not an index of weights"):
        open_weights(tmp_path)


def test_weights_above_a_size_are_cut_into_files_with_an_index(tmp_path):
    tensors = {
        name: np.full(n, n, np.float32) for name, n in (("a", 5), ("b", 5), ("c", 30), ("d", 1), ("e", 8))
    }
    write_weights(tmp_path, tensors, max_file_bytes=40)
    assert [(p.name, sorted(load_file(p))) for p in sorted(tmp_path.glob("*.safetensors"))] == [
        ("model-00001-of-00003.safetensors", ["a", "b"]),
        ("model-00002-of-00003.safetensors", ["c"]),  # larger by itself
        ("model-00003-of-00003.safetensors", ["d", "e"]),
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 49
    read = open_weights(tmp_path)
    assert {name: np.asarray(t).tobytes() for name, t in read.items()} == {
        k: t.tobytes() for k, t in tensors.items()
    }


def test_a_failure_while_writing_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"a": np.ones(3, np.float32)})

    def fail():
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        write_safetensors(path, {"a": LazyTensor((3,), np.dtype(np.float32), fail)})
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    assert load_file(path)["a"].tolist() == [1, 1, 1]


def test_a_disk_that_takes_no_more_is_an_error_that_names_the_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"w\.safetensors") as error:
            write_safetensors(tmp_path / "w.safetensors", {"a": np.ones(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No file .*w.safetensors"):
        open_safetensors(tmp_path / "w.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"No \*.safetensors and no pytorch_model\*.bin file in the folder"
    ):
        open_weights(tmp_path)
    whole = tmp_path / "w.safetensors"
    write_safetensors(whole, TENSORS)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cut.safetensors is not a whole safetensors file"):
        open_safetensors(tmp_path / "cut.safetensors")
    save_file({"ids": np.arange(3)}, tmp_path / "ids.safetensors")
    with pytest.raises(ValueError, match=r"ids is of type I64; expected one of F64, F32, F16, BF16"):
        open_safetensors(tmp_path / "ids.safetensors")
