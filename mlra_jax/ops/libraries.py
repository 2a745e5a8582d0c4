"""Optional libraries that back ends build on: their versions, and how a back end declines if they do not fit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from collections.abc import Iterator


def version(package: str) -> tuple[int, ...] | None:
    """The installed version of a package, such as (1, 2, 3) for 1.2.3rc1; None: it is not installed."""
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
    """A context for calls into libraries: whatever they raise means that the back end declines.

    Args:
      *packages: distributions to name, with their versions.
      remedy: a command that installs versions that fit.

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
