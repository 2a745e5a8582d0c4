"""Text from tokens: cut before stop strings wherever they fall, and nothing shown that is taken back later."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax.data.tokenizers import ByteTokenizer
from mlra_jax.generation.text import RowText

EOS = 256


def feed(text, stop=(), limit=10_000, end=()):
    """The row after the bytes of `text` and the ids `end`, and what `take` gave after each."""
    row = RowText(ByteTokenizer(), stop, EOS, limit)
    shown = [row.take()]
    for token in [*text.encode(), *end]:
        row.push(token)
        shown.append(row.take())
    return row, shown


letters = st.text(alphabet="abé€", max_size=30)
stops = st.lists(st.text(alphabet="abé€", min_size=1, max_size=4), max_size=3)


@settings(deadline=None, max_examples=300)
@given(letters, stops)
def test_text_ends_before_the_stop_string_that_is_complete_first(text, stop):
    row, shown = feed(text, stop, end=[EOS])
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if not ends:
        assert (row.text, row.finish_reason) == (text, "eos")
    else:
        complete = [s for s in stop if s in text and text.find(s) + len(s) == min(ends)]
        assert row.text == text[: min(text.find(s) for s in complete)]
        assert row.finish_reason == "stop"
    for given_so_far in itertools.accumulate(shown):
        assert row.text.startswith(given_so_far)
    assert "".join(shown) == row.text


def test_a_possible_stop_string_is_held_back_until_it_is_none():
    _, shown = feed("xSTx", ["STOP"], end=[EOS])
    assert shown == ["", "x", "", "", "STx", ""]
    row, shown = feed("xSTOPy", ["STOP"])
    assert "".join(shown) == row.text == "x"
    assert len(row.tokens) == 5  # up to the one that completes it


def test_half_a_character_waits_for_the_rest_and_is_replaced_at_the_end():
    row = RowText(ByteTokenizer(), [], EOS, 100)
    row.push("é".encode()[0])
    assert row.take() == ""
    row.push("é".encode()[1])
    assert row.take() == "é"
    row.push("é".encode()[0])
    row.push(EOS)
    assert row.take() == "\ufffd"
    assert row.text == "é\ufffd"


def test_bytes_that_never_become_a_character_hide_neither_what_follows_nor_a_stop_string():
    row = RowText(ByteTokenizer(), ["STOP"], EOS, 10_000)
    for i in range(1000):
        row.push(0xF0)
        assert len("".join([row.take()])) == (i > 0)
    for token in b"xSTOP":
        row.push(token)
    assert (row.text, row.finish_reason) == ("\ufffd" * 1000 + "x", "stop")
    assert row.take() == "\ufffdx"


def test_what_is_looked_through_for_each_token_does_not_grow_with_the_text(monkeypatch):
    row = RowText(ByteTokenizer(), ["aab"], EOS, 10_000)
    sizes = []
    for _ in range(1000):
        row.push(ord("a"))
        sizes.append(len(row._held))
    assert max(sizes) == 2
    assert row.text == "a" * 1000


def test_the_end_of_text_is_no_part_of_the_text_and_ends_it():
    row, _ = feed("ab", end=[EOS, *b"cd"])
    assert (row.text, row.tokens, row.finish_reason) == ("ab", [97, 98], "eos")


def test_a_row_ends_with_its_last_token_allowed():
    row, shown = feed("abcdef", limit=3)
    assert (row.text, row.finish_reason, "".join(shown)) == ("abc", "length", "abc")


def test_a_stop_string_in_the_last_token_allowed_counts():
    row, _ = feed("abc", ["c"], limit=3)
    assert (row.text, row.finish_reason) == ("ab", "stop")
