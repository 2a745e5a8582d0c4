"""Tables of measured kernel configurations: a folder for each op, a JSON file in it for each kind of device.

An entry holds the configuration that was fastest for a back end and the sizes of a call, when
`python -m benchmarks.tune_decode_attention` measured it. A back end looks here if its caller names no configuration,
and falls back on a heuristic.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

C = TypeVar("C")
logger = logging.getLogger(__name__)

Sizes = Mapping[str, Any]
"""What the best configuration of a back end depends on, by name: numbers, tuples of numbers, booleans."""
ROUNDED = ("batch", "capacity")
"""Sizes that are rounded up to powers of two, and may differ between a measurement and the call that it serves."""
REACH = 2
"""By how many doublings, of all `ROUNDED` together, a measurement may differ from the call that it serves."""


def bucket(sizes: Sizes) -> tuple[int, ...]:
    """The exponents of the powers of two that hold the `ROUNDED` sizes."""
    return tuple((sizes[name] - 1).bit_length() for name in ROUNDED)


def distance(a: Sizes, b: Sizes) -> tuple[int, int] | None:
    """Doublings between two buckets, in all and of the batch alone; None: the sizes differ otherwise."""
    if {**a, **{name: b[name] for name in ROUNDED}} != dict(b):
        return None
    doublings = [abs(i - j) for i, j in zip(bucket(a), bucket(b), strict=True)]
    return sum(doublings), doublings[0]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One measurement."""

    back_end: str
    sizes: Sizes
    config: dict[str, int] | None
    """Fields of the back end's configuration; None: nothing was clearly faster than its heuristic."""
    us: float
    """Device time of a call with `config`, and, next, with the heuristic's."""
    heuristic_us: float
    versions: dict[str, str]
    date: str
    command: str

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Entry:
        """The entry that `dataclasses.asdict` wrote.

        Raises:
          TypeError, ValueError, KeyError: it is none.
        """
        lists_to_tuples = lambda x: tuple(x) if isinstance(x, list) else x
        sizes = {name: lists_to_tuples(x) for name, x in fields["sizes"].items()}
        numbers = [*(fields["config"] or {}).values(), *(sizes[name] for name in ROUNDED)]
        if any(type(x) is not int or x < 1 for x in numbers):
            raise ValueError(f"sizes and configurations are integers from 1; got {numbers}")
        return cls(**{**fields, "sizes": sizes})


def slug(kind: str) -> str:
    """A device kind as the name of a file."""
    return re.sub(r"\W+", "_", kind.lower()).strip("_")


def table_path(folder: pathlib.Path, kind: str) -> pathlib.Path:
    """Where the table of a device kind lies."""
    return folder / f"{slug(kind)}.json"


def read_table(path: pathlib.Path) -> tuple[Entry, ...]:
    """The entries of a table; none where there is no file.

    Raises:
      ValueError: it cannot be read.
    """
    if not path.exists():
        return ()
    try:
        return tuple(Entry.from_json(fields) for fields in json.loads(path.read_text())["entries"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(f"{path} is not a table of tuned configurations ({type(e).__name__}: {e}).") from e


def write_table(path: pathlib.Path, kind: str, entries: Iterable[Entry]) -> None:
    """Writes a table, one entry per line; replaces an older one atomically."""
    order = lambda e: (e.back_end, json.dumps(e.sizes, sort_keys=True))
    lines = [json.dumps(dataclasses.asdict(e)) for e in sorted(entries, key=order)]
    text = f'{{"device": {json.dumps(kind)}, "entries": [\n' + ",\n".join(lines) + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
    pathlib.Path(file.name).chmod(0o644)  # a temporary file is its owner's alone
    os.replace(file.name, path)
    load.cache_clear()


def update(entries: Iterable[Entry], new: Entry) -> tuple[Entry, ...]:
    """The entries with a new one in place of that for the same back end, sizes and bucket."""
    same = lambda e: e.back_end == new.back_end and distance(e.sizes, new.sizes) == (0, 0)
    return *(e for e in entries if not same(e)), new


@functools.cache
def load(path: pathlib.Path) -> tuple[Entry, ...]:
    """`read_table`, once per file; warns of a table that cannot be read, and takes it for empty."""
    try:
        return read_table(path)
    except ValueError as e:
        logger.warning(
            "%s Heuristics are used instead; to write it anew: python -m benchmarks.tune_decode_attention", e
        )
        return ()


@functools.cache
def _warn_of_fields(path: pathlib.Path, back_end: str, error: str) -> None:
    logger.warning(
        "%s holds a configuration with fields that %s does not have (%s); it is ignored. Tune again: "
        "python -m benchmarks.tune_decode_attention --again",
        path,
        back_end,
        error,
    )


def find(
    folder: pathlib.Path,
    kind: str,
    back_end: str,
    sizes: Sizes,
    *,
    make: Callable[..., C],
    adapt: Callable[[C, Sizes], C | None],
) -> C | None:
    """The configuration measured for a call, or for one like it.

    An entry counts if it is of the back end and its sizes differ from the call's in none but the `ROUNDED` ones. The
    nearest entry within `REACH` comes first, by doublings in all; of equally near ones that with the nearer batch, then
    the first in the table. If the nearest says that the heuristic was best, the heuristic it is.

    Args:
      folder: of tables.
      kind: of the device, as JAX calls it.
      back_end: its name.
      sizes: of the call.
      make: makes a configuration of its fields.
      adapt: takes a configuration and the sizes that it was measured with; returns what this call can run, or None,
        and the next entry is tried.

    Returns:
      A configuration, or None: use the heuristic.
    """
    path = table_path(folder, kind)
    near = []
    for entry in load(path):
        doublings = distance(entry.sizes, sizes) if entry.back_end == back_end else None
        if doublings is not None and doublings[0] <= REACH:
            near.append((doublings, entry))
    for _, entry in sorted(near, key=lambda x: x[0]):
        if entry.config is None:
            return None
        try:
            config = make(**entry.config)
        except TypeError as e:
            _warn_of_fields(path, back_end, str(e))
            continue
        if (adapted := adapt(config, entry.sizes)) is not None:
            return adapted
    return None
