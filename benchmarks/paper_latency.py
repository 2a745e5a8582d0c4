"""The paper's figure of decode latency, measured on the device at hand: one device's share, batch 1, 64 query heads.

    python -m benchmarks.paper_latency                          # 128K to 2M tokens, as in the paper
    python -m benchmarks.paper_latency --lengths 1K 4K          # what a CPU can do; it is timed by the host's clock
    python -m benchmarks.paper_latency --redraw RESULTS.json    # the figure alone, without a device

Like `benchmarks.decode_attention`, measures the op from queries and cache to the output, without projections and
collectives. The shares are those whose cached widths the paper's figure shows: one of MLRA-4's
four latent heads (192 values a token), one of GLA-2's two (320), all of MLA (576), one KV head of GQA (256). Caches are
paged, as the paper's are.

Writes `paper_latency_DEVICE.json`, `.md` and `.png`; the figure has the paper's points beside ours.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import paper, records
from benchmarks.decode_attention import HEADER as DETAILS
from benchmarks.decode_attention import Row, as_record, format_row, run
from benchmarks.figures import draw, show_tokens
from benchmarks.records import Setting, parse_size
from mlra_jax import markdown
from mlra_jax.ops.decode import IMPLEMENTATIONS
from mlra_jax.ops.tuning import slug

VARIANTS = tuple(paper.LATENCY_US)


def parse_length(text: str) -> int:
    """`128K` in tokens."""
    try:
        return parse_size(f"1x{text}")[1]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens such as 128K or 2M.") from None


def points(record: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Times in us by variant and tokens, from results of this benchmark or of `benchmarks.decode_attention`."""
    found: dict[str, dict[int, float]] = {variant: {} for variant in VARIANTS}
    for row in record["rows"]:
        variant, _, size = row["case"].rpartition(" ")
        if variant in found:
            batch, tokens = parse_size(size)
            if batch == 1:
                found[variant][tokens] = row["timing"]["us"]
    return found


def describe(record: Mapping[str, Any]) -> str:
    """Device, versions, date and command."""
    return f"{record['device']}, {records.versions(record)}, {record['date']}.\n{record['command']}"


def draw_figure(record: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes the figure."""
    ours = points(record)
    wall = any(row["timing"]["clock"] == "wall" for row in record["rows"])
    lines = [
        paper.series(variant, found, paper=of_paper)
        for variant in VARIANTS
        for found, of_paper in ((ours[variant], False), (paper.LATENCY_US[variant], True))
    ]
    draw(
        path,
        {"Decode attention, batch 1, 64 query heads: one device's share": lines},
        x_label="cached tokens",
        y_label=f"us ({'host clock' if wall else 'device time'})",
        note=f"Solid: {describe(record)}\nDashed: the paper's points (arXiv 2603.02188), on its H100, paged bfloat16.",
        log=True,
    )


def table(record: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown: our times, the paper's and their ratio, and MLA's time over MLRA-4's."""
    ours = points(record)
    number = lambda x, digits=1: "" if x is None else f"{x:.{digits}f}"
    over = lambda x, y: x / y if x and y else None
    rows = []
    for tokens in sorted({tokens for found in ours.values() for tokens in found}):
        here = {v: ours[v].get(tokens) for v in VARIANTS}
        theirs = {v: paper.LATENCY_US[v].get(tokens) for v in VARIANTS}
        cells = [show_tokens(tokens)]
        for v in VARIANTS:
            cells += [number(here[v]), number(theirs[v]), number(over(theirs[v], here[v]), 2)]
        rows.append([*cells, *(number(over(us["mla"], us["mlra_4"]), 2) for us in (here, theirs))])
    names = [name for v in VARIANTS for name in (paper.NAMES[v], "paper", "ratio")]
    return markdown.table(("tokens", *names, "MLA over MLRA-4", "paper"), rows, "r")


def write(rows: Sequence[Row], failures: Mapping[str, str], setting: Setting, stem: pathlib.Path) -> None:
    """Writes `stem`.json, `.md` and `.png`."""
    record = as_record(rows, failures, setting)
    device, command = describe(record).split("\n")
    lines = [
        "# The paper's latency of decode attention",
        "",
        f"{device} `{command}`",
        "",
        "us of a call, batch 1, 64 query heads, one device's share, bfloat16. *Paper*: its published points, on its",
        "H100. *Ratio*: the paper's time over ours. `benchmarks/paper_latency.py` says what is measured.",
        "",
        *table(record),
        "",
        DETAILS,
        *map(format_row, rows),
        *records.not_measured(failures),
    ]
    records.write(stem, record, lines)
    draw_figure(record, stem.with_suffix(".png"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 1 where a case failed."""
    argv = sys.argv[1:] if argv is None else argv
    parser = records.parser("benchmarks.paper_latency", __doc__)
    parser.add_argument("--cases", nargs="+", choices=VARIANTS, default=VARIANTS, help="variants to measure")
    lengths = sorted(paper.LATENCY_US["mla"])
    parser.add_argument(
        "--lengths", nargs="+", type=parse_length, default=lengths, help="numbers of cached tokens"
    )
    parser.add_argument("--page", type=int, default=64, help="tokens per page; 0: a contiguous cache")
    parser.add_argument(
        "--implementation", choices=list(IMPLEMENTATIONS), help="default: the dispatcher's choice"
    )
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each program")
    parser.add_argument(
        "--redraw", type=pathlib.Path, metavar="JSON", help="redraw the figure of a results file"
    )
    parser.add_argument(
        "--figure", type=pathlib.Path, help="with --redraw: figure to write; default: JSON with suffix .png"
    )
    options = parser.parse_args(argv)
    if options.redraw:
        figure = options.figure or options.redraw.with_suffix(".png")
        record = records.redraw(parser, options.redraw, lambda record: draw_figure(record, figure))
        print("\n".join(table(record)))
        print(f"Written to {figure}")
        return 0
    if options.page < 0 or options.runs < 1:
        parser.error("--page must not be negative, and --runs must be at least 1.")

    implementations = [options.implementation] if options.implementation else list(IMPLEMENTATIONS)
    setting = Setting.here("benchmarks.paper_latency", argv)
    stem = options.out / f"paper_latency_{slug(setting.device)}"
    names = [f"{v} 1x{show_tokens(tokens)}" for tokens in options.lengths for v in options.cases]
    print(f"{setting.device}, {setting.versions}\n{DETAILS}", flush=True)
    rows, failures = run(
        names,
        implementations,
        page=options.page or None,
        runs=options.runs,
        write=lambda rows, failures: write(rows, failures, setting, stem),
    )
    print(*table(as_record(rows, failures, setting)), f"Written to {stem}.md, .json and .png", sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
