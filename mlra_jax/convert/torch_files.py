"""Reads state dicts that `torch.save` wrote, without PyTorch and without running code in them.

Such a file is a zip archive: `NAME/data.pkl` is a pickle of the dictionary, in which each tensor is a call of a
function that rebuilds it (storage, offset, size, stride), and `NAME/data/KEY` are the storages' bytes, uncompressed. A
pickle may ask for any function of any module; this reader offers only the functions below, which describe tensors.
"""

from __future__ import annotations

import functools
import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np

from mlra_jax.errors import UserError
from mlra_jax.lazy_arrays import LazyTensor

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


# The pickle only gets tuples, so that a crafted one cannot modify them.


class _StorageType(NamedTuple):
    dtype: np.dtype


class _Storage(NamedTuple):
    """The place of a storage's bytes in the file."""

    start: int
    size: int  # elements
    dtype: np.dtype


class _Function(NamedTuple):
    call: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


class _Unpickler(pickle.Unpickler):
    """Resolves the names that state dicts need, and refuses all others."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self._path, self._archive, self._root = path, archive, root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _StorageType(np.dtype(_STORAGES[name]))
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _Function(self._tensor)
        if module == "torch._utils" and name == "_rebuild_parameter":
            return _Function(lambda tensor, *_: tensor)
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which plain tensors do not need and which was not run"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, size = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError(f"it refers to a {kind}")
        entry = self._archive.getinfo(f"{self._root}/data/{key}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError(f"its entry {entry.filename} is compressed")
        if size * storage_type.dtype.itemsize > entry.file_size:
            raise pickle.UnpicklingError(f"its entry {entry.filename} is shorter than its tensors")
        return _Storage(self._start(entry), size, storage_type.dtype)

    def _start(self, entry: zipfile.ZipInfo) -> int:
        """Offset of an entry's content, after its local header, whose last two parts vary in length."""
        with self._path.open("rb") as file:
            file.seek(entry.header_offset)
            header = file.read(30)
        return (
            entry.header_offset
            + 30
            + int.from_bytes(header[26:28], "little")
            + int.from_bytes(header[28:30], "little")
        )

    def _tensor(self, storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> LazyTensor:
        shape, strides = tuple(shape), tuple(strides)
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        legal = all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
        if not legal or not isinstance(storage, _Storage) or (math.prod(shape) > 0 and last >= storage.size):
            raise pickle.UnpicklingError(
                f"a tensor of shape {shape}, strides {strides} and offset {offset} does not lie in its storage"
            )
        start = storage.start + offset * storage.dtype.itemsize
        count = last - offset + 1 if math.prod(shape) else 0
        read = functools.partial(_read, self._path, storage.dtype, start, count, shape, strides)
        return LazyTensor(shape, storage.dtype, read)


def _read(
    path: Path, dtype: np.dtype, start: int, count: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> np.ndarray:
    """Reads `count` elements from byte `start` on; returns the tensor with this shape and these strides."""
    if count == 0:
        return np.empty(shape, dtype)
    flat = np.fromfile(path, np.uint8, count * dtype.itemsize, offset=start).view(dtype)
    if flat.size != count:
        raise UserError(f"{path} has become shorter while it was read.")
    return np.lib.stride_tricks.as_strided(flat, shape, [s * dtype.itemsize for s in strides])


def open_torch(path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """Opens a state dict that `torch.save` wrote: lazy tensors by name.

    Args:
      path: a `.bin`, `.pt` or `.pth` file in the zip format (PyTorch 1.6 and later). It must stay in place while
        tensors are read.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it is not a complete file in this format, holds something other than named tensors, or asks to run
        code (which is named, and not run).
    """
    path = Path(path).expanduser()

    def refuse(why: str, cause: Exception | None = None) -> NoReturn:
        raise UserError(f"{path} {why}") from cause

    if not path.is_file():
        raise FileNotFoundError(f"No file {path}.")
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(2) == b"PK":
                refuse("is cut: the end of the file is missing.")
        refuse(
            "is not in the zip format that torch.save has written since PyTorch 1.6; load it and save it again with a "
            "newer PyTorch."
        )
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1:
            refuse("is a zip archive, but not one that torch.save wrote: it must hold one data.pkl.")
        order = f"{roots[0]}/byteorder"
        if order in names and archive.read(order) != b"little":
            refuse("was saved on a big-endian machine, which cannot be read.")
        try:
            content = _Unpickler(path, archive, roots[0]).load()
        except Exception as error:  # a pickle can fail in any way
            refuse(f"cannot be read as weights: {error}.", error)
    if not isinstance(content, dict):
        what = "one tensor" if isinstance(content, LazyTensor) else f"a {type(content).__name__}"
        refuse(f"holds {what}; it must hold a dictionary of tensors.")
    others = [str(name) for name, value in content.items() if not isinstance(value, LazyTensor)]
    if others:
        refuse(
            f"holds more than tensors ({', '.join(others[:5])}{', ...' if len(others) > 5 else ''}); save the model's "
            "state_dict() alone."
        )
    return {str(name): value for name, value in content.items()}
