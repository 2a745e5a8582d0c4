"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def row(cells: Iterable[object]) -> str:
    """One line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(names: Sequence[str], align: str = "l") -> list[str]:
    """The first two lines of a table.

    Args:
      names: of the columns.
      align: a letter for each column, l or r; the last letter stands for all further columns.
    """
    return [row(names), row("---:" if a == "r" else "---" for a in align.ljust(len(names), align[-1]))]


def table(names: Sequence[str], rows: Iterable[Sequence[object]], align: str = "l") -> list[str]:
    """The lines of a table; names and alignment as for `head`."""
    return [*head(names, align), *map(row, rows)]


def padded(names: Sequence[str], rows: Iterable[Sequence[object]], align: str = "l") -> list[str]:
    """The same, with columns of equal width, to be read in a terminal."""
    align = align.ljust(len(names), align[-1])
    cells = [list(map(str, line)) for line in (names, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    pad = lambda cell, width, a: cell.rjust(width) if a == "r" else cell.ljust(width)
    lines = [row(map(pad, line, widths, align)) for line in cells]
    rule = "|".join(
        "-" * (width + 1) + (":" if a == "r" else "-") for width, a in zip(widths, align, strict=True)
    )
    return [lines[0], f"|{rule}|", *lines[1:]]
