"""How text files of users are read: as UTF-8, without a byte-order mark, with LF line ends."""

from __future__ import annotations

import codecs

from etils import epath

from mlra_jax.errors import UserError


class TextError(UserError):
    """Text that is not UTF-8."""


def decode_text(data: bytes, where: str, first_line: int = 1) -> str:
    """Decodes text, dropping a byte-order mark and replacing CRLF by LF.

    Args:
      data: UTF-8.
      where: where it comes from, for the message.
      first_line: number of its first line there.

    Raises:
      TextError: it is not UTF-8; names the line, and the byte in that line, both counted from 1.
    """
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, byte = first_line + before.count(b"\n"), error.start - before.rfind(b"\n")
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        hint = "it looks like UTF-16; save it as UTF-8" if utf16 else "save it as UTF-8"
        raise TextError(
            f"{where}, line {line}, byte {byte} is not UTF-8 text ({error.reason}): {hint}."
        ) from error


def read_text(path: epath.PathLike) -> str:
    """Reads a text file; see `decode_text`.

    Args:
      path: local, or a bucket URL.

    Raises:
      OSError: the file cannot be read.
      TextError: it is not UTF-8.
    """
    return decode_text(epath.Path(path).expanduser().read_bytes(), str(path))
