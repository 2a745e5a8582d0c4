"""State dicts in PyTorch's format, read without PyTorch."""

import pickle
import subprocess
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from mlra_jax.convert import open_torch, open_weights
from tests.convert.torch_writer import pickled, tensor, write_archive, write_torch

BASE = np.arange(24, dtype=np.float32).reshape(4, 6)
LOW = np.arange(10).astype(jnp.bfloat16)


def test_a_file_that_pytorch_wrote_gives_its_tensors(repository):
    # By PyTorch 2.13: views of one storage, two names of one tensor, a torch.nn.Parameter, the metadata of a module.
    read = open_torch(repository / "tests/convert/torch_2_13.bin")
    expected = {
        "base": BASE,
        "transposed": BASE.T,
        "column": BASE[1:, 2],
        "strided": BASE[::2, 1::2],
        "expanded": np.zeros(5, np.float32),
        "tied.a": LOW,
        "tied.b": LOW,
        "half": np.array([1.5, -2, 65504], np.float16),
        "double": np.array(3.5),
        "parameter": np.array([[7, 8]], np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    assert list(read) == list(expected)
    for name, array in expected.items():
        assert (read[name].shape, read[name].dtype) == (array.shape, array.dtype), name
        np.testing.assert_array_equal(np.asarray(read[name]), array, err_msg=name)


def test_only_the_part_of_a_storage_that_a_tensor_needs_is_read(tmp_path, monkeypatch):
    big = np.arange(1000, dtype=np.float32)
    view = tensor("0", "float32", 1000, (2, 3), (10, 2), offset=500)
    write_archive(tmp_path / "w.bin", pickled({"a": view}), {"0": big.tobytes()})
    counts = []
    real = np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda f, t, n, **k: (counts.append(n), real(f, t, n, **k))[1])
    array = np.asarray(open_torch(tmp_path / "w.bin")["a"])
    np.testing.assert_array_equal(array, [[500, 502, 504], [510, 512, 514]])
    assert counts == [15 * 4]


class Evil:
    def __reduce__(self):
        return subprocess.call, ("false",)


def test_nothing_in_a_file_is_run(tmp_path):
    path = tmp_path / "w.bin"
    asking = {
        "builtins.exec": b"cbuiltins\nexec\n(X\x01\x00\x00\x001tR",
        "os.system": b"cos\nsystem\n(X\x04\x00\x00\x00truetR",
        "torch.load": b"ctorch\nload\n",
        "torch._utils._rebuild_sparse_tensor": b"ctorch._utils\n_rebuild_sparse_tensor\n",
        "subprocess.call": pickle.dumps(Evil(), 2, fix_imports=False)[2:-1],
    }
    for name, code in asking.items():
        write_archive(path, pickled({"a": code}), {})
        with pytest.raises(ValueError, match=rf"cannot be read as weights: it asks for {name}, .*not run"):
            open_torch(path)
    # Nor can the functions that are known be changed: BUILD sets attributes of what lies below it.
    for target in (
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch\nFloatStorage\n",
        b"ccollections\nOrderedDict\n",
    ):
        for state in (b"}X\x04\x00\x00\x00callK\x01s", b"N}X\x04\x00\x00\x00callK\x01s\x86"):
            write_archive(path, pickled({"a": target + state + b"b"}), {})
            with pytest.raises(ValueError, match="cannot be read as weights"):
                open_torch(path)


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((11,), (1,), 0),
        ((2,), (1,), 9),
        ((2, 2), (9, 1), 0),
        ((2,), (-1,), 5),
        ((2,), (1,), -1),
        ((2,), (1, 1), 0),
    ],
)
def test_a_tensor_that_leaves_its_storage_is_refused(tmp_path, shape, strides, offset):
    path = tmp_path / "w.bin"
    code = tensor("0", "float32", 10, shape, strides, offset)
    write_archive(path, pickled({"a": code}), {"0": bytes(40)})
    with pytest.raises(ValueError, match="cannot be read as weights"):
        open_torch(path)


def test_what_is_no_whole_file_of_named_tensors_is_refused_with_the_reason(tmp_path):
    path = tmp_path / "pytorch_model.bin"

    def refused(why):
        with pytest.raises(ValueError, match=why) as error:
            open_weights(path)
        assert str(path) in str(error.value)

    one = tensor("0", "float32", 10, (10,), (1,))
    with pytest.raises(FileNotFoundError, match=r"No file .*pytorch_model.bin"):
        open_torch(path)
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2))  # how torch.save began before 1.6
    refused(r"not in the zip format that torch.save has written since PyTorch 1.6; load it and save it again")
    write_torch(path, {"a": BASE})
    path.write_bytes(path.read_bytes()[:-30])
    refused("is cut: the end of the file is missing")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello", "world")
    refused("must hold one data.pkl")
    write_archive(path, pickled({"a": one}), {"0": bytes(39)})
    refused("archive/data/0 is shorter than its tensors")
    write_archive(path, pickled({"a": one}), {})
    refused("no item named 'archive/data/0'")
    write_archive(path, pickled({"a": one}), {"0": bytes(40)}, byteorder="big")
    refused("big-endian")
    write_archive(path, pickled({"a": one}), {"0": bytes(40)}, compression=zipfile.ZIP_DEFLATED)
    refused("archive/data/0 is compressed")
    write_archive(path, pickled({"model": b"}", "step": b"K\x03"}), {})
    refused(r"holds more than tensors \(model, step\); save the model's state_dict\(\) alone")
    write_archive(path, b"\x80\x02" + one + b".", {"0": bytes(40)})
    refused("holds one tensor; it must hold a dictionary of tensors")
    write_archive(path, b"\x80\x02}", {})
    refused("cannot be read as weights")
