"""Figures of the benchmarks: curves over numbers of tokens, ours beside published ones."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter


def show_tokens(tokens: float) -> str:
    """`131072` as `128K`; K is 1024, M is 1024 K."""
    for unit, size in (("M", 1024**2), ("K", 1024)):
        if tokens % size == 0:
            return f"{tokens / size:.0f}{unit}"
    return f"{tokens:.0f}"


@dataclasses.dataclass(frozen=True)
class Series:
    """A line."""

    label: str
    color: str
    points: Mapping[float, float]
    """Values by horizontal position."""
    faint: bool = False
    """Dashed with open markers, for published results."""


def draw_series(axes: Axes, lines: Sequence[Series], *, x_label: str, y_label: str, log: bool) -> None:
    """Draws lines over numbers of tokens, on a logarithmic axis."""
    for line in lines:
        if line.points:
            xs, ys = zip(*sorted(line.points.items()), strict=True)
            style = {"linestyle": "--", "marker": "s", "markerfacecolor": "white", "alpha": 0.7}
            if not line.faint:
                style = {"linestyle": "-", "marker": "o"}
            axes.plot(xs, ys, color=line.color, markersize=5, linewidth=1.5, label=line.label, **style)
    ticks = sorted({x for line in lines for x in line.points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [show_tokens(x) for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    if log:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)


def draw(
    path: pathlib.Path,
    panels: Mapping[str, Sequence[Series]],
    *,
    x_label: str,
    y_label: str,
    note: str,
    log: bool = False,
) -> None:
    """Writes a figure of one or more panels, side by side.

    Args:
      path: file, in the format of its suffix.
      panels: lines by title; those without points are left out.
      x_label: label of the horizontal axes, which are numbers of tokens.
      y_label: label of the vertical axes.
      note: small print below: device, versions, date and command, and the source of dashed lines.
      log: whether the vertical axes are logarithmic.
    """
    figure = Figure(figsize=(8 if len(panels) == 1 else 6 * len(panels), 5.5), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        draw_series(axes, lines, x_label=x_label, y_label=y_label, log=log)
        axes.set_title(title)
        axes.legend(fontsize=8, ncols=2)
    figure.supxlabel(note, fontsize=7, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
