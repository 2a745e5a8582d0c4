"""Turns the packages' files into shards: trains a tokenizer, holds documents out, and describes the data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.corpora import SOURCES, find_archives
from benchmarks.study.models import VOCAB
from mlra_jax.cli.prepare import main as write_shards
from mlra_jax.cli.prepare import split_document
from mlra_jax.data.shards import DataError, Split, open_shards, without_tokenizer
from mlra_jax.data.tokenizers import END_OF_TEXT, get_tokenizer

VAL_FRACTION = 0.03
"""Share of the documents that is held out."""
DESCRIPTION = "data.json"


@dataclasses.dataclass(frozen=True)
class Data:
    """A folder that `prepare` made."""

    folder: Path
    tokens: dict[Split, int]
    """Tokens of each split."""
    sources: dict[str, dict[str, Any]]
    """Documents and bytes, total and held out, by source."""
    digest: str
    """The first 16 digits of the tokens' SHA-256."""
    byte_lengths: np.ndarray
    """Bytes of text that each id stands for, int32 [V]."""

    @property
    def shards(self) -> str:
        """Folder of the shards."""
        return str(self.folder / "shards")

    @property
    def tokenizer(self) -> str:
        """Its JSON file."""
        return str(self.folder / "tokenizer.json")

    @classmethod
    def open(cls, folder: Path) -> Data:
        """Reads the description of what `prepare` left in `folder`.

        Raises:
          DataError: it is not such a folder.
        """
        try:
            d = json.loads((folder / DESCRIPTION).read_text())
            return cls(folder, d["tokens"], d["sources"], d["digest"], np.array(d["byte_lengths"], np.int32))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{folder} is no folder that `python -m benchmarks.study prepare` made: {error}."
            ) from error


def prepare(downloads: Path, out: Path, names: Sequence[str] = tuple(SOURCES)) -> Data:
    """Reads the packages in `downloads`, trains a byte-level BPE and writes `out`/shards, tokenizer.json and data.json.

    Which documents are held out depends on their text alone, and the tokenizer is trained on the others. The shards
    depend on the packages and on the version of `tokenizers` only.

    Raises:
      DataError: `out` exists, or packages are missing or are not what they should be.
      ValueError: the package `tokenizers` is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError("The study trains a tokenizer: pip install tokenizers.") from error
    if out.exists():
        raise DataError(f"{out} exists; name another --out, or delete it.")
    archives = find_archives(downloads, list(names))
    documents = {name: list(SOURCES[name].documents(path)) for name, path in archives.items()}
    split = lambda text: split_document(text, "documents", VAL_FRACTION)

    out.mkdir(parents=True)
    bpe = tokenizers.ByteLevelBPETokenizer()
    training = (text for texts in documents.values() for text in texts if split(text)[0])
    bpe.train_from_iterator(training, VOCAB, special_tokens=[END_OF_TEXT], show_progress=False)
    bpe.save(str(out / "tokenizer.json"))

    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", dir=out, encoding="utf-8") as corpus:
        for texts in documents.values():
            corpus.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        corpus.flush()
        write_shards(
            [
                corpus.name,
                *(
                    "--out",
                    str(out / "shards"),
                    "--name",
                    "study",
                    "--tokenizer",
                    str(out / "tokenizer.json"),
                ),
                *("--holdout", "documents", "--val-fraction", str(VAL_FRACTION)),
            ]
        )

    def described(texts: Sequence[str]) -> dict[str, int]:
        held_out = [text for text in texts if split(text)[1]]
        size = lambda texts: sum(len(text.encode()) for text in texts)
        return {
            "documents": len(texts),
            "bytes": size(texts),
            "held_out_documents": len(held_out),
            "held_out_bytes": size(held_out),
        }

    parts: tuple[Split, ...] = ("train", "val")
    shards = {part: open_shards(str(out / "shards"), part) for part in parts}
    digest = hashlib.sha256()
    for path in sorted((out / "shards").iterdir()):
        digest.update(without_tokenizer(path.read_bytes()))  # of which shards once told nothing
    lengths = get_tokenizer(str(out / "tokenizer.json")).byte_lengths()
    assert lengths is not None
    description = {
        "sources": {name: described(texts) for name, texts in documents.items()},
        "tokens": {part: int(sum(shards[part].n_tokens)) for part in parts},
        "digest": digest.hexdigest()[:16],
        "byte_lengths": lengths.tolist(),
    }
    (out / DESCRIPTION).write_text(json.dumps(description) + "\n")
    return Data.open(out)
