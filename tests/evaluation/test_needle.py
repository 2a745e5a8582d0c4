"""Finding a number in a long text: what is asked, and how answers are counted."""

import re

import numpy as np
import pytest

from mlra_jax.config import ConfigError
from mlra_jax.data.tokenizers import get_tokenizer
from mlra_jax.evaluation.needle import HAYSTACK, Found, find_needles, heat_map, sequence
from mlra_jax.evaluation.scoring import Score


class Words:
    """A tokenizer of another kind than bytes: words, numbered as they come."""

    eot_id = 0

    def __init__(self):
        self.ids = {"": 0}

    def encode(self, text):
        return [self.ids.setdefault(word, len(self.ids)) for word in re.findall(r" ?[^ ]+", text)]

    def decode(self, ids):
        words = {i: word for word, i in self.ids.items()}
        return "".join(words[i] for i in ids)


@pytest.mark.parametrize("tokenizer", [get_tokenizer("byte"), Words()], ids=["bytes", "words"])
def test_a_sequence_has_its_length_and_the_needle_at_its_depth(tokenizer):
    for length, depth in ((200, 0.0), (200, 1.0), (301, 0.25)):
        context, answer = sequence(tokenizer, length, depth, "48213")
        assert len(context) + len(answer) == length
        assert context[0] == tokenizer.eot_id
        text = tokenizer.decode(context[1:])
        assert tokenizer.decode(answer) == " 48213"
        assert text.endswith(" What is the pass key? The pass key is")
        before, after = text.removesuffix(" What is the pass key? The pass key is").split(
            " The pass key is 48213. Remember it."
        )
        assert (HAYSTACK * 20).startswith(before + after)
        ids = [len(tokenizer.encode(part)) for part in (before, after)]
        assert abs(ids[0] - depth * sum(ids)) <= 1
    with pytest.raises(ConfigError, match="A sequence of 10 tokens has no room for a needle and a question"):
        sequence(tokenizer, 10, 0.5, "48213")


class Nearsighted:
    """Knows a number only if it is among the last 300 bytes."""

    def __init__(self):
        self.keys = set()

    def score(self, pairs, *, progress):
        scores = []
        for context, answer in pairs:
            key = bytes(answer)
            self.keys.add(key)
            assert bytes(context[1:]).count(b"is" + key) == 1
            scores.append(Score(-1.0, b"is" + key in bytes(context[1:])[-300:]))
        return scores


def test_answers_are_counted_by_length_and_depth_and_drawn():
    model = Nearsighted()
    found = find_needles(model, get_tokenizer("byte"), [256, 1024], [0, 50, 100], samples=5)
    assert found == Found((256, 1024), (0, 50, 100), ((1, 1, 1), (0, 0, 1)))
    assert len(model.keys) > 25  # of 30
    assert all(re.fullmatch(rb" [1-9]\d{4}", key) for key in model.keys)
    axes = heat_map(found, "nearsighted").axes[0]
    assert np.asarray(axes.images[0].get_array()).tolist() == [[1, 0], [1, 0], [1, 1]]
    assert [text.get_text() for text in axes.texts] == ["100%", "0%", "100%", "0%", "100%", "100%"]
