"""Writes what `torch.save(state_dict)` writes, without PyTorch."""

import zipfile

import numpy as np

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


def _global(module, name):
    return f"c{module}\n{name}\n".encode()


def _integer(n):
    return b"J" + int(n).to_bytes(4, "little", signed=True)


def _string(text):
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


def _tuple(*items):
    return b"(" + b"".join(items) + b"t"


def pickled(items):
    """The pickle of a dictionary, from its keys and the pickled values."""
    return b"\x80\x02}(" + b"".join(_string(name) + value for name, value in items.items()) + b"u."


def tensor(key, dtype, size, shape, strides, offset=0):
    """The pickle of a tensor in the storage `key` of `size` elements."""
    storage = _tuple(
        _string("storage"),
        _global("torch", _STORAGES[str(dtype)]),
        _string(key),
        _string("cpu"),
        _integer(size),
    )
    sizes = (_tuple(*map(_integer, numbers)) for numbers in (shape, strides))
    hooks = _global("collections", "OrderedDict") + b")R"
    arguments = _tuple(storage + b"Q", _integer(offset), *sizes, b"\x89", hooks)
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def write_archive(path, pickle, storages, *, byteorder="little", compression=zipfile.ZIP_STORED):
    """The zip archive around a pickle and the bytes of storages."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/byteorder", byteorder)
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)


def write_torch(path, tensors):
    """A state dict with these arrays, in the order of their bytes; those of equal identity share a storage."""
    arrays = {str(id(array)): np.ascontiguousarray(array) for array in tensors.values()}
    strides = lambda a: [s // a.itemsize for s in a.strides]
    items = {
        name: tensor(k, a.dtype, a.size, a.shape, strides(a))
        for name, (k, a) in ((name, (str(id(t)), arrays[str(id(t))])) for name, t in tensors.items())
    }
    write_archive(path, pickled(items), {key: array.tobytes() for key, array in arrays.items()})
