"""All runs of the study, one after the other: each is trained by `mlra_jax.training.loop.train`, whole or in pieces."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.records import Setting
from benchmarks.study.models import GLOBAL_BATCH, LAYERS, SEQ_LEN, VARIANTS, VOCAB, study_config
from benchmarks.study.prepare import Data
from mlra_jax.attention.kv_cache import values_per_token
from mlra_jax.cli.describe import parameters
from mlra_jax.config import ConfigError, TrainConfig, to_dict
from mlra_jax.data.pipeline import open_windows
from mlra_jax.training.loop import DivergedError, train
from mlra_jax.training.metrics import read_metrics

MAX_EPOCHS = 4
RESULTS = "results.json"
FREE = re.compile(r"\.execution\.|\.model\.(remat|unroll_layers|gather)$|\.attention\.(form|type)$")
"""Fields of the configurations, earlier versions' included, that concern execution and not the model."""


@dataclasses.dataclass(frozen=True)
class Study:
    """All that the runs have in common.

    Attributes:
      out: folder of `RESULTS`.
      work: folder of the runs: checkpoints and metrics.
      eval_sequences: held-out sequences in an evaluation; 0: all.
    """

    data: Data
    steps: int
    lr: float
    seeds: tuple[int, ...]
    out: Path
    work: Path
    layers: int = LAYERS
    eval_sequences: int = 0

    @classmethod
    def plan(cls, data: Data, *, tokens: float = 0, **rest: Any) -> Study:
        """The study whose runs read so many training tokens each, to whole steps; 0: all of `data`, once.

        Raises:
          ConfigError: that is less than one step, or more than `MAX_EPOCHS` times the data.
        """
        steps = int((tokens or data.tokens["train"]) // (GLOBAL_BATCH * SEQ_LEN))
        most = MAX_EPOCHS * data.tokens["train"]
        if not 0 < steps * GLOBAL_BATCH * SEQ_LEN <= most:
            raise ConfigError(
                f"--tokens {tokens:g} must be at least {GLOBAL_BATCH * SEQ_LEN:,}, one step, and at most {most:,}: "
                f"{MAX_EPOCHS} times the {data.tokens['train']:,} tokens of {data.folder}."
            )
        return cls(data, steps, **rest)

    def config(self, variant: str, seed: int) -> TrainConfig:
        """The configuration of one run."""
        windows = (self.data.tokens["val"] - 1) // SEQ_LEN
        return study_config(
            variant,
            seed,
            data=self.data.shards,
            tokenizer=self.data.tokenizer,
            steps=self.steps,
            lr=self.lr,
            out=str(self.work / f"{variant}_seed_{seed}"),
            eval_sequences=min(self.eval_sequences or windows, windows),
            layers=self.layers,
        )

    def identity(self) -> dict[str, Any]:
        """The fields that must be equal in all compared runs, without folders."""

        def flat(value: Any, name: str) -> dict[str, Any]:
            if not isinstance(value, dict):
                return {name: value}
            return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}.{key}").items()}

        fields: dict[str, Any] = {"data": self.data.digest}
        for variant in VARIANTS:
            config = dataclasses.replace(self.config(variant, 0), out="")
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, path="", tokenizer=""))
            fields |= flat(to_dict(config), variant)
        return fields


class Results:
    """The finished runs, in a file that is whole at any time; a later process goes on from it, on any machine.

    Raises:
      ConfigError: the file is of other runs; names what differs.
    """

    def __init__(self, study: Study):
        self.path = study.out / RESULTS
        identity = study.identity()
        if self.path.exists():
            self.content = read_results(self.path)
            stored = self.content["identity"]
            changed = [
                k for k in {**stored, **identity} if stored.get(k) != identity.get(k) and not FREE.search(k)
            ]
            if changed:
                k = changed[0]
                raise ConfigError(
                    f"{self.path} was begun with {k}={stored.get(k)}, this command has {identity.get(k)} "
                    f"({len(changed)} fields differ); give what it was begun with, or another --out."
                )
        else:
            self.content = {
                "identity": identity,
                "steps": study.steps,
                "tokens": study.steps * GLOBAL_BATCH * SEQ_LEN,
                "lr": study.lr,
                "data": {
                    "digest": study.data.digest,
                    "tokens": study.data.tokens,
                    "sources": study.data.sources,
                },
                "held_out": held_out(study),
                "models": {name: describe(study.config(name, 0)) for name in VARIANTS},
                "runs": [],
            }
            self._write()

    def has(self, variant: str, seed: int) -> bool:
        """Whether the run is finished."""
        return any((r["variant"], r["seed"]) == (variant, seed) for r in self.content["runs"])

    def add(self, run: dict[str, Any]) -> None:
        """Keeps a finished run."""
        self.content["runs"].append(run)
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(partial, self.path)


def read_results(path: Path) -> dict[str, Any]:
    """The content of a results file.

    Raises:
      ConfigError: it is none.
    """
    try:
        content = json.loads(path.read_text())
        content["identity"], content["runs"]
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no results of `python -m benchmarks.study run`: {error!r}.") from error


def held_out(study: Study) -> dict[str, int]:
    """Tokens that an evaluation predicts, and the bytes of text that they stand for."""
    config = study.config("mha", 0)
    windows = open_windows(config.data, "val", VOCAB).read(range(config.log.eval_sequences))
    lengths = np.zeros(VOCAB, np.int64)
    lengths[: len(study.data.byte_lengths)] = study.data.byte_lengths
    targets = windows[:, 1:]
    return {"tokens": targets.size, "bytes": int(lengths[targets].sum())}


def describe(config: TrainConfig) -> dict[str, Any]:
    """Sizes of a model: parameters, and values that each device caches for a token in a layer, by `tensor`."""
    return {
        "parameters": sum(parameters(config.model).values()),
        "d_ff": config.model.d_ff,
        "cached_values": {str(n): values_per_token(config.model, n) for n in (1, 2, 4)},
    }


def summary(run: str | os.PathLike[str]) -> dict[str, Any]:
    """Summarises a finished run from its metrics."""
    records = read_metrics(run)
    evaluated = [(int(r["tokens"]), r["eval_loss"]) for r in records.values() if "eval_loss" in r]
    rates = [r["tokens_per_second"] for r in records.values() if "tokens_per_second" in r]
    return {
        "loss": evaluated[-1][1],
        "held_out_losses": evaluated,
        "training_losses": [(int(r["tokens"]), round(r["loss"], 5)) for r in records.values() if "loss" in r],
        "tokens_per_second": statistics.median(rates) if rates else None,
        "mfu": statistics.median([r["mfu"] for r in records.values() if "mfu" in r] or [0]) or None,
    }


def compile_ahead(study: Study, variants: Sequence[str], processes: int) -> None:
    """Fills XLA's cache of compiled programs: a step and an evaluation of each run, several models at a time.

    Processes that run later find what these compiled; the GPU's memory must hold so many models at once.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, spawn) as pool:
        list(pool.map(functools.partial(_one_step, study), variants))


def _one_step(study: Study, variant: str) -> None:
    # The number of steps is in no compiled program, the schedule of the learning rate is.
    for seed in study.seeds:
        with tempfile.TemporaryDirectory() as out:
            train(dataclasses.replace(study.config(variant, seed), steps=1, out=out))


@contextlib.contextmanager
def _stopping(seconds: float) -> Iterator[threading.Event]:
    """An event that SIGTERM sets, which is sent after `seconds` (0: never); within `train` it saves and returns."""
    stop = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())

    def expire() -> None:
        stop.set()
        os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Timer(seconds, expire) if seconds else None
    if timer:
        timer.daemon = True
        timer.start()
    try:
        yield stop
    finally:
        if timer:
            timer.cancel()
        signal.signal(signal.SIGTERM, previous)


def run_all(
    study: Study, variants: Sequence[str], argv: Sequence[str], *, budget: float = 0, processes: int = 0
) -> bool:
    """Trains what is not finished: all models with the first seed, then with the next; each result is written at once.

    Args:
      study: what to run.
      variants: names of `VARIANTS`.
      argv: arguments that repeat it, for the record.
      budget: seconds. A run that would not end within them is not begun (the longest one so far tells), and the one
        that is being trained when they are over is saved; 0: no limit.
      processes: that compile ahead; 0: each run compiles its own.

    Returns:
      Whether all runs are finished.
    """
    results = Results(study)
    todo = [(v, s) for s in study.seeds for v in variants if not results.has(v, s)]
    start, longest = time.monotonic(), 0.0
    say = lambda text: print(f"[{time.monotonic() - start:.0f} s] {text}", file=sys.stderr, flush=True)
    with _stopping(budget) as stop:
        if processes and todo:
            compile_ahead(study, sorted({v for v, _ in todo}, key=variants.index), processes)
            say("compiled")
        for i, (variant, seed) in enumerate(todo):
            begin = time.monotonic()
            if stop.is_set() or (budget and begin - start + longest > budget):
                say(f"stopped; {len(todo) - i} runs are left, the same command goes on")
                return False
            config = study.config(variant, seed)
            try:
                outcome = train(config)
            except DivergedError as error:
                results.add({"variant": variant, "seed": seed, "diverged": str(error)})
                continue
            if outcome.interrupted:
                say(f"stopped in {config.name}; {len(todo) - i} runs are left, the same command goes on")
                return False
            measured = summary(config.run_dir)
            seconds = time.monotonic() - begin
            longest = max(longest, seconds)
            setting = dataclasses.asdict(Setting.here("benchmarks.study", argv))
            results.add(
                {"variant": variant, "seed": seed, "seconds": seconds, **measured, "setting": setting}
            )
            say(f"{config.name}: held-out loss {measured['loss']:.4f} in {seconds:.0f} s")
    return True
