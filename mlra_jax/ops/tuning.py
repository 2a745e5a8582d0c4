"""Tables of measured kernel configurations: one JSON file for each kind of device.

A table holds, for a back end and the sizes of a call, the configuration that was fastest when
`python -m benchmarks.tune_decode_attention` last measured it. Back ends ask `find` where their caller names no
configuration, and fall back on a heuristic.
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
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

C = TypeVar("C")
logger = logging.getLogger(__name__)

DECODE = pathlib.Path(__file__).parent / "decode" / "tuned"
"""Tables of the back ends of decode attention."""
REACH = 2
"""How many doublings of batch and capacity together a measurement speaks for."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the best configuration of decode attention depends on."""

    heads: int
    """Latent or KV heads."""
    rows: int
    """Query heads that read one of them."""
    q_len: int
    widths: tuple[int, ...]
    """Of the parts of a key."""
    v_width: int
    latent: bool
    """Whether the value is the first part of the key."""
    batch: int
    capacity: int
    """Tokens that a row may hold."""

    @property
    def bucket(self) -> tuple[int, int]:
        """Batch and capacity as exponents of the powers of two that hold them."""
        return (self.batch - 1).bit_length(), (self.capacity - 1).bit_length()

    def distance(self, other: Sizes) -> tuple[int, int] | None:
        """Doublings of both, and of the batch alone, between the buckets; None: these sizes do not compare."""
        if dataclasses.replace(other, batch=self.batch, capacity=self.capacity) != self:
            return None
        of_batch, of_capacity = (abs(a - b) for a, b in zip(self.bucket, other.bucket, strict=True))
        return of_batch + of_capacity, of_batch


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
        sizes = fields["sizes"]
        numbers = [*(fields["config"] or {}).values(), sizes["batch"], sizes["capacity"]]
        if any(type(x) is not int or x < 1 for x in numbers):
            raise ValueError(f"sizes and configurations are whole numbers from 1; got {numbers}")
        return cls(**{**fields, "sizes": Sizes(**{**sizes, "widths": tuple(sizes["widths"])})})


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
    """Writes a table, an entry a line; who reads meanwhile sees the old one or the new one."""
    order = lambda e: (e.back_end, not e.sizes.latent, dataclasses.astuple(e.sizes))
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
    same = lambda e: e.back_end == new.back_end and e.sizes.distance(new.sizes) == (0, 0)
    return *(e for e in entries if not same(e)), new


@functools.cache
def load(path: pathlib.Path) -> tuple[Entry, ...]:
    """`read_table`, once for each file; one that cannot be read is warned of, and then taken for empty."""
    try:
        return read_table(path)
    except ValueError as e:
        logger.warning("%s Heuristics are used; write it anew: python -m benchmarks.tune_decode_attention", e)
        return ()


@functools.cache
def _warn_of_fields(path: pathlib.Path, back_end: str, error: str) -> None:
    logger.warning(
        "%s holds a configuration that %s does not know (%s); it is passed over. Tune again: "
        "python -m benchmarks.tune_decode_attention --again",
        path,
        back_end,
        error,
    )


def find(
    back_end: str,
    sizes: Sizes,
    kind: str,
    make: Callable[..., C],
    adapt: Callable[[C, Sizes], C | None],
    *,
    folder: pathlib.Path | None = None,
) -> C | None:
    """The configuration measured for a call, or for one like it.

    Entries count if they are of the back end and differ from the call in nothing but batch and capacity. Those two
    are rounded up to powers of two. The same bucket comes first, then the nearest one, by doublings of batch and of
    capacity together, up to `REACH`; of equally near ones that with the nearer batch, then the first in the table.
    Where the nearest says that the heuristic was best, it is.

    Args:
      back_end: its name.
      sizes: of the call.
      kind: of the device, as JAX calls it.
      make: makes a configuration of its fields.
      adapt: makes of a configuration, and the sizes that it was measured with, what this call can run; or None, if it
        cannot, and the next entry is asked.
      folder: of tables; None: those that come with the package.

    Returns:
      A configuration, or None: the heuristic must do.
    """
    path = table_path(folder or DECODE, kind)
    near = []
    for entry in load(path):
        distance = entry.sizes.distance(sizes) if entry.back_end == back_end else None
        if distance is not None and distance[0] <= REACH:
            near.append((distance, entry))
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
