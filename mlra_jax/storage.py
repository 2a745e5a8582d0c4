"""Storage of data, runs and checkpoints: local folders, and buckets that fsspec supports."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import fsspec

from mlra_jax.errors import UserError, naming

RUN_PROTOCOLS = ("gs", "s3")
"""Buckets that can hold runs and checkpoints: those that both etils and Orbax support."""

_PACKAGES = {
    "gs": "mlra_jax[gcs]",
    "gcs": "mlra_jax[gcs]",
    "s3": "s3fs",
    "abfs": "adlfs",
    "az": "adlfs",
}


class StorageError(UserError):
    """A URL whose storage is not available."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is in a bucket rather than in a local folder."""
    return "://" in str(path)


def check_storage(path: str | os.PathLike[str], protocols: Collection[str] = ()) -> None:
    """Refuses a URL whose storage is unknown or whose library is not installed; uses no network.

    Args:
      path: a local path (always accepted) or a URL such as `gs://bucket/folder`.
      protocols: protocols to accept; empty: all that fsspec supports.

    Raises:
      StorageError: says what to install, or which storage there is.
    """
    if not is_remote(path):
        return
    protocol = str(path).split("://")[0].split("::")[-1]  # of simplecache::gs://... the last one
    if protocols and protocol not in protocols:
        known = " or ".join(f"{p}://" for p in protocols)
        raise StorageError(f"{path}: must be a local folder, or a URL that begins with {known}.")
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = _PACKAGES.get(protocol, f"what fsspec asks for: {error}")
        raise StorageError(f"Using {path} needs another library: pip install '{package}'.") from error
    except ValueError as error:
        raise StorageError(f"{path}: fsspec knows no storage called {protocol}://.") from error


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the path of a temporary file to write, which replaces `path` once it is complete and on disk.

    An exception inside leaves `path` as it was.

    Raises:
      OSError: it cannot be written; names the path.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with naming(path):
            yield unfinished
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file atomically.

    Args:
      path: local (see `whole_file`), or a bucket URL (buckets hold whole objects only).
      content: text is written as UTF-8.

    Raises:
      OSError: it cannot be written; names the path.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        try:
            fs, place = fsspec.core.url_to_fs(os.fspath(path))
            fs.pipe_file(place, data)
        except Exception as error:  # network, credentials: whatever the bucket's library raises
            raise OSError(
                f"Writing {path} failed with {type(error).__name__}: {error}; check the bucket."
            ) from error
        return
    with whole_file(path) as unfinished:
        unfinished.write_bytes(data)


@contextlib.contextmanager
def exclusive(path: str | os.PathLike[str], use: str) -> Iterator[None]:
    """Holds the lock file `path`, which only one process can hold; the lock ends with its process.

    Works on local file systems, and network file systems with `flock`; does nothing on others and in buckets. A file
    left by a killed process locks nothing.

    Args:
      path: a file in an existing local folder, or in a bucket.
      use: what the lock is for, as the start of a sentence.

    Raises:
      UserError: another process holds it.
      OSError: the file cannot be made.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        fcntl = None  # type: ignore[assignment]
    if fcntl is None or is_remote(path):
        yield
        return
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                f"{use} by another process, which still runs; wait for it or name another place."
            ) from None
        except OSError:  # the file system has no locks
            break
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # the one that held it has removed the file since it was opened here
    try:
        yield
    finally:
        Path(path).unlink(missing_ok=True)  # before it is released: others then open a new file
        os.close(descriptor)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a local folder to fill, which replaces `path` once it is complete.

    Until then it is beside it, under a name that ends in `.partial`; an exception inside removes it.

    Raises:
      UserError: another process is making the same folder.
      OSError: it cannot be written; names a path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = lambda suffix: path.with_name(f"{path.name}.{suffix}")
    partial, replaced = beside("partial"), beside("replaced")
    with exclusive(beside("lock"), f"{path} is being made"):
        for left in (partial, replaced):  # by a killed process
            shutil.rmtree(left, ignore_errors=True)
        try:
            with naming(path):
                partial.mkdir()
                yield partial
            if path.exists():
                path.replace(replaced)
            partial.replace(path)
        finally:
            for left in (partial, replaced):
                shutil.rmtree(left, ignore_errors=True)
