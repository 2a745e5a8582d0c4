"""Documents of text, cut into chunks that processes can read and tokenize independently of one another.

Where a chunk begins depends on the input alone, so what is made of the chunks, one after the other, does too.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from mlra_jax.data.shards import DataError
from mlra_jax.textfiles import TextError, decode_text

SUFFIXES = (".txt", ".md", ".jsonl")
CHUNK_BYTES = 1 << 22
"""Bytes of input in a chunk of files, about: a file of text is never cut, nor is a line of JSON."""
_BATCH_CHARACTERS = 1 << 20  # of a data set's rows in a chunk

Document = tuple[str, int]
"""Its text, and its size in bytes of input, for the progress bar."""
Holdout = Literal["documents", "tails"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a file: all of a text, or the lines of a .jsonl file that begin in it."""

    path: str
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Pieces of files, or documents that have been read."""

    pieces: tuple[Piece, ...] = ()
    texts: tuple[Document, ...] = ()
    state: Any = None
    """Where the stream of documents stands after it, if it can say so."""

    def documents(self, text_field: str) -> Iterator[Document]:
        """Yields its documents that are not blank.

        Raises:
          DataError: a file cannot be read, is not UTF-8, or has a line without text.
        """
        for piece in self.pieces:
            yield from _read(piece, text_field)
        yield from self.texts


def text_files(inputs: Sequence[str]) -> list[Path]:
    """The files named by `inputs`; folders are searched for `SUFFIXES`, sorted by path.

    Raises:
      DataError: an input does not exist, or a folder holds no text; all of them listed.
    """
    files: list[Path] = []
    faults = []
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            files += found
            if not found:
                faults.append(f"The folder {path} holds no {', '.join(SUFFIXES)} file.")
        elif path.is_file():
            files.append(path)
        else:
            faults.append(f"There is no file or folder {path}.")
    if faults:
        raise DataError(faults)
    return files


def chunks_of(files: Iterable[Path], size: int | None = None) -> list[Chunk]:
    """Cuts files into chunks of about `size` bytes (`CHUNK_BYTES`)."""
    size = size or CHUNK_BYTES
    chunks: list[Chunk] = []
    pieces: list[Piece] = []
    for path in files:
        total = path.stat().st_size
        step = size if path.suffix == ".jsonl" else max(total, 1)
        for start in range(0, total, step):
            pieces.append(Piece(str(path), start, min(start + step, total)))
            if sum(p.end - p.start for p in pieces) >= size or len(pieces) >= 1000:
                chunks.append(Chunk(tuple(pieces)))
                pieces = []
    return [*chunks, Chunk(tuple(pieces))] if pieces else chunks


def chunks_of_rows(rows: Iterable[Document], state: Any = lambda: None) -> Iterator[Chunk]:
    """Collects documents into chunks of about a million characters; `state()` says where their stream stands."""
    batch: list[Document] = []
    characters = 0
    for document in rows:
        batch.append(document)
        characters += len(document[0])
        if characters >= _BATCH_CHARACTERS:
            yield Chunk(texts=tuple(batch), state=state())
            batch, characters = [], 0
    if batch:
        yield Chunk(texts=tuple(batch), state=state())


def _read(piece: Piece, text_field: str) -> Iterator[Document]:
    path = piece.path
    try:
        with open(path, "rb") as file:
            if not path.endswith(".jsonl"):
                data = file.read()
                yield from _not_blank(decode_text(data, path), len(data))
                return
            if piece.start:
                file.seek(piece.start - 1)
                file.readline()  # it begins in the piece before
            at = file.tell()
            while at < piece.end and (line := file.readline()):
                if line.strip():
                    yield from _not_blank(_text_of(line, text_field, piece, at), len(line))
                at += len(line)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except TextError as error:
        raise DataError(str(error)) from error


def _text_of(line: bytes, text_field: str, piece: Piece, at: int) -> str:
    try:
        row = json.loads(decode_text(line, piece.path))
        text = row.get(text_field) if isinstance(row, dict) else None
        if isinstance(text, str):
            return text
        fault = f"no text in the field {text_field!r}; name another with --text-field."
    except TextError:
        fault = ""
    except json.JSONDecodeError as error:
        fault = f"is not JSON: {error}."
    with open(piece.path, "rb") as file:  # only now is it worth counting lines
        left, number = at, 1
        while left and (data := file.read(min(left, 1 << 24))):
            left, number = left - len(data), number + data.count(b"\n")
    if not fault:
        decode_text(line, piece.path, number)
    where = f"{piece.path}, line {number}"
    raise DataError(f"{where} {fault}" if fault.startswith("is") else f"{where}: {fault}")


def _not_blank(text: str, size: int) -> Iterator[Document]:
    if text.strip():
        yield text, size


def hugging_face(
    name: str, config: str | None, split: str, text_field: str, part: tuple[int, int], state: Any = None
) -> Iterator[Chunk]:
    """Streams the rows of a Hugging Face data set that are not blank.

    Args:
      name: of the data set.
      config: its configuration.
      split: its split.
      text_field: the field of a row that holds the text.
      part: (i, n), from 1: the i-th of n parts of its files.
      state: of the last chunk before; None: from the beginning.

    Raises:
      DataError: `datasets` is not installed, or the data set cannot be read, has fewer files than parts, or lacks the
        field.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("--hf-dataset needs the package datasets: pip install datasets.") from error

    def rows(stream: Any) -> Iterator[Document]:
        for row in stream:
            text = row.get(text_field)
            if not isinstance(text, str):
                raise DataError(f"{name} has no text in the field {text_field!r}; it has {sorted(row)}.")
            yield from _not_blank(text, len(text.encode("utf-8", "surrogatepass")))

    try:
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
        if part[1] > 1:
            if stream.num_shards < part[1]:
                raise DataError(
                    f"--part {part[0]}/{part[1]}: {name} has {stream.num_shards} files; use no more parts."
                )
            stream = stream.shard(num_shards=part[1], index=part[0] - 1)
        if state is not None:
            stream.load_state_dict(state)
        yield from chunks_of_rows(rows(stream), getattr(stream, "state_dict", lambda: None))
    except DataError:
        raise
    except Exception as error:  # network, wrong name: whatever the library raises
        raise DataError(f"Reading {name} failed with {type(error).__name__}: {error}.") from error


def count(chunks: Iterable[Chunk], text_field: str, most: int) -> int:
    """The number of documents, counted up to `most`."""
    documents = itertools.chain.from_iterable(chunk.documents(text_field) for chunk in chunks)
    return sum(1 for _ in itertools.islice(documents, most))


def split_document(text: str, holdout: Holdout, val_fraction: float) -> tuple[str, str]:
    """Splits a document into training and held-out text: a function of the text, so that duplicates share a side."""
    if not val_fraction:
        return text, ""
    if holdout == "documents":
        held_out = zlib.crc32(text.encode("utf-8", "surrogatepass")) < val_fraction * 2**32
        return ("", text) if held_out else (text, "")
    cut = round(len(text) * (1 - val_fraction))
    line_break = text.rfind("\n", cut * 9 // 10, cut)  # if there is one nearby
    cut = line_break + 1 if line_break > 0 else cut
    return text[:cut], text[cut:]
