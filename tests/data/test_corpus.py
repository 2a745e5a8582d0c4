"""The embedded corpus is fixed: its sizes, split and form."""

import hashlib
import re

import pytest

from mlra_jax.data import corpus
from mlra_jax.data.tokenizers import ByteTokenizer


@pytest.mark.parametrize(("split", "n_bytes", "n_plays"), [("train", 924_212, 7), ("val", 95_848, 1)])
def test_split_is_fixed(split, n_bytes, n_plays):
    plays = corpus.documents(split)
    assert (sum(map(len, plays)), len(plays)) == (n_bytes, n_plays)
    assert hashlib.sha256("".join(plays).encode()).hexdigest()[:16] == SHA256[split]


SHA256 = {"train": "8ba0672229ea22e1", "val": "2746d4f875e5d677"}


def test_no_play_is_in_both_parts():
    assert not set(corpus.documents("train")) & set(corpus.documents("val"))


def test_text_is_speeches_in_ascii_without_markup():
    for play in corpus.documents("train") + corpus.documents("val"):
        assert play.isascii()
        assert not re.search(r"[][*_#\\<>]|  |\.\.\.|\n\n\n", play)
        for speech in play.removesuffix("\n").split("\n\n"):
            assert re.fullmatch(r"[A-Z' &-]+:(\n\S.*)+", speech), speech


def test_tokens_begin_every_play_with_end_of_text():
    ids = corpus.tokens(ByteTokenizer(), "train")
    plays = "".join(chr(i) for i in ids[1:]).split(chr(256))
    assert plays == corpus.documents("train")
    assert (ids[0], (ids == 256).sum()) == (256, 7)
