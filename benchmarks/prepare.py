"""How many tokens `mlra-prepare` makes in a second, by its number of processes.

    python -m benchmarks.prepare --workers 1 2 4

The text is the corpus in the package, cut into documents of 3000 characters and repeated in other orders. Reported, for
the whole command with its start: tokens per second by the clock, and per second of CPU time of all processes, which
other work on the host does not lengthen. The shards are compared: they must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from mlra_jax.data import corpus
from mlra_jax.data.shards import open_shards
from mlra_jax.markdown import table


def write_documents(folder: Path, n_bytes: float) -> None:
    """Eight .jsonl files of about `n_bytes` in all."""
    texts = list(corpus.documents("train"))
    documents = [text[i : i + 3000] for text in texts for i in range(0, len(text), 3000)]
    rng = random.Random(0)
    for number in range(8):
        with (folder / f"{number}.jsonl").open("w") as file:
            while file.tell() < n_bytes / 8:
                file.write(json.dumps({"text": rng.choice(documents)}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--megabytes", type=float, default=100, help="of text")
    parser.add_argument("--tokenizer", default="gpt2")
    args = parser.parse_args()

    rows, made = [], set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "texts").mkdir()
        write_documents(folder / "texts", 1e6 * args.megabytes)
        for workers in args.workers:
            out = folder / str(workers)
            command = [sys.executable, "-m", "mlra_jax.cli.prepare", folder / "texts", "--out", out]
            options = ["--tokenizer", args.tokenizer, "--workers", str(workers)]
            cpu = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
            began = time.perf_counter(), cpu()
            subprocess.run([*command, *options], check=True, capture_output=True)
            wall, own = time.perf_counter() - began[0], cpu() - began[1]
            n_tokens = sum(n for split in ("train", "val") for n in open_shards(str(out), split).n_tokens)
            made.add(b"".join(path.read_bytes() for path in sorted(out.iterdir())))
            rows.append((workers, f"{n_tokens:,}", f"{n_tokens / wall:,.0f}", f"{n_tokens / own:,.0f}"))
    assert len(made) == 1, "the shards depend on the number of processes"
    versions = ", ".join(f"{name} {version(name)}" for name in ("tiktoken", "numpy"))
    print(
        f"{os.cpu_count()} CPU cores ({platform.machine()}), load {os.getloadavg()[0]:.1f}, Python "
        f"{platform.python_version()}, {versions}, {datetime.now(UTC).date()}; tokenizer {args.tokenizer}\n"
    )
    print("\n".join(table(("processes", "tokens", "tokens/s", "tokens per CPU second"), rows)))


if __name__ == "__main__":
    main()
