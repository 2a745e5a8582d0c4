"""From documents to token shards, by several processes, and so that an interrupted preparation can go on.

One process takes what the others have tokenized, in the order of the chunks, and cuts it into shards. After each shard
it writes how far it is, with the tokens that are in no shard yet, into one small file beside them (`Progress`): so the
shards do not depend on how many processes there are, nor on how often they were interrupted.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np

from mlra_jax.data.documents import Chunk, Holdout, split_document
from mlra_jax.data.shards import DataError, ShardWriter, Split, marker, parts_of, unfinished_parts
from mlra_jax.data.tokenizers import Tokenizer, get_tokenizer
from mlra_jax.errors import naming
from mlra_jax.storage import exclusive, is_remote, write_whole

Item = TypeVar("Item")
Result = TypeVar("Result")
_NONE: np.ndarray = np.empty(0, "<u2")
SPLITS: tuple[Split, Split] = ("train", "val")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that shards depend on besides the documents."""

    name: str
    tokenizer: str
    text_field: str
    holdout: Holdout
    val_fraction: float
    shard_tokens: int
    part: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """What a chunk becomes."""

    tokens: tuple[np.ndarray, np.ndarray]
    """Of training and of validation: uint16 [n]."""
    n_bytes: int
    """Of input."""


def tokenize(chunk: Chunk, tokenizer: Tokenizer, recipe: Recipe) -> Tokenized:
    """Tokenizes a chunk: an end-of-text id before each document, or before each side of one that is split."""
    documents = list(chunk.documents(recipe.text_field))
    split = [split_document(text, recipe.holdout, recipe.val_fraction) for text, _ in documents]
    end_of_text, tokens = np.array([tokenizer.eot_id], "<u2"), []
    for side in range(2):
        ids = tokenizer.encode_batch([texts[side] for texts in split if texts[side]])
        parts = [part for document in ids for part in (end_of_text, document.astype("<u2"))]
        tokens.append(np.concatenate([np.empty(0, "<u2"), *parts]))
    return Tokenized((tokens[0], tokens[1]), sum(size for _, size in documents))


@dataclasses.dataclass(frozen=True)
class Scanned:
    """What a first look at a chunk finds."""

    n_documents: int
    n_bytes: int
    faults: tuple[tuple[str, str], ...]
    """File and fault."""


def scan(chunk: Chunk, tokenizer: Tokenizer, text_field: str) -> Scanned:
    """Reads a chunk so that faults show before any work is done."""
    n_documents, n_bytes, faults = 0, 0, []
    for piece in chunk.pieces:
        try:
            for _, size in Chunk((piece,)).documents(text_field):
                n_documents += 1
                n_bytes += size
        except DataError as error:
            faults += [(piece.path, fault) for fault in error.faults]
    return Scanned(n_documents, n_bytes, tuple(faults))


# Processes ------------------------------------------------------------------------------------------------------------

_tokenizer: Tokenizer  # of a worker process


def _start(tokenizer: str) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has a core
    _tokenizer = get_tokenizer(tokenizer)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)  # else it would wait for work for ever

    threading.Thread(target=follow, daemon=True).start()


def _call(function: Callable[[Item, Tokenizer], Result], item: Item) -> Result:
    return function(item, _tokenizer)


class Workers(contextlib.ExitStack):
    """Processes that apply functions to items, in order; with one of them, this one does.

    Args:
      tokenizer: the name of the tokenizer that functions get with each item.
      n: number of processes.
    """

    def __init__(self, tokenizer: str, n: int):
        super().__init__()
        self._n, self._tokenizer = n, tokenizer
        self._pool: Any = None

    def map(self, function: Callable[[Item, Tokenizer], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`function(item, tokenizer)` of each item, of which a few are read ahead.

        Raises:
          DataError: a process died; and what the function raises.
        """
        if self._n == 1:
            tokenizer = get_tokenizer(self._tokenizer)
            yield from (function(item, tokenizer) for item in items)
            return
        if self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._n, multiprocessing.get_context("spawn"), _start, (self._tokenizer,)
            )
            self.callback(self._pool.shutdown, cancel_futures=True)
        pending: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
        try:
            for item in items:
                pending.append(self._pool.submit(_call, function, item))
                if len(pending) >= 3 * self._n:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except concurrent.futures.BrokenExecutor as error:
            raise DataError(
                "A process that tokenizes died, perhaps for lack of memory; the same command goes on, with fewer of "
                "them if you add --workers."
            ) from error


# Progress -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Progress:
    """How far a part is."""

    plan: dict[str, Any]
    """What must be the same when it goes on: the options, and a digest of the inputs."""
    holdout: Holdout
    n_documents: int | None = None
    n_bytes: int | None = None
    """Of all its documents; None: unknown."""
    chunks: int = 0
    """Chunks that are done; their tokens are in shards, or in `rest`."""
    done_bytes: int = 0
    stream: Any = None
    """Where a stream of documents stands."""
    shards: tuple[int, int] = (0, 0)
    """Full shards of training and of validation."""
    rest: tuple[np.ndarray, np.ndarray] = dataclasses.field(default_factory=lambda: (_NONE, _NONE))
    """The tokens that follow them, uint16 [n]."""

    def to_bytes(self) -> bytes:
        """A line of JSON, and the tokens."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["rest"] = [len(tokens) for tokens in self.rest]
        return json.dumps(fields).encode() + b"\n" + b"".join(t.astype("<u2").tobytes() for t in self.rest)

    @classmethod
    def from_bytes(cls, data: bytes) -> Progress:
        """The inverse of `to_bytes`."""
        line, _, tokens = data.partition(b"\n")
        fields = json.loads(line)
        train, val = np.split(np.frombuffer(tokens, "<u2"), [fields["rest"][0]])
        return cls(**fields | {"rest": (train, val), "shards": tuple(fields["shards"])})


def digest(files: Sequence[Path]) -> str:
    """Identifies files by name, size and time of change."""
    said = hashlib.sha256()
    for path in files:
        at = path.stat()
        said.update(f"{path}\0{at.st_size}\0{at.st_mtime_ns}\n".encode("utf-8", "surrogatepass"))
    return said.hexdigest()


class Place:
    """Where the shards of a part go, and how far it is.

    A local folder that one command makes has its name once it is whole; until then it is beside it, under a name that
    ends in `.partial`. In buckets, and where several parts make one, shards are in the folder from the start, with
    files that say which parts are unfinished, and so let nobody read it (`unfinished_parts`).

    Args:
      out: the folder, or a bucket URL.
      name: of the data set.
      part: (i, n), from 1.
    """

    def __init__(self, out: str, name: str, part: tuple[int, int]):
        self.out, self.name, self.part = out, name, part
        self.direct = is_remote(out) or part[1] > 1
        self._unfinished = marker(name, part, "unfinished")
        beside = not self.direct and self._unfinished not in self.names(out)
        self.folder = f"{out}.partial" if beside else out

    def names(self, folder: str) -> set[str]:
        """The names of the files in a folder; empty if there is none."""
        fs, path = fsspec.core.url_to_fs(folder)
        try:
            fs.invalidate_cache()
            return {os.path.basename(f.rstrip("/")) for f in fs.ls(path, detail=False)}
        except FileNotFoundError:
            return set()
        except NotADirectoryError:
            return {""}
        except Exception as error:
            raise DataError(f"Listing {folder} failed with {type(error).__name__}: {error}.") from error

    def faults(self, overwrite: bool) -> list[str]:
        """Why nothing can be made here, one sentence each."""
        found = self.names(self.out)
        others = sorted({n for _, n in parts_of(found)} - {self.part[1]})
        if self.folder == self.out and others:
            return [
                f"{self.out} is made in {others[0]} part(s); give --part I/{others[0]}, or another --out."
            ]
        if self._unfinished in found or self.finished() or not (found or Path(self.out).is_file()):
            return []
        if self.direct and self.part[1] > 1 and parts_of(found):
            return []
        if self.direct and overwrite:
            return [f"--overwrite replaces local folders of a single part only; remove {self.out} yourself."]
        if not overwrite:
            return [f"{self.out} exists; name another --out, or replace it with --overwrite."]
        if not Path(self.out).is_dir() or any(Path(name).suffix != ".bin" for name in found):
            return [f"{self.out} holds more than shards; --overwrite replaces only a folder of .bin files."]
        return []

    def finished(self) -> bool:
        """Whether this part of several is finished."""
        return marker(self.name, self.part, "finished") in self.names(self.out)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes from making the same; if it fails before a shard is full, nothing is left beside it."""
        if is_remote(self.out):
            yield
            return
        Path(self.out).parent.mkdir(parents=True, exist_ok=True)
        lock = f"{self.out}.lock" if self.part[1] == 1 else f"{self.out}.part-{self.part[0]}.lock"
        with exclusive(lock, f"{self.out} is being made"), naming(self.out):
            try:
                yield
            except BaseException:
                found = self.load()
                if self.folder != self.out and (found is None or not sum(found.shards)):
                    shutil.rmtree(self.folder, ignore_errors=True)
                raise

    def load(self) -> Progress | None:
        """How far the part is; None: it was not begun."""
        if self._unfinished not in self.names(self.folder):
            return None
        with fsspec.open(f"{self.folder}/{self._unfinished}", "rb") as file:
            return Progress.from_bytes(file.read())

    def begin(self, progress: Progress) -> None:
        """Starts anew: what there is of this part goes."""
        if self.folder != self.out:
            shutil.rmtree(self.folder, ignore_errors=True)
        if not is_remote(self.folder):
            Path(self.folder).mkdir(exist_ok=True)
        self.save(progress)
        (i, n), shard = self.part, re.compile(rf"{re.escape(self.name)}_(train|val)_(\d+)\.bin")
        for name in self.names(self.folder):
            if (match := shard.fullmatch(name)) and (int(match[2]) - (match[1] == "train")) % n == i - 1:
                self._remove(name)

    def _remove(self, name: str) -> None:
        fs, path = fsspec.core.url_to_fs(f"{self.folder}/{name}")
        fs.rm_file(path)

    def save(self, progress: Progress) -> None:
        """Records how far the part is."""
        write_whole(f"{self.folder}/{self._unfinished}", progress.to_bytes())

    def finish(self, n_tokens: dict[str, int]) -> list[str]:
        """Gives the whole its name; returns the parts that are still to be made."""
        if self.part[1] > 1:
            write_whole(f"{self.out}/{marker(self.name, self.part, 'finished')}", json.dumps(n_tokens) + "\n")
        if self.folder != self.out:
            out, replaced = Path(self.out), Path(f"{self.out}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            if out.exists():
                out.replace(replaced)
            Path(self.folder).replace(out)
            shutil.rmtree(replaced, ignore_errors=True)
            self.folder = self.out
        self._remove(self._unfinished)
        return unfinished_parts(self.names(self.out))


def write_shards(
    chunks: Iterable[Chunk],
    recipe: Recipe,
    progress: Progress,
    place: Place,
    workers: Workers,
    advance: Callable[[int, int], None],
) -> dict[str, int]:
    """Tokenizes the chunks that are not done yet and writes them as shards; returns the tokens of `train` and `val`.

    `advance` is called after each chunk with its bytes and with the tokens so far.
    """
    writers = [
        ShardWriter(
            place.folder,
            recipe.name,
            split,
            recipe.shard_tokens,
            recipe.tokenizer,
            part=recipe.part,
            n_shards=n,
            rest=rest,
        )
        for split, n, rest in zip(SPLITS, progress.shards, progress.rest, strict=True)
    ]
    states: collections.deque[Any] = collections.deque()

    def remembered() -> Iterator[Chunk]:
        for chunk in chunks:
            states.append(chunk.state)
            yield chunk

    for done in workers.map(functools.partial(tokenize, recipe=recipe), remembered()):
        for writer, tokens in zip(writers, done.tokens, strict=True):
            writer.write(tokens)
        progress.chunks += 1
        progress.done_bytes += done.n_bytes
        progress.stream = states.popleft()
        if (shards := (writers[0].n_shards, writers[1].n_shards)) != progress.shards:
            progress.shards, progress.rest = shards, (writers[0].rest, writers[1].rest)
            place.save(progress)
        advance(done.n_bytes, sum(writer.n_tokens for writer in writers))
    n_tokens: dict[str, int] = {split: writer.n_tokens for split, writer in zip(SPLITS, writers, strict=True)}
    if recipe.part[1] == 1 and (not n_tokens["train"] or (recipe.val_fraction and not n_tokens["val"])):
        raise DataError(
            f"Nothing is left for {'training' if n_tokens['val'] else 'validation'} with --holdout {recipe.holdout} "
            f"and --val-fraction {recipe.val_fraction}; try --holdout tails, another fraction, or more text."
        )
    for writer in writers:
        writer.close()
    return n_tokens


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a sample says of the whole."""

    tokens_per_byte: float
    tokens_per_second: float
    """Of one process."""


def estimate(chunks: Sequence[Chunk], recipe: Recipe) -> Estimate:
    """Tokenizes the beginnings of a few chunks, 32 K characters of each."""
    tokenizer = get_tokenizer(recipe.tokenizer)
    tokenizer.encode_batch(["what takes time only once"])
    n_tokens = n_bytes = 0
    began = time.perf_counter()
    for chunk in chunks[:: -(-len(chunks) // 8)]:
        for text, size in chunk.documents(recipe.text_field):
            part = text[: 1 << 15]
            n_tokens += 1 + len(tokenizer.encode_batch([part])[0])
            n_bytes += round(size * len(part) / len(text))
            break
    return Estimate(n_tokens / max(n_bytes, 1), n_tokens / (time.perf_counter() - began))
