"""The embedded corpus: eight plays of Shakespeare, 1.02 MB of ASCII; README.md here says where from and how.

Its split is fixed: *Macbeth* (9.4 % of the bytes) is held out whole, seven other plays are for training.
"""

from __future__ import annotations

import lzma
from importlib import resources
from typing import Literal

import numpy as np

from mlra_jax.data.tokenizers import Tokenizer


def documents(split: Literal["train", "val"]) -> list[str]:
    """The plays of one part, sorted by file name; speeches are `SPEAKER:` and its lines, then an empty line."""
    folder = resources.files(__name__) / split
    files = sorted(
        (f for f in folder.iterdir() if f.name.endswith(".txt.xz")),
        key=lambda f: f.name,
    )
    return [lzma.decompress(f.read_bytes()).decode("ascii") for f in files]


def tokens(tokenizer: Tokenizer, split: Literal["train", "val"]) -> np.ndarray:
    """Ids of one part, int32 [n]; each play is preceded by the end-of-text id, as in the shards of `prepare`."""
    encoded = tokenizer.encode_batch(documents(split))
    return np.concatenate([np.insert(ids, 0, tokenizer.eot_id) for ids in encoded]).astype(np.int32)
