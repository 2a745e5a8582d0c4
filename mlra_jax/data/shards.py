"""Token shards: the llm.c file layout, written atomically and read from local folders or buckets.

A shard is 256 little-endian int32 (magic 20240520, version 1, number of tokens, then what llm.c leaves zero: 1 and the
CRC-32 of the tokens' bytes, if they were written here; from byte 32 on the fingerprint of the tokenizer that made them
and, as UTF-8, its name, if they are known), then the tokens as little-endian uint16. A data set is a folder of
`NAME_val_000000.bin` and `NAME_train_000001.bin`, `NAME_train_000002.bin`, ...; the paper's PyTorch code reads it too.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import fsspec
import numpy as np

from mlra_jax.data.tokenizers import fingerprint
from mlra_jax.errors import FaultsError
from mlra_jax.storage import StorageError, check_storage, is_remote, write_whole

Split = Literal["train", "val"]

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN_BYTES = 2
MAX_ID = 2**16 - 1
NO_TOKEN = -1
"""Stands for what is past the end of a shard."""
_FINGERPRINT = slice(32, 64)
_TOKENIZER_NAME = slice(64, 320)
_SHARD_NAME = re.compile(r"_(train|val)_\d+\.bin$")


class DataError(FaultsError):
    """One or more faults in the data; the message lists all of them."""

    where = "the data"


# Writing --------------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes a stream of tokens as shards of `shard_tokens` tokens; the last may be shorter.

    A shard is held in memory (2 bytes a token) until it is full, and appears under its name when it is whole and on
    disk, or in the bucket. Use as a context manager: at its end the last shard is written, unless an exception ends it.

    Args:
      folder: Existing folder for the shards, or a bucket URL.
      name: NAME of the data set.
      split: `train` is numbered from 1, `val` from 0.
      shard_tokens: Tokens in a full shard.
      tokenizer: The tokenizer that made the tokens (see `get_tokenizer`), recorded in the shards; empty: none.
      part: (i, n), from 1: of n writers the i-th, which writes each n-th number.
      n_shards: Full shards that were written before.
      rest: Tokens that follow them.

    Raises:
      ValueError: `shard_tokens` is out of range, or there is no such tokenizer.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        name: str,
        split: Split,
        shard_tokens: int = 10**8,
        tokenizer: str = "",
        *,
        part: tuple[int, int] = (1, 1),
        n_shards: int = 0,
        rest: np.ndarray | None = None,
    ):
        if not 1 <= shard_tokens < 2**31:
            raise ValueError(f"{shard_tokens=} must be between 1 and 2^31 - 1.")
        self.n_shards = n_shards
        """Shards written so far."""
        self._folder, self._name, self._split = str(folder), name, split
        self._shard_tokens, self._part = shard_tokens, part
        self._tokenizer = (bytes.fromhex(fingerprint(tokenizer)), Path(tokenizer).name) if tokenizer else None
        self._held = [] if rest is None else [rest]
        self._n_held = sum(map(len, self._held))
        self.n_tokens = n_shards * shard_tokens + self._n_held
        """Tokens taken so far."""

    @property
    def paths(self) -> list[Path]:
        """The finished shards, in a local folder."""
        return [Path(self._folder) / self._shard_name(i) for i in range(self.n_shards)]

    @property
    def rest(self) -> np.ndarray:
        """The tokens that are in no shard yet, uint16 [n]."""
        self._held = [np.concatenate([np.empty(0, "<u2"), *self._held])]
        return self._held[0]

    def write(self, tokens: np.ndarray) -> None:
        """Appends `tokens`, integers [n] in [0, 65535].

        Raises:
          DataError: an id does not fit the format's 16 bits.
          OSError: a shard cannot be written.
        """
        if tokens.size and not 0 <= tokens.min() <= tokens.max() <= MAX_ID:
            raise DataError(
                f"Shards hold 16-bit ids, 0 to {MAX_ID}; got ids from {tokens.min()} to {tokens.max()}. "
                "Use a tokenizer with a smaller vocabulary."
            )
        self._held.append(tokens.astype("<u2"))
        self._n_held += tokens.size
        self.n_tokens += tokens.size
        while self._n_held >= self._shard_tokens:
            shard, rest = np.split(self.rest, [self._shard_tokens])
            self._write_shard(shard)
            self._held, self._n_held = [rest.copy()], rest.size

    def close(self) -> None:
        """Writes what is left as the last shard."""
        if self._n_held:
            self._write_shard(self.rest)
            self._held, self._n_held = [], 0

    def _shard_name(self, i: int) -> str:
        number = (self._split == "train") + self._part[0] - 1 + i * self._part[1]
        return f"{self._name}_{self._split}_{number:06d}.bin"

    def _write_shard(self, tokens: np.ndarray) -> None:
        content = tokens.tobytes()
        header = np.zeros(256, "<i4")
        header[:4] = MAGIC, VERSION, tokens.size, 1
        header[4:5].view("<u4")[:] = zlib.crc32(content)
        data = bytearray(header.tobytes())
        if self._tokenizer is not None:
            digest, name = self._tokenizer
            data[_FINGERPRINT] = digest
            size = _TOKENIZER_NAME.stop - _TOKENIZER_NAME.start
            data[_TOKENIZER_NAME] = name.encode(errors="replace")[:size].ljust(size, b"\0")
        write_whole(f"{self._folder}/{self._shard_name(self.n_shards)}", bytes(data) + content)
        self.n_shards += 1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.close()


# Reading --------------------------------------------------------------------------------------------------------------


class Shards(Protocol):
    """Random access to the tokens of an ordered list of shards; safe to use from several threads."""

    @property
    def names(self) -> Sequence[str]:
        """Where each shard is, for messages."""

    @property
    def n_tokens(self) -> Sequence[int]:
        """Tokens in each shard."""

    def read(self, spans: Sequence[tuple[int, int]], length: int) -> np.ndarray:
        """Tokens `start` to `start + length` of each span (shard, start), int32 [n_spans, length].

        Past a shard's end they are `NO_TOKEN`.
        """


class ArrayShards:
    """Shards that are arrays, in memory or memory-mapped."""

    def __init__(self, names: Sequence[str], arrays: Sequence[np.ndarray]):
        self.names = names
        self.n_tokens = [len(a) for a in arrays]
        self._arrays = arrays

    def read(self, spans: Sequence[tuple[int, int]], length: int) -> np.ndarray:
        out = np.empty((len(spans), length), np.int32)
        for row, (shard, start) in zip(out, spans, strict=True):
            _fill(row, self._arrays[shard][start : start + length])
        return out


class RemoteShards:
    """Shards in a bucket: every read fetches just the bytes it needs, all spans of it at once where the library can."""

    def __init__(self, fs: Any, paths: Sequence[str], n_tokens: Sequence[int]):
        self.names = [fs.unstrip_protocol(p) for p in paths]
        self.n_tokens = n_tokens
        self._fs, self._paths = fs, paths

    def read(self, spans: Sequence[tuple[int, int]], length: int) -> np.ndarray:
        paths = [self._paths[shard] for shard, _ in spans]
        starts = [HEADER_BYTES + TOKEN_BYTES * start for _, start in spans]
        counts = [min(length, self.n_tokens[shard] - start) for shard, start in spans]
        ends = [start + TOKEN_BYTES * count for start, count in zip(starts, counts, strict=True)]
        out = np.empty((len(spans), length), np.int32)
        chunks = self._fs.cat_ranges(paths, starts, ends)
        for row, (shard, start), count, chunk in zip(out, spans, counts, chunks, strict=True):
            where = f"{self.names[shard]}, tokens {start} to {start + count}"
            if isinstance(chunk, Exception):
                raise DataError(f"Reading {where} failed with {type(chunk).__name__}: {chunk}.") from chunk
            if len(chunk) != TOKEN_BYTES * count:
                raise DataError(f"{where}: got {len(chunk)} bytes; the shard changed while it was in use.")
            _fill(row, np.frombuffer(chunk, "<u2"))
        return out


def _fill(row: np.ndarray, tokens: np.ndarray) -> None:
    row[: len(tokens)] = tokens
    row[len(tokens) :] = NO_TOKEN


def header_fault(name: str, header: bytes, size: int) -> str | None:
    """One sentence about a shard of `size` bytes whose header is broken; None if it is intact."""
    if len(header) < HEADER_BYTES:
        return f"{name} is broken: {size:,} bytes are too few for the header of {HEADER_BYTES:,}."
    magic, version, n_tokens = np.frombuffer(header, "<i4", 3).tolist()
    if magic != MAGIC:
        return f"{name} is not a token shard: it begins with {magic}, not with {MAGIC}."
    if version != VERSION:
        return f"{name} has version {version} of the shard format; only version {VERSION} is known."
    if n_tokens < 0 or size != HEADER_BYTES + TOKEN_BYTES * n_tokens:
        kind = "truncated" if size < HEADER_BYTES + TOKEN_BYTES * n_tokens else "broken"
        promised = HEADER_BYTES + TOKEN_BYTES * n_tokens
        return f"{name} is {kind}: its header promises {n_tokens:,} tokens, {promised:,} bytes, but it has {size:,}."
    return None


def _content_fault(fs: Any, path: str, name: str, header: bytes) -> str | None:
    """One sentence if a shard's tokens do not match its checksum; None if they do, or it has none."""
    has_checksum, expected = int(np.frombuffer(header, "<i4", 5)[3]), int(np.frombuffer(header, "<u4", 5)[4])
    if not has_checksum:
        return None
    found = 0
    with fs.open(path, "rb") as file:
        file.seek(HEADER_BYTES)
        while data := file.read(1 << 24):
            found = zlib.crc32(data, found)
    if found == expected:
        return None
    return f"{name} is corrupted: its tokens are not those that were written (CRC-32 {found:08x}, not {expected:08x})."


def _tokenizer_fault(names: Sequence[str], headers: Sequence[bytes], tokenizer: str) -> str | None:
    """One sentence if shards were made with a tokenizer other than `tokenizer`; None if they do not say so."""
    try:
        own = fingerprint(tokenizer)
        given = f"{tokenizer} (vocabulary {own[:8]})"
    except ValueError:  # it is not here, and reading tokens does not need it
        own, given = "", f"{tokenizer}, which cannot be read here"
    wrong = {}
    for name, header in zip(names, headers, strict=True):
        theirs = header[_FINGERPRINT].hex()
        label = header[_TOKENIZER_NAME].rstrip(b"\0").decode(errors="replace")
        same = theirs == own if own else label == Path(tokenizer).name
        if any(header[_FINGERPRINT]) and not same:
            wrong[name] = f"{label} (vocabulary {theirs[:8]})"
    if not wrong:
        return None
    first, *others = wrong
    subject = f"{first} and {len(others)} more were" if others else f"{first} was"
    return (
        f"{subject} made with the tokenizer {wrong[first]}, not with {given}; name that tokenizer, or make shards with "
        f"mlra-prepare --tokenizer {tokenizer}."
    )


def without_tokenizer(shard: bytes) -> bytes:
    """A shard's bytes without the part of the header that names its tokenizer."""
    return shard[: _FINGERPRINT.start] + bytes(HEADER_BYTES - _FINGERPRINT.start) + shard[HEADER_BYTES:]


def open_shards(path: str, split: Split, verify: bool = False, tokenizer: str = "") -> Shards:
    """The shards of one part of a data set, sorted by name, their headers checked.

    Args:
      path: A local folder (its shards are memory-mapped) or a bucket URL that fsspec knows, such as `gs://bucket/folder`.
      split: Which shards: `*_train_*.bin` or `*_val_*.bin`.
      verify: Also read all tokens once and compare them with the checksums that `ShardWriter` stores.
      tokenizer: The tokenizer that shards must have been made with (see `get_tokenizer`), if they say so; empty: any.
        One that is not on this machine is compared by name.

    Raises:
      DataError: there is no such folder or shard, the library for the bucket is not installed, or shards are broken,
        truncated or corrupted (all of them listed), or made with another tokenizer.
    """
    absent = f"There is no folder {path}; data.path must be a folder of shards, or `embedded`."
    fs, files = _list(path, absent)
    sizes = {name: size for name, size in files.items() if _is_shard(name, split)}
    if not sizes:
        raise DataError(
            f"{path} holds no *_{split}_*.bin shard ({len(files)} other files); make shards with mlra-prepare."
        )
    return _open(fs, path, sizes, verify, tokenizer)


def open_files(path: str, verify: bool = False, tokenizer: str = "") -> Shards:
    """The shard at `path`, or all `*.bin` of the folder `path` sorted by name, as `open_shards` opens them.

    Raises:
      DataError: as `open_shards`.
    """
    fs, files = _list(path, f"There is no file or folder {path}; expected a shard or a folder of shards.")
    sizes = {name: size for name, size in files.items() if name.endswith(".bin")}
    if not sizes:
        raise DataError(
            f"{path} holds no *.bin shard ({len(files)} other files); make shards with mlra-prepare."
        )
    return _open(fs, path, sizes, verify, tokenizer)


def _list(path: str, absent: str) -> tuple[Any, dict[str, int]]:
    """The file system, and the sizes of the files in the folder `path`, or of the file `path`; else raises `absent`."""
    fs, folder = _filesystem(path)
    try:
        files = fs.ls(folder, detail=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(absent) from error
    except Exception as error:  # network, credentials: whatever the bucket's library raises
        raise DataError(f"Listing {path} failed with {type(error).__name__}: {error}.") from error
    found = {f["name"]: f["size"] for f in files if f["type"] == "file"}
    if missing := unfinished_parts(found):
        raise DataError(
            f"{path} is not finished: mlra-prepare has still to make {', '.join(missing)} of it; the same command that "
            "began it goes on."
        )
    return fs, found


_MARKER = re.compile(r"\.part-(\d+)-of-(\d+)\.(unfinished|finished)$")


def marker(name: str, part: tuple[int, int], state: Literal["unfinished", "finished"]) -> str:
    """The name of the file that says how far a part of a data set is."""
    return f"{name}.part-{part[0]}-of-{part[1]}.{state}"


def parts_of(names: Iterable[str]) -> dict[tuple[int, int], str]:
    """The parts (i, n) that `marker` files among these names tell of: `finished`, or `unfinished`."""
    found: dict[tuple[int, int], str] = {}
    for match in filter(None, map(_MARKER.search, sorted(names))):  # "finished" sorts first
        found.setdefault((int(match[1]), int(match[2])), match[3])
    return found


def unfinished_parts(names: Iterable[str]) -> list[str]:
    """The parts of a data set in a folder with these files that are not finished, such as `part 2/4`."""
    found = parts_of(names)
    every = {(i, n) for _, n in found for i in range(1, n + 1)}
    return [f"part {i}/{n}" for i, n in sorted(every) if found.get((i, n)) != "finished"]


def _open(fs: Any, path: str, sizes: dict[str, int], verify: bool, tokenizer: str) -> Shards:
    paths = sorted(sizes)
    names = [fs.unstrip_protocol(p) if is_remote(path) else p for p in paths]
    headers = fs.cat_ranges(paths, [0] * len(paths), [min(HEADER_BYTES, sizes[p]) for p in paths])
    faults = []
    for name, p, header in zip(names, paths, headers, strict=True):
        if isinstance(header, Exception):
            faults.append(f"Reading {name} failed with {type(header).__name__}: {header}.")
            continue
        fault = header_fault(name, header, sizes[p])
        if fault is None and verify:
            fault = _content_fault(fs, p, name, header)
        if fault is not None:
            faults.append(fault)
    if faults:
        raise DataError(faults)
    if tokenizer and (fault := _tokenizer_fault(names, headers, tokenizer)):
        raise DataError(fault)

    n_tokens = [int(np.frombuffer(h, "<i4", 3)[2]) for h in headers]
    if not _is_local(fs):
        return RemoteShards(fs, paths, n_tokens)
    empty = np.empty(0, "<u2")  # which cannot be memory-mapped
    maps = [
        np.memmap(p, "<u2", "r", HEADER_BYTES, n) if n else empty
        for p, n in zip(paths, n_tokens, strict=True)
    ]
    return ArrayShards(names, maps)


def _is_shard(path: str, split: Split) -> bool:
    match = _SHARD_NAME.search(path)
    return match is not None and match[1] == split


def _is_local(fs: Any) -> bool:
    return "file" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def _filesystem(path: str) -> tuple[Any, str]:
    try:
        check_storage(path)
    except StorageError as error:
        raise DataError(str(error)) from error
    return fsspec.core.url_to_fs(path if is_remote(path) else os.path.expanduser(path))
