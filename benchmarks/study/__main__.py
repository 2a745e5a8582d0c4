"""The small study: six attentions at equal parameter count and equal data, with several seeds (docs/study.md).

python -m benchmarks.study prepare DOWNLOADS --out DATA      # packages that anyone can install, as shards
python -m benchmarks.study run --data DATA --out OUT         # trains what OUT does not have yet, then reports
python -m benchmarks.study report --out OUT                  # table and figure of the runs that are finished
python -m benchmarks.study list                              # the packages, and what downloads them
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

# As train.py; and processes that compile ahead share the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks.study import report
from benchmarks.study.corpora import SOURCES
from benchmarks.study.models import LAYERS, VARIANTS
from benchmarks.study.prepare import Data, prepare
from benchmarks.study.run import RESULTS, Study, read_results, run_all
from mlra_jax.cli import command
from mlra_jax.ops.tuning import slug

RECORDS = Path(__file__).parents[1] / "results"


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the packages and their download commands")
    p = commands.add_parser("prepare", help="make shards of the packages")
    p.add_argument("downloads", type=Path, help="folder of the packages' files")
    p.add_argument("--out", type=Path, default=Path("data/study"), help="folder to create")
    p.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES), metavar="NAME")
    p = commands.add_parser("run", help="train the unfinished runs, then report")
    p.add_argument("--data", type=Path, default=Path("data/study"), help="folder made by `prepare`")
    p.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the results")
    p.add_argument("--work", type=Path, help="folder of checkpoints and metrics; default: OUT/runs")
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    p.add_argument(
        "--tokens", type=float, default=0, help="training tokens per run; 0: all of the data, once"
    )
    p.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    p.add_argument(
        "--budget", type=float, default=0, help="seconds; runs that would take longer are left for later"
    )
    p.add_argument("--compile-ahead", type=int, default=0, metavar="N", help="compile in N processes first")
    p.add_argument("--layers", type=int, default=LAYERS, help="number of layers; fewer only for a trial")
    p.add_argument("--eval-sequences", type=int, default=0, help="held-out sequences; 0: all")
    p = commands.add_parser("report", help="write table and figure of the finished runs")
    p.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the results")
    p.add_argument(
        "--docs", type=Path, help="also put them into this folder's study.md, and keep the results"
    )
    return parser


def settings(args: argparse.Namespace) -> list[str]:
    """The non-default options of `run` that affect the results, for the record."""
    defaults = parser().parse_args(["run"])
    given = ["run"]
    for name in ("variants", "seeds", "tokens", "lr", "layers", "eval_sequences"):
        value = getattr(args, name)
        if value != getattr(defaults, name):
            words = value if isinstance(value, list) else [value]
            given += [
                f"--{name.replace('_', '-')}",
                *(f"{w:g}" if isinstance(w, float) else str(w) for w in words),
            ]
    return given


@command
def main(argv: Sequence[str]) -> int:
    """Exit status 0: done, or stopped within the budget; 2: refused."""
    args = parser().parse_args(argv)
    if args.command == "list":
        for name, source in SOURCES.items():
            print(f"{name:<10} {source.fetch:<50} {source.licence}: {source.what}")
        return 0
    if args.command == "prepare":
        data = prepare(args.downloads, args.out, args.sources)
        print(f"{args.out}: {sum(s['documents'] for s in data.sources.values()):,} documents, {data.digest}")
        return 0
    if args.command == "run":
        study = Study.plan(
            Data.open(args.data),
            tokens=args.tokens,
            lr=args.lr,
            seeds=tuple(args.seeds),
            out=args.out,
            work=args.work or args.out / "runs",
            layers=args.layers,
            eval_sequences=args.eval_sequences,
        )
        run_all(study, args.variants, settings(args), budget=args.budget, processes=args.compile_ahead)
    results = read_results(args.out / RESULTS)
    written = report.write(results, args.out)
    if args.command == "report" and args.docs:
        written += report.write_docs(results, args.docs)
        device = next((r["setting"]["device"] for r in results["runs"] if "setting" in r), "no device")
        written.append(RECORDS / f"study_{slug(device)}.json")
        shutil.copy(args.out / RESULTS, written[-1])
    print(report.markdown(results))
    print(f"Written: {', '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
