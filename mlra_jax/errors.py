"""Errors that are not bugs of this package, and the sentence that a command shows for each.

Code that raises one of these classes knows that the user (or the machine) is at fault, and says in one sentence what is
wrong, where, and what to do. Anything else, a ValueError included, is a bug, whose traceback is needed.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

_PATH = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.EPERM,
}
_ADVICE = {
    errno.ENOSPC: "make room there, or name another place",
    errno.EDQUOT: "make room there, or name another place",
    errno.EFBIG: "raise the limit on the size of files, or name another place",
    errno.EIO: "check the disk, or name another place",
    errno.EROFS: "name another place",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; check the path",
    errno.EISDIR: "a file is wanted, and this is a folder; check the path",
    errno.EEXIST: "name another place, or remove it",
    errno.ENOTEMPTY: "name another place, or remove it",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
}
_PACKAGE = Path(__file__).resolve().parent


class ExplainedError(Exception):
    """Not a bug: its message is all that a command shows."""


class UserError(ExplainedError, ValueError):
    """A request that cannot be met; the message says what is wrong, where, and what to do."""


class FaultsError(UserError):
    """One or more faults of one kind; the message lists all of them.

    Args:
      faults: sentences, or one of them.
    """

    where = "what was given"

    def __init__(self, faults: str | Sequence[str]):
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        many = f"{len(self.faults)} faults in {self.where}:\n  - " if len(self.faults) > 1 else ""
        super().__init__(many + "\n  - ".join(self.faults))


def explain(error: BaseException) -> str | None:
    """The sentence that explains `error`; None if it is a bug, whose traceback is needed.

    An `ExplainedError` is its own sentence. For an OSError the sentence names the path or stream; it is a bug only if
    it concerns a file of this package.
    """
    if isinstance(error, ExplainedError):
        return str(error)
    if not isinstance(error, OSError):
        return None
    paths = [
        os.fsdecode(p) for p in (error.filename, error.filename2) if isinstance(p, str | bytes | os.PathLike)
    ]
    if any(_PACKAGE in Path(p).absolute().parents for p in paths):
        return None
    if error.errno is None or not error.strerror:
        return str(error) or type(error).__name__  # raised with a sentence, or by a library
    where = " -> ".join(paths) or "standard output, or a file that the system does not name"
    return (
        f"{where}: {error.strerror}; {_ADVICE.get(error.errno, 'check the path, and what it is stored on')}."
    )


def is_refusal(error: BaseException) -> bool:
    """Whether the command must be changed (a `UserError`, or a wrong path); otherwise the machine is at fault."""
    return isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in {None, *_PATH})


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds the path to an OSError that lacks one, such as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise
