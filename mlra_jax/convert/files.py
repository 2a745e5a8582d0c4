"""Files of named tensors, read and written one tensor at a time."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Tensor(Protocol):
    """Anything with a shape and a type that `np.asarray` takes: an array, or a `LazyTensor`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor whose shape and type are known, and whose values are made when asked for by `np.asarray`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype=dtype)


def open_safetensors(path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, or of all `*.safetensors` files in a folder, by name; none is read yet.

    Args:
      path: file or folder. The files must stay in place while tensors are read.

    Raises:
      FileNotFoundError: there is no such file, or none in the folder.
      ValueError: a file is not a whole safetensors file, or holds numbers that are not floating point, or two files
        hold the same name.
    """
    path = Path(path).expanduser()
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        what = f"No *.safetensors file in the folder {path}" if path.is_dir() else f"No file {path}"
        raise FileNotFoundError(f"{what}; the weights must be in the safetensors format.")
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        try:
            handle = safe_open(file, framework="np")
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file: {error}.") from error
        for name in handle.keys():  # noqa: SIM118 - not a dictionary
            entry = handle.get_slice(name)
            shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
            if name in tensors:
                raise ValueError(f"{file} holds {name}, which another file in {path} holds too.")
            if dtype not in _DTYPES:
                raise ValueError(f"{file}: {name} is of type {dtype}; expected one of {', '.join(_DTYPES)}.")
            read = functools.partial(handle.get_tensor, name)
            tensors[name] = LazyTensor(shape, _DTYPES[dtype], read)
    return tensors


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors to one safetensors file, reading them one at a time.

    The file appears under its name when it is complete, and replaces what was there.

    Args:
      path: of the file.
      tensors: float64, float32, float16 or bfloat16, in any mixture.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        dtype = np.dtype(tensor.dtype)
        start, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                file.write(np.ascontiguousarray(np.asarray(tensor)).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
