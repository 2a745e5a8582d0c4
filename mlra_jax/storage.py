"""Where data, runs and checkpoints may be: local folders, and buckets that fsspec knows."""

from __future__ import annotations

import os
from collections.abc import Collection

import fsspec

RUN_PROTOCOLS = ("gs", "s3")
"""Buckets that a run or a checkpoint can be in: those that both etils and Orbax know."""

_PACKAGES = {
    "gs": "mlra_jax[gcs]",
    "gcs": "mlra_jax[gcs]",
    "s3": "s3fs",
    "abfs": "adlfs",
    "az": "adlfs",
}


class StorageError(ValueError):
    """A URL whose storage cannot be used here."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is in a bucket rather than in a local folder."""
    return "://" in str(path)


def check_storage(path: str | os.PathLike[str], protocols: Collection[str] = ()) -> None:
    """Refuses a URL whose storage is unknown or whose library is not installed; touches no network.

    Args:
      path: a local path (always accepted) or a URL such as `gs://bucket/folder`.
      protocols: the ones that will do; empty: all that fsspec knows.

    Raises:
      StorageError: naming what to install, or which storage there is.
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
