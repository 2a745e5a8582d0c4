"""What the benchmarks' commands share: options, settings, and files of results."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where, when and how the rows were measured."""

    device: str
    versions: dict[str, str]
    date: str
    command: str

    @classmethod
    def here(cls, module: str, argv: Sequence[str]) -> Setting:
        """This process; the command without `--out`, which says nothing of what is measured."""
        versions = {}
        for name in ("jax", "jaxlib", "jax-cuda13-plugin", "jax-triton", "triton"):
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        where = {i for i, arg in enumerate(argv) if arg == "--out" or (i and argv[i - 1] == "--out")}
        command = shlex.join(["python", "-m", module, *(a for i, a in enumerate(argv) if i not in where)])
        return cls(jax.devices()[0].device_kind, versions, datetime.date.today().isoformat(), command)


def parse_size(text: str) -> tuple[int, int]:
    """`16x32K` as rows and tokens of each; K is 1024, M is 1024 K.

    Raises:
      ValueError: it has another form.
    """
    if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)([KM]?)", text)):
        raise ValueError(f"{text!r} is not a batch and a context such as 8x32K.")
    return int(match[1]), int(match[2]) * {"": 1, "K": 1024, "M": 1024**2}[match[3]]


def parser(module: str, text: str | None, *, out: bool = True) -> argparse.ArgumentParser:
    """The parser of a command, whose `--help` is its module's docstring.

    Args:
      module: as in `python -m MODULE`.
      text: docstring.
      out: whether it has the option `--out`, a folder for results.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if out:
        parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder for the results")
    return parser


def case(text: str) -> tuple[int, int]:
    """`16x32K` as batch and context, for argparse."""
    try:
        return parse_size(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def versions(record: Mapping[str, Any]) -> str:
    """The libraries' versions in a record, as text."""
    return ", ".join(f"{name} {version}" for name, version in record["versions"].items())


def not_measured(failures: Mapping[str, str]) -> list[str]:
    """Lines of Markdown that say what could not be measured, and why."""
    return [line for name, why in failures.items() for line in ("", f"{name}: not measured. {why}")]


def write(stem: pathlib.Path, record: Mapping[str, Any], lines: Sequence[str]) -> None:
    """Writes `stem`.json and `stem`.md."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    stem.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")


def redraw(
    parser: argparse.ArgumentParser, path: pathlib.Path, draw: Callable[[Mapping[str, Any]], object]
) -> Mapping[str, Any]:
    """Reads a JSON file of results and draws it again; ends the command with a message where it cannot be."""
    try:
        record = json.loads(path.read_text())
        draw(record)
    except (OSError, ValueError, KeyError, TypeError) as e:
        parser.error(f"{path} cannot be drawn; it must be what this command has written ({e!r}).")
    return record
