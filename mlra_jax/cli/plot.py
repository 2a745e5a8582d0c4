"""`mlra-plot RUN [RUN ...] --out losses.png`: loss curves of one or more training runs in one figure."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlra_jax.cli import command
from mlra_jax.config import OPTION, Range, Validated
from mlra_jax.errors import UserError
from mlra_jax.figures import check_figure, save_figure
from mlra_jax.training.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class PlotArgs(Validated):
    """Draws the loss curves of one or more training runs."""

    at: ClassVar[str] = OPTION
    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders (or bucket URLs) of runs, or their metrics files."""
    out: str = "losses.png"
    """Figure to write, in the format of its suffix."""
    x: Literal["step", "tokens"] = "step"
    """Quantity on the horizontal axis."""
    smooth: Annotated[float, Range(ge=0, lt=1)] = 0.0
    """Decay of an exponential moving average of the training loss, from 0 (no smoothing) to below 1."""


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Bias-corrected exponential moving average of `values`."""
    out, mean, total = [], 0.0, 0.0
    for value in values:
        mean, total = weight * mean + value, weight * total + 1
        out.append(mean / total)
    return out


def draw_run(axes: Axes, run: str, x: str, smooth: float) -> None:
    """Adds a run to the figure: training loss as a line, held-out loss as points on a dashed line.

    Raises:
      FileNotFoundError: the run has no metrics file.
      UserError: the file holds no loss.
    """
    records = read_metrics(run)
    train = [(r[x] if x != "step" else s, r["loss"]) for s, r in records.items() if "loss" in r]
    held_out = [(r[x] if x != "step" else s, r["eval_loss"]) for s, r in records.items() if "eval_loss" in r]
    if not train and not held_out:
        raise UserError(f"The metrics of {run} hold no loss yet.")
    name = pathlib.PurePath(run).stem if run.endswith(".jsonl") else pathlib.PurePath(run).name
    color = None
    if train:
        xs, losses = zip(*train, strict=True)
        (line,) = axes.plot(xs, smoothed(losses, smooth), linewidth=1, label=f"{name}: training")
        color = line.get_color()
    if held_out:
        xs, losses = zip(*held_out, strict=True)
        axes.plot(xs, losses, "o--", color=color, markersize=4, linewidth=1, label=f"{name}: held out")


@command
def main(argv: Sequence[str]) -> int:
    """Draws the figure and prints its path."""
    args = tyro.cli(PlotArgs, args=argv, prog="mlra-plot")
    if not args.runs:
        raise UserError("Name at least one run's folder: mlra-plot RUN [RUN ...] --out losses.png")
    args.validate()
    out = check_figure("--out", args.out)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for run in args.runs:
        draw_run(axes, run, args.x, args.smooth)
    axes.set_xlabel("step" if args.x == "step" else "training tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, out)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
