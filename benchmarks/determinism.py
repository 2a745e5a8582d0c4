"""Whether training repeats to the bit on the GPUs at hand, and what that costs.

    python -m benchmarks.determinism --parts runs
    python -m benchmarks.determinism --parts runs --train --mesh.fsdp 2 --mesh.data 1
    python -m benchmarks.determinism --parts cost --configs small mlra_4

`runs` trains `small` on the embedded corpus and compares the digests of all parameters and moments at the end: of two
processes, of one with a compilation cache of its own, and of a run that is killed (SIGKILL) at random moments and
continued each time. `cost` times a step of each configuration, in a process of its own for each variant: with XLA's
scatter as the gradient of the embedding, or the sums by products that took its place, and with or without
`execution.deterministic`, which forbids XLA what does not repeat and keeps it from choosing algorithms by measuring.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import operator
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from mlra_jax.markdown import head, row, table

VARIANTS = {
    "scatter, free": ("scatter", "no"),
    "sums, free": ("sums", "no"),
    "sums, deterministic": ("sums", "yes"),
    "scatter, deterministic": ("scatter", "yes"),
}
"""How the embedding's gradient is made, and `execution.deterministic`; training does the third."""
MICRO_BATCHES = {"small": 16, "mlra_4": 3}
"""Sequences that a device takes at a time; others are chosen by the planner."""
CHECKPOINT_EVERY = 10
RUN = (
    *("--data.path", "embedded", "--data.tokenizer", "byte", "--data.global_batch", "64"),
    *("--optim.warmup_steps", "5", "--checkpoint.every", str(CHECKPOINT_EVERY), "--checkpoint.keep", "1"),
    *("--log.every", "1", "--log.eval_sequences", "16", "--log.no_tensorboard"),
)
"""Of the runs: byte by byte, so that few ids are very frequent, and with updates that are large at once."""


def measure(name: str, variant: str, steps: int) -> dict[str, Any]:
    """Times a step of a configuration in this process."""
    from benchmarks import train
    from benchmarks.records import Setting
    from mlra_jax.model import layers

    gradient, deterministic = VARIANTS[variant]
    if gradient == "scatter":
        layers.take_rows = operator.getitem
    options = {"layers": None, "remat": None, "gather": None, "fsdp": 1, "tensor": 1}
    options |= {"context": 1, "seq_len": 0, "profile": False}
    sizes = {"micro_batch": MICRO_BATCHES.get(name, 0), "accumulation": 4, "steps": steps}
    args = argparse.Namespace(**options, **sizes, deterministic=deterministic)
    return train.measure(name, args, Setting.here("benchmarks.determinism", []))


def measured_apart(name: str, variant: str, steps: int) -> dict[str, Any]:
    """The same in a process of its own: what one finds to be fastest, XLA keeps for all that it compiles."""
    command = [sys.executable, "-m", "benchmarks.determinism", "--configs", name, "--variant", variant]
    child = subprocess.run([*command, "--steps", str(steps)], stdout=subprocess.PIPE, text=True)
    if child.returncode:
        raise SystemExit(f"{name}, {variant}: the process that measured it ended with {child.returncode}.")
    return json.loads(child.stdout.splitlines()[-1])


def cost(names: Sequence[str], steps: int) -> None:
    """Prints a row for each configuration and variant."""
    names_of = (
        "configuration",
        "gradient of the embedding, XLA",
        "step, ms",
        "spread",
        "of the first",
        "compiled in, s",
    )
    print(*head(names_of, "llr"), sep="\n", flush=True)
    for name in names:
        first = None
        for variant in VARIANTS:
            r = measured_apart(name, variant, steps)
            first = first or r["step_s"]
            cells = (
                f"{1e3 * r['step_s']:.2f}",
                f"{1e3 * r['spread_s']:.2f}",
                f"{r['step_s'] / first - 1:+.2%}",
            )
            print(row((name, variant, *cells, f"{r['compile_s']:.0f}")), flush=True)


def start(
    name: str, out: pathlib.Path, cache: pathlib.Path, steps: int, more: Sequence[str]
) -> subprocess.Popen[bytes]:
    """Starts, or continues, a run that leaves room on the GPU for another one; its words go to `out`.log."""
    options = {"--out": out, "--steps": steps, "--compilation_cache": cache}
    words = [str(word) for option in options.items() for word in option]
    with open(f"{out}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "mlra_jax.cli.train", name, *words, *RUN, *more],
            env=os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3"},
            stdout=log,
            stderr=log,
        )


def finished(run: subprocess.Popen[bytes], out: pathlib.Path) -> None:
    """Waits for the end of a run."""
    if run.wait():
        raise SystemExit(
            f"A run ended with {run.returncode}:\n{pathlib.Path(f'{out}.log').read_text()[-3000:]}"
        )


def digest(out: pathlib.Path, step: int) -> str:
    """SHA-256 of the digests of all parameters and moments in a run's checkpoint."""
    import orbax.checkpoint as ocp

    stored = ocp.JsonCheckpointHandler().restore(out.absolute() / "checkpoints" / str(step) / "digests")
    stored.pop("config")  # which names the run's folder
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()[:16]


def uninterrupted(name: str, out: pathlib.Path, cache: pathlib.Path, steps: int, more: Sequence[str]) -> str:
    """Trains from the first step to the last; the digest."""
    finished(start(name, out, cache, steps, more), out)
    return digest(out, steps)


def last_step(out: pathlib.Path) -> int:
    """The last step whose metrics a run wrote; -1: none."""
    metrics = out / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"\n")), default=-1)


def killed(
    name: str, out: pathlib.Path, cache: pathlib.Path, steps: int, more: Sequence[str], kills: int, seed: int
) -> tuple[str, list[int]]:
    """Trains with SIGKILL at random moments, continuing each time; the digest, and after which steps it was killed."""
    draw = random.Random(seed)
    after = sorted(draw.sample(range(1, steps - 1), kills))
    for step in after:
        run = start(name, out, cache, steps, more)
        while last_step(out) < step and run.poll() is None:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.3))
        if run.poll() is not None:
            finished(run, out)
            raise SystemExit(f"The run ended before it could be killed after step {step}; give more --steps.")
        run.kill()
        run.wait()
    return uninterrupted(name, out, cache, steps, more), after


def runs(name: str, steps: int, more: Sequence[str], kills: int, folder: pathlib.Path) -> bool:
    """Prints a row for each run, two at a time; whether all end with the same bits."""
    one, other = folder / "cache", folder / "other_cache"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(uninterrupted, name, folder / "first", one, steps, more)
        elsewhere = pool.submit(uninterrupted, name, folder / "other_cache_run", other, steps, more)
        expected = first.result()
        rows = [("first process", expected), ("another compilation cache", elsewhere.result())]
        second = pool.submit(uninterrupted, name, folder / "second", one, steps, more)
        interrupted = pool.submit(killed, name, folder / "killed", one, steps, more, kills, 0)
        rows.append(("second process, the first one's cache", second.result()))
        found, after = interrupted.result()
        rows.append((f"killed after steps {', '.join(map(str, after))}", found))
    names = (" ".join((f"{name}, {steps} steps", *more)), "digest of parameters and moments", "equal")
    print(*table(names, [(*found, "yes" if found[1] == expected else "NO") for found in rows]), sep="\n")
    return all(found == expected for _, found in rows)


def main() -> int:
    """Runs the benchmark."""
    from benchmarks import records

    parser = records.parser("benchmarks.determinism", __doc__, out=False)
    parser.add_argument("--parts", nargs="+", choices=("runs", "cost"), default=["runs", "cost"])
    parser.add_argument(
        "--configs", nargs="+", default=["small"], help="whose cost is measured; the first one's runs"
    )
    parser.add_argument("--steps", type=int, help="of the runs (50), and that are timed (12)")
    parser.add_argument("--kills", type=int, default=5, help="of a run")
    parser.add_argument(
        "--train",
        nargs=argparse.REMAINDER,
        default=[],
        help="further options of the runs' train.py, such as a mesh",
    )
    parser.add_argument(
        "--variant", choices=VARIANTS, help="measure one, in this process, and print it as JSON"
    )
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args.configs[0], args.variant, args.steps or 12)))
        return 0
    begin, equal = time.perf_counter(), True
    for part in args.parts:
        if part == "cost":
            cost(args.configs, args.steps or 12)
        else:
            with tempfile.TemporaryDirectory() as folder:
                equal = runs(args.configs[0], args.steps or 50, args.train, args.kills, pathlib.Path(folder))
        print(f"{part}: {time.perf_counter() - begin:.0f} s so far", flush=True)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
