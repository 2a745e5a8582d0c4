"""`mlra-prepare TEXTS [TEXTS ...] --out FOLDER`: from text to token shards."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import tyro
from tqdm import tqdm

from mlra_jax.cli import command
from mlra_jax.config import OPTION, Range, Validated
from mlra_jax.data.shards import MAX_ID, DataError, ShardWriter
from mlra_jax.data.tokenizers import Tokenizer, get_tokenizer
from mlra_jax.storage import whole_folder
from mlra_jax.textfiles import TextError, decode_text

SUFFIXES = (".txt", ".md", ".jsonl")
_BATCH_CHARACTERS = 1 << 20  # text that is tokenized at a time


@dataclasses.dataclass(frozen=True)
class PrepareArgs(Validated):
    """Turns text into token shards: files, folders of .txt, .md and .jsonl files, or a Hugging Face data set.

    Each .txt or .md file and each line of a .jsonl file is a document, written as the end-of-text id followed by its
    tokens. Text is UTF-8; byte-order marks are dropped and CRLF becomes LF. Folders are read recursively, sorted by
    path. The folder --out appears once everything is written. Which documents are held out depends on their text alone.
    """

    at: ClassVar[str] = OPTION
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Text files and folders."""
    out: str = "shards"
    """Local folder to create."""
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
    """Tokens per shard."""
    overwrite: bool = False
    """Replace the folder --out if it exists; it must hold only shards."""
    hf_dataset: str = ""
    """Hugging Face data set to stream instead of files, such as HuggingFaceFW/fineweb-edu; needs the package
    `datasets`."""
    hf_config: str | None = None
    """Configuration of that data set, such as sample-100BT."""
    hf_split: str = "train"
    """Split of that data set."""


Document = tuple[str, int]
"""Its text, and its size in bytes of input, for the progress bar."""


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


def read_file(path: Path, text_field: str) -> Iterator[Document]:
    """Yields the documents of a file that are not blank.

    Raises:
      DataError: the file cannot be read, is not UTF-8, or has a line without text.
    """
    where = str(path)
    try:
        with open(path, "rb") as file:
            if path.suffix != ".jsonl":
                data = file.read()
                yield from _not_blank(decode_text(data, where), len(data))
                return
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                if not line.strip():
                    continue
                row = json.loads(decode_text(line, str(path), number))
                text = row.get(text_field) if isinstance(row, dict) else None
                if not isinstance(text, str):
                    raise DataError(
                        f"{where}: no text in the field {text_field!r}; name another with --text-field."
                    )
                yield from _not_blank(text, len(line))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except TextError as error:
        raise DataError(str(error)) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}.") from error


def _not_blank(text: str, size: int) -> Iterator[Document]:
    if text.strip():
        yield text, size


def read_hf(args: PrepareArgs) -> Iterator[Document]:
    """Streams the rows of a Hugging Face data set that are not blank.

    Raises:
      DataError: `datasets` is not installed, or the data set cannot be read or lacks the field.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("--hf-dataset needs the package datasets: pip install datasets.") from error
    try:
        for row in datasets.load_dataset(
            args.hf_dataset, args.hf_config, split=args.hf_split, streaming=True
        ):
            text = row.get(args.text_field)
            if not isinstance(text, str):
                raise DataError(
                    f"{args.hf_dataset} has no text in the field {args.text_field!r}; it has {sorted(row)}."
                )
            yield from _not_blank(text, len(text.encode()))
    except DataError:
        raise
    except Exception as error:  # network, wrong name: whatever the library raises
        raise DataError(f"Reading {args.hf_dataset} failed with {type(error).__name__}: {error}.") from error


def scan(files: Sequence[Path], text_field: str) -> tuple[int, int]:
    """Reads everything once, so that faults show before any work is done; returns the documents and their bytes.

    Raises:
      DataError: files that cannot be read, all listed, or no text at all.
    """
    n_documents = n_bytes = 0
    faults = []
    for path in files:
        try:
            for _, size in read_file(path, text_field):
                n_documents += 1
                n_bytes += size
        except DataError as error:
            faults += error.faults
    if faults:
        raise DataError(faults)
    if not n_documents:
        raise DataError(f"The {len(files)} file(s) hold no text.")
    return n_documents, n_bytes


def split_document(text: str, holdout: Literal["documents", "tails"], val_fraction: float) -> tuple[str, str]:
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


def write_shards(
    documents: Iterable[Document],
    folder: Path,
    args: PrepareArgs,
    tokenizer: Tokenizer,
    holdout: Literal["documents", "tails"],
    n_bytes: int | None,
) -> dict[str, int]:
    """Writes all documents as shards into `folder`; returns the tokens of `train` and `val`.

    A progress bar counts bytes of input, of `n_bytes` if that is known.
    """
    with ExitStack() as stack:
        writers = [
            stack.enter_context(ShardWriter(folder, args.name, split, args.shard_tokens, args.tokenizer))
            for split in ("train", "val")
        ]
        bar = stack.enter_context(tqdm(total=n_bytes, unit="B", unit_scale=True, desc="tokenizing"))
        for batch in _batches(documents):
            parts = zip(*(split_document(text, holdout, args.val_fraction) for text, _ in batch), strict=True)
            for writer, texts in zip(writers, parts, strict=True):
                for ids in tokenizer.encode_batch([text for text in texts if text]):
                    writer.write(np.insert(ids, 0, tokenizer.eot_id))
            bar.update(sum(size for _, size in batch))
            bar.set_postfix(tokens=f"{sum(w.n_tokens for w in writers):,}", refresh=False)
    return {"train": writers[0].n_tokens, "val": writers[1].n_tokens}


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about `_BATCH_CHARACTERS` characters."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document[0])
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check(args: PrepareArgs) -> None:
    faults = args.faults()
    if bool(args.inputs) == bool(args.hf_dataset):
        faults.append("Name either text files and folders, or one --hf-dataset.")
    if not args.name or os.sep in args.name:
        faults.append(f"--name {args.name!r} must be a part of a file name.")
    if "://" in args.out:
        faults.append(
            f"--out {args.out}: shards are written to a local folder; copy it to the bucket afterwards."
        )
    out = Path(args.out).expanduser()
    if out.exists() and not args.overwrite:
        faults.append(f"{out} exists; name another --out, or replace it with --overwrite.")
    elif out.exists() and (not out.is_dir() or any(p.suffix != ".bin" for p in out.iterdir())):
        faults.append(f"{out} holds more than shards; --overwrite replaces only a folder of .bin files.")
    if faults:
        raise DataError(faults)


@command
def main(argv: Sequence[str]) -> int:
    """Makes the shards; returns the exit status."""
    args = tyro.cli(PrepareArgs, args=argv, prog="mlra-prepare")
    _check(args)
    tokenizer = get_tokenizer(args.tokenizer)
    if tokenizer.n_vocab > MAX_ID + 1:
        raise DataError(
            f"--tokenizer {args.tokenizer} has {tokenizer.n_vocab:,} ids; shards hold 16-bit ids, "
            f"at most {MAX_ID + 1:,} of them."
        )

    documents: Iterable[Document]
    if args.hf_dataset:
        documents, n_documents, n_bytes = read_hf(args), None, None
    else:
        files = text_files(args.inputs)
        n_documents, n_bytes = scan(files, args.text_field)
        documents = itertools.chain.from_iterable(read_file(path, args.text_field) for path in files)
    if args.holdout != "auto":
        holdout = args.holdout
    else:
        holdout = "tails" if n_documents is not None and n_documents < 100 else "documents"

    out = Path(args.out).expanduser()
    with whole_folder(out) as partial:
        n_tokens = write_shards(documents, partial, args, tokenizer, holdout, n_bytes)
        if not n_tokens["train"] or (args.val_fraction and not n_tokens["val"]):
            raise DataError(
                f"Nothing is left for {'training' if n_tokens['val'] else 'validation'} with --holdout {holdout} and "
                f"--val-fraction {args.val_fraction}; try --holdout tails, another fraction, or more text."
            )
    print(f"{out}: {n_tokens['train']:,} tokens for training, {n_tokens['val']:,} held out ({holdout}).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
