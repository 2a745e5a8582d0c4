"""What feeding a train step costs: host time for a batch beside the time of a step at a given rate of tokens.

    python benchmarks/input_pipeline.py

Writes shards of random GPT-2 ids to a temporary folder and reads shuffled batches of the paper's size from them as
training does: threads read ahead while a step runs. The step here is a pause as long as one at the given rate takes on
a device. Reported, of the loop's thread: how long it waits for the next batch, by the clock and in CPU time (which
other work on the host does not lengthen), against the time of a step; training spends it while the step before runs.
And the limit: tokens per second when nothing else happens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from mlra_jax.config import DataConfig
from mlra_jax.data.pipeline import TrainBatches
from mlra_jax.data.shards import ShardWriter

VOCAB = 50304
SEED = 0


def write_shards(folder: Path, n_tokens: int, per_shard: int) -> None:
    """Shards of random ids."""
    rng = np.random.default_rng(SEED)
    with ShardWriter(folder, "random", "train", per_shard) as writer:
        for first in range(0, n_tokens, per_shard):
            writer.write(rng.integers(0, 50257, min(per_shard, n_tokens - first), dtype=np.uint16))


def waits(config: DataConfig, step_s: float, steps: int) -> tuple[list[float], list[float]]:
    """Seconds, by the clock and of CPU time, to get each of `steps` batches, with steps of `step_s` seconds between."""
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    wall, cpu = [], []
    with TrainBatches(config, VOCAB, SEED).device_batches(sharding, 1) as batches:
        for _ in range(steps):
            time.sleep(step_s)
            start = time.perf_counter(), time.thread_time()
            jax.block_until_ready(next(batches))
            wall.append(time.perf_counter() - start[0])
            cpu.append(time.thread_time() - start[1])
    return wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=1e6, help="tokens per second to feed")
    parser.add_argument("--sequences", type=int, default=480, help="sequences per global batch")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20, help="timed steps, after two that are not timed")
    parser.add_argument("--tokens", type=int, default=200_000_000, help="tokens in the shards")
    parser.add_argument("--threads", type=int, default=DataConfig.read_threads)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), args.tokens, 50_000_000)
        config = DataConfig(
            path=folder,
            tokenizer="gpt2",
            seq_len=args.seq_len,
            global_batch=args.sequences,
            read_threads=args.threads,
        )
        batch_tokens = args.sequences * args.seq_len
        step_s = batch_tokens / args.rate
        fed, cpu = (times[2:] for times in waits(config, step_s, args.steps + 2))
        # More steps than are read ahead, so that reading itself is what is timed.
        limit = waits(config, 0.0, config.prefetch + 2 + args.steps)[0][config.prefetch + 2 :]
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "host": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("jax", "grain", "numpy")},
        "batch": f"{args.sequences} x {args.seq_len} tokens, shuffled, local shards",
        "threads": args.threads,
        "step_s": step_s,
        "wait_median_ms": 1e3 * statistics.median(fed),
        "wait_max_ms": 1e3 * max(fed),
        "cpu_median_ms": 1e3 * statistics.median(cpu),
        "share_of_step": statistics.median(fed) / step_s,
        "cpu_share_of_step": statistics.median(cpu) / step_s,
        "load": os.getloadavg()[0],
        "limit_tokens_per_s": batch_tokens / statistics.mean(limit),
    }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
