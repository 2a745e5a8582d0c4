"""Optional libraries that back ends build on: which versions there are, and declining where they do not fit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from collections.abc import Iterator


def version(package: str) -> tuple[int, ...] | None:
    """The installed version of a package, (1, 2, 3) of 1.2.3rc1; None: there is none."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(map(int, re.findall(r"\d+", found)[:3]))


def name(*packages: str) -> str:
    """Packages with their versions, for messages."""

    def one(package: str) -> str:
        return f"{package} {importlib.metadata.version(package)}" if version(package) else f"no {package}"

    return ", ".join(map(one, packages))


@contextlib.contextmanager
def declining(*packages: str, remedy: str) -> Iterator[None]:
    """Calls into libraries: whatever they raise says that they do not take the call.

    Args:
      *packages: distributions that are named with their versions.
      remedy: a command that brings versions that fit.

    Raises:
      NotImplementedError: in place of any other exception.
    """
    try:
        yield
    except NotImplementedError:
        raise
    except Exception as e:
        raise NotImplementedError(
            f"{name(*packages)}: {type(e).__name__}: {e}. If versions do not fit: {remedy}"
        ) from e
