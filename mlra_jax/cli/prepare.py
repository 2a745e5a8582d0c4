"""`mlra-prepare TEXTS [TEXTS ...] --out FOLDER`: from text to token shards."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from tqdm import tqdm

from mlra_jax.cli import command
from mlra_jax.config import OPTION, NotNegative, Range, Validated
from mlra_jax.data.documents import Chunk, chunks_of, count, hugging_face, split_document, text_files
from mlra_jax.data.preparing import Place, Progress, Recipe, Workers, digest, estimate, scan, write_shards
from mlra_jax.data.shards import MAX_ID, DataError
from mlra_jax.data.tokenizers import fingerprint, get_tokenizer
from mlra_jax.storage import check_storage, is_remote

__all__ = ["PrepareArgs", "main", "split_document"]


@dataclasses.dataclass(frozen=True)
class PrepareArgs(Validated):
    """Turns text into token shards: files, folders of .txt, .md and .jsonl files, or a Hugging Face data set.

    Each .txt or .md file and each line of a .jsonl file is a document, written as the end-of-text id followed by its
    tokens. Text is UTF-8; byte-order marks are dropped and CRLF becomes LF. Folders are read recursively, sorted by
    path. Which documents are held out depends on their text alone; shards depend neither on --workers nor on
    interruptions, after which the same command goes on. A data set can be read once it is whole.
    """

    at: ClassVar[str] = OPTION
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Text files and folders."""
    out: str = "shards"
    """Folder to create, or bucket URL such as gs://bucket/shards."""
    name: str = "text"
    """Shards are called NAME_val_000000.bin and NAME_train_000001.bin, ..."""
    tokenizer: str = "byte"
    """`byte`, `gpt2`, or the path of a tokenizers JSON file; the same value goes into --data.tokenizer."""
    text_field: str = "text"
    """Field of a .jsonl line, or of a data set's row, that holds the text."""
    holdout: Literal["auto", "documents", "tails"] = "auto"
    """What to hold out for validation: whole documents, or the tail of every document (from a line break on, where
    possible). auto: documents if there are at least 100, else tails."""
    val_fraction: Annotated[float, Range(ge=0, lt=1)] = 0.1
    """Fraction of the documents, or of each document's characters, to hold out; 0: none (training needs validation
    shards, so add some to the folder yourself)."""
    shard_tokens: Annotated[int, Range(ge=1, lt=2**31)] = 10**8
    """Tokens per shard; up to two shards are held in memory, 2 bytes a token."""
    workers: NotNegative = 0
    """Processes that read and tokenize; 0: one for each core."""
    part: str = "1/1"
    """I/N, from 1/N to N/N: the I-th of N parts of the files (those of the data set, with --hf-dataset), each made by a
    command of its own, on any host, into one --out. Part I writes each N-th shard number."""
    overwrite: bool = False
    """Replace the folder --out if it exists, which must hold only shards, and drop what was begun of it."""
    hf_dataset: str = ""
    """Hugging Face data set to stream instead of files, such as HuggingFaceFW/fineweb-edu; needs the package
    `datasets`."""
    hf_config: str | None = None
    """Configuration of that data set, such as sample-100BT."""
    hf_split: str = "train"
    """Split of that data set."""


def _part(text: str) -> tuple[int, int] | None:
    """The numbers of I/N; None: it is not of that form."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part = (int(match[1]), int(match[2])) if match else (0, 0)
    return part if 1 <= part[0] <= part[1] else None


def _check(args: PrepareArgs) -> None:
    faults = args.faults()
    if bool(args.inputs) == bool(args.hf_dataset):
        faults.append("Name either text files and folders, or one --hf-dataset.")
    if not args.name or os.sep in args.name:
        faults.append(f"--name {args.name!r} must be a part of a file name.")
    if _part(args.part) is None:
        faults.append(f"--part {args.part} must be I/N, such as 1/4, 2/4, 3/4 and 4/4.")
    if faults:
        raise DataError(faults)
    check_storage(args.out)


def _continued(found: Progress | None, plan: dict[str, object], place: Place) -> Progress | None:
    """The progress that was found, if it is of the same plan.

    Raises:
      DataError: it is of another; names what differs.
    """
    if found is None:
        return None
    if other := [name for name, value in plan.items() if found.plan.get(name) != value]:
        shown = ", ".join(
            f"{name} (was {found.plan.get(name)})" if name != "inputs" else "input files" for name in other
        )
        raise DataError(
            f"{place.folder} was begun with other options: {shown}. Give the same to go on, or another --out; "
            "--overwrite starts anew."
        )
    return found


def _n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def _size(n_bytes: float) -> str:
    return tqdm.format_sizeof(n_bytes, "B", 1000)


def _announce(
    chunks: Sequence[Chunk], recipe: Recipe, progress: Progress, place: Place, workers: int
) -> None:
    """Says what is to be done, and what it takes.

    Raises:
      DataError: the disk is too small.
    """
    assert progress.n_bytes is not None
    sampled = estimate(chunks, recipe)
    n_tokens = progress.n_bytes * sampled.tokens_per_byte
    left = n_tokens * (1 - progress.done_bytes / progress.n_bytes)
    needed = 2 * (left + sum(map(len, progress.rest)))
    free = ""
    if not is_remote(place.out):
        room = shutil.disk_usage(Path(place.folder).resolve().parent).free
        free = f" of {_size(room)} that are free"
        if 0.9 * needed > room:
            raise DataError(
                f"{place.out}: about {_size(needed)} are needed, and {_size(room)} are free; make room there, or name "
                "another --out."
            )
    done = f", {progress.done_bytes / progress.n_bytes:.0%} of them done" if progress.chunks else ""
    _say(
        f"{progress.n_documents:,} documents, {_size(progress.n_bytes)} of text{done}; to make are about "
        f"{left:,.0f} tokens, {_size(needed)} on disk{free}. With {workers} process(es) that takes about "
        f"{tqdm.format_interval(left / sampled.tokens_per_second / workers)}."
    )


@command
def main(argv: Sequence[str]) -> int:
    """Makes the shards; returns the exit status."""
    args = tyro.cli(PrepareArgs, args=argv, prog="mlra-prepare")
    _check(args)
    part = _part(args.part)
    assert part is not None
    out = args.out if is_remote(args.out) else str(Path(args.out).expanduser())
    place = Place(out, args.name, part)
    if faults := place.faults(args.overwrite):
        raise DataError(faults)
    tokenizer = get_tokenizer(args.tokenizer)
    if tokenizer.n_vocab > MAX_ID + 1:
        raise DataError(
            f"--tokenizer {args.tokenizer} has {tokenizer.n_vocab:,} ids; shards hold 16-bit ids, "
            f"at most {MAX_ID + 1:,} of them."
        )
    if place.finished():
        print(f"{out}: part {args.part} is finished.")
        return 0

    all_files = [] if args.hf_dataset else text_files(args.inputs)
    files = all_files[part[0] - 1 :: part[1]]
    if all_files and len(all_files) < part[1]:
        raise DataError(f"--part {args.part}: there are {len(all_files)} files; use no more parts.")
    source = ("hf_dataset", "hf_config", "hf_split") if args.hf_dataset else ()
    options = ("name", "text_field", "holdout", "val_fraction", "shard_tokens", *source)
    plan = {name: getattr(args, name) for name in options}
    plan |= {"tokenizer": fingerprint(args.tokenizer), "inputs": digest(files)}

    with place.held():
        progress = None if args.overwrite else _continued(place.load(), plan, place)
        n_workers = args.workers or _n_cores()
        chunks: Iterable[Chunk]
        if args.hf_dataset:
            names = args.hf_dataset, args.hf_config, args.hf_split, args.text_field
            chunks = hugging_face(*names, part, progress and progress.stream)
            skip = progress.chunks if progress and progress.stream is None else 0
            chunks = itertools.islice(chunks, skip, None)
            ahead = list(itertools.islice(chunks, n_workers))
            chunks, n_workers = itertools.chain(ahead, chunks), max(1, min(n_workers, len(ahead)))
        else:
            all_chunks = chunks_of(files)
            n_workers = max(1, min(n_workers, len(all_chunks)))

        with Workers(args.tokenizer, n_workers) as workers:
            new = progress is None
            if progress is None:
                progress = Progress(plan, "documents" if args.holdout == "auto" else args.holdout)
                if not args.hf_dataset:
                    _scan(all_chunks, workers, progress, args.text_field)
                    if args.holdout == "auto" and count(chunks_of(all_files), args.text_field, 100) < 100:
                        progress.holdout = "tails"
            recipe = Recipe(
                name=args.name,
                tokenizer=args.tokenizer,
                text_field=args.text_field,
                holdout=progress.holdout,
                val_fraction=args.val_fraction,
                shard_tokens=args.shard_tokens,
                part=part,
            )
            if not args.hf_dataset:
                _announce(all_chunks, recipe, progress, place, n_workers)
                chunks = all_chunks[progress.chunks :]
            else:
                _say(f"The size of {args.hf_dataset} is not known; a token takes 2 bytes on disk.")
            if new:
                place.begin(progress)
            with tqdm(
                total=progress.n_bytes,
                initial=progress.done_bytes,
                unit="B",
                unit_scale=True,
                desc="tokenizing",
            ) as bar:

                def advance(n_bytes: int, n_tokens: int) -> None:
                    bar.update(n_bytes)
                    bar.set_postfix(tokens=f"{n_tokens:,}", refresh=False)

                n_tokens = write_shards(chunks, recipe, progress, place, workers, advance)
        missing = place.finish(n_tokens)
    which = f", part {args.part}" if part[1] > 1 else ""
    print(
        f"{out}{which}: {n_tokens['train']:,} tokens for training, {n_tokens['val']:,} held out ({recipe.holdout})."
    )
    if part[1] > 1:
        print(f"Still to be made: {', '.join(missing)}." if missing else f"All {part[1]} parts are finished.")
    return 0


def _scan(chunks: Sequence[Chunk], workers: Workers, progress: Progress, text_field: str) -> None:
    """Reads everything once, so that faults show before any work is done, and counts documents and their bytes.

    Raises:
      DataError: files that cannot be read, all listed, or no text at all.
    """
    faults: dict[str, str] = {}
    progress.n_documents = progress.n_bytes = 0
    look = functools.partial(scan, text_field=text_field)
    for found in tqdm(workers.map(look, chunks), total=len(chunks), desc="reading", leave=False):
        progress.n_documents += found.n_documents
        progress.n_bytes += found.n_bytes
        for path, fault in found.faults:
            faults.setdefault(path, fault)  # the first of each file
    if faults:
        raise DataError(list(faults.values()))
    if not progress.n_documents:
        raise DataError("The files hold no text.")


if __name__ == "__main__":
    sys.exit(main())
