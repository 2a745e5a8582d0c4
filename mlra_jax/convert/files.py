"""Files of named tensors: read one tensor at a time, written one file at a time."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mlra_jax.convert.torch_files import open_torch
from mlra_jax.errors import UserError
from mlra_jax.lazy_arrays import Index, LazyTensor, Tensor
from mlra_jax.storage import whole_file
from mlra_jax.textfiles import read_text

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}

SAFETENSORS_FILE, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
_TORCH_INDEX = "pytorch_model.bin.index.json"


def open_weights(path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """Opens a file of weights, or a model's folder: lazy tensors by name.

    Args:
      path: a safetensors file, or one that `torch.save` wrote; or a folder with either kind, in one file or several:
        those that `model.safetensors.index.json` or `pytorch_model.bin.index.json` lists, without one all
        `*.safetensors`, else all `pytorch_model*.bin`. The files must stay in place while tensors are read.

    Raises:
      FileNotFoundError: there is no such file, or none in the folder, or one that the index lists is missing.
      UserError: a file cannot be read (see `open_torch`), or holds numbers that are not floating point; two files hold
        the same name; or the files hold other tensors than the index lists.
    """
    path = Path(path).expanduser()
    files, listed = _weight_files(path)
    tensors: dict[str, LazyTensor] = {}
    found: dict[str, str] = {}
    for file in files:
        is_safetensors = file.suffix == ".safetensors"
        for name, tensor in (open_safetensors if is_safetensors else open_torch)(file).items():
            if name in tensors:
                raise UserError(f"{file} holds {name}, which another file in {path} holds too.")
            if tensor.dtype not in _DTYPES.values():
                raise UserError(
                    f"{file}: {name} is of type {tensor.dtype}; expected one of "
                    f"{', '.join(map(str, _DTYPES.values()))}."
                )
            tensors[name], found[name] = tensor, file.name
    if listed is not None and listed != found:
        wrong = sorted(name for name in {**listed, **found} if listed.get(name) != found.get(name))
        raise UserError(
            f"The files in {path} do not hold what its index lists:\n  - "
            + "\n  - ".join(
                f"{name}: listed in {listed.get(name, 'no file')}, found in {found.get(name, 'none')}"
                for name in wrong
            )
        )
    return tensors


def _weight_files(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files to read, and the index's mapping from tensors to files."""
    if not path.is_dir():
        return [path], None
    for pattern, index in (("*.safetensors", SAFETENSORS_INDEX), ("pytorch_model*.bin", _TORCH_INDEX)):
        if (path / index).is_file():
            text = read_text(path / index)
            try:
                listed = json.loads(text)["weight_map"]
                names = sorted(set(listed.values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path / index} is not an index of weights: it has no weight_map."
                ) from error
            missing = [name for name in names if not (path / name).is_file()]
            if missing:
                raise FileNotFoundError(f"{path} lacks files that {index} lists: {', '.join(missing)}.")
            return [path / name for name in names], listed
        if files := sorted(path.glob(pattern)):
            return files, None
    raise FileNotFoundError(f"No *.safetensors and no pytorch_model*.bin file in the folder {path}.")


def open_safetensors(path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """Opens a safetensors file: lazy tensors by name.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it is not a complete safetensors file, or holds a dtype that is not floating point.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"No file {path}.")

    def read(name: str, index: Index | None = None) -> np.ndarray:
        with safe_open(path, framework="np") as file:  # reopened, so that only this tensor is mapped
            return file.get_slice(name)[index] if index else file.get_tensor(name)

    tensors: dict[str, LazyTensor] = {}
    try:
        with safe_open(path, framework="np") as file:
            entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            for name, entry in entries.items():
                shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
                if dtype not in _DTYPES:
                    raise UserError(
                        f"{path}: {name} is of type {dtype}; expected one of {', '.join(_DTYPES)}."
                    )
                tensors[name] = LazyTensor(
                    shape, _DTYPES[dtype], functools.partial(read, name), functools.partial(read, name)
                )
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}.") from error
    return tensors


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors to one safetensors file, holding all of them in memory; replaces `path` once it is complete.

    Args:
      path: the file.
      tensors: float64, float32, float16 or bfloat16, in any mixture.

    Raises:
      OSError: the file cannot be written; names it.
    """
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    with whole_file(path) as unfinished:
        try:
            save_file(arrays, unfinished, metadata={"format": "pt"})
        except SafetensorError as error:  # the library passes the system's errors on in words
            code = re.search(r"\(os error (\d+)\)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), os.fspath(path)) from error


def write_weights(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    max_file_bytes: int,
    progress: Callable[[int], object] = lambda n: None,
) -> None:
    """Writes tensors to a folder as Hugging Face libraries expect them, one file after the other.

    One file `model.safetensors`; or, if that would be larger than `max_file_bytes`, several
    `model-00001-of-0000N.safetensors`, none larger unless a single tensor is, and an index.

    Args:
      folder: an existing folder.
      tensors: see `write_safetensors`.
      max_file_bytes: size of the tensors in one file, which are in memory at once.
      progress: called with the bytes of each tensor once it has been made.
    """
    folder = Path(folder)
    size = lambda t: math.prod(t.shape) * np.dtype(t.dtype).itemsize

    def counted(tensor: Tensor) -> LazyTensor:
        def read() -> np.ndarray:
            values = np.asarray(tensor)
            progress(values.nbytes)
            return values

        return LazyTensor(tuple(tensor.shape), np.dtype(tensor.dtype), read)

    tensors = {name: counted(tensor) for name, tensor in tensors.items()}
    files: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if files[-1] and filled + size(tensor) > max_file_bytes:
            files.append({})
            filled = 0
        files[-1][name] = tensor
        filled += size(tensor)
    if len(files) == 1:
        return write_safetensors(folder / SAFETENSORS_FILE, tensors)
    weight_map: dict[str, str] = {}
    for i, part in enumerate(files):
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        write_safetensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(map(size, tensors.values()))}, "weight_map": weight_map}
    (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n")
