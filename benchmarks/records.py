"""What the benchmarks' commands share: options, and files of results."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.decode_attention import RESULTS, parse_size


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
