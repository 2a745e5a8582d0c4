"""Safetensors files, one tensor at a time."""

import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlra_jax.convert import LazyTensor, open_safetensors, write_safetensors

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


def test_tensors_are_written_one_at_a_time(tmp_path):
    alive = []

    def read(i):
        assert not alive, "the tensor before is still in memory"
        array = np.full(1000, i, np.float32)
        alive.append(i)
        weakref.finalize(array, alive.clear)
        return array

    lazy = {str(i): LazyTensor((1000,), np.dtype(np.float32), lambda i=i: read(i)) for i in range(3)}
    write_safetensors(tmp_path / "w.safetensors", lazy)
    assert load_file(tmp_path / "w.safetensors")["2"][0] == 2


def test_a_folder_gives_the_tensors_of_all_its_files(tmp_path):
    save_file({"a": TENSORS["a.b"]}, tmp_path / "model-1.safetensors")
    save_file({"b": TENSORS["half"]}, tmp_path / "model-2.safetensors")
    assert set(open_safetensors(tmp_path)) == {"a", "b"}
    save_file({"b": TENSORS["half"]}, tmp_path / "model-3.safetensors")
    with pytest.raises(ValueError, match=r"model-3.safetensors holds b, which another file"):
        open_safetensors(tmp_path)


def test_a_failure_while_writing_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"a": np.ones(3, np.float32)})

    def fail():
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        write_safetensors(path, {"a": LazyTensor((3,), np.dtype(np.float32), fail)})
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    assert load_file(path)["a"].tolist() == [1, 1, 1]


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No file .*w.safetensors; .*safetensors format"):
        open_safetensors(tmp_path / "w.safetensors")
    with pytest.raises(FileNotFoundError, match=r"No \*.safetensors file in the folder"):
        open_safetensors(tmp_path)
    whole = tmp_path / "w.safetensors"
    write_safetensors(whole, TENSORS)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cut.safetensors is not a whole safetensors file"):
        open_safetensors(tmp_path / "cut.safetensors")
    save_file({"ids": np.arange(3)}, tmp_path / "ids.safetensors")
    with pytest.raises(ValueError, match=r"ids is of type I64; expected one of F64, F32, F16, BF16"):
        open_safetensors(tmp_path / "ids.safetensors")
