"""`mlra-evaluate --checkpoint DIR [--data SHARDS ...] [--tasks NAMES]`: perplexity and downstream tasks."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import numpy as np
import tyro

from mlra_jax.cli import command
from mlra_jax.config import (
    OPTION,
    ConfigError,
    MeshConfig,
    NotNegative,
    Positive,
    Range,
    TrainConfig,
    Validated,
)
from mlra_jax.data.tokenizers import get_tokenizer
from mlra_jax.distributed import initialize, take_args
from mlra_jax.errors import UserError
from mlra_jax.evaluation import needle
from mlra_jax.evaluation.load import ALL_DEVICES, Evaluated, plan_evaluation
from mlra_jax.evaluation.perplexity import Part, Perplexity, Protocol, evaluate, mean, open_parts
from mlra_jax.evaluation.scoring import Scorer
from mlra_jax.execution.back_ends import BackEnds
from mlra_jax.execution.compilation_cache import keep_compiled
from mlra_jax.figures import check_figure, save_figure
from mlra_jax.generation.generator import Generator
from mlra_jax.markdown import padded
from mlra_jax.sharding import check_decode_layout
from mlra_jax.storage import write_whole

Percent = Annotated[int, Range(ge=0, le=100)]


@dataclasses.dataclass(frozen=True)
class EvaluateArgs(Validated):
    """Evaluates a checkpoint: perplexity of token shards, and tasks of lm-evaluation-harness.

    Without --data and --tasks: perplexity of the run's held-out shards. Tables go to standard output. On several hosts,
    run the same command on each with --distributed.auto (TPU pod, Slurm, Open MPI), or with --distributed.coordinator
    HOST:PORT, --distributed.processes N and --distributed.process_id I; the first one prints.
    """

    at: ClassVar[str] = OPTION
    checkpoint: str
    """A run's folder, its checkpoints folder or one step's folder; local or a bucket URL."""
    data: tuple[str, ...] = ()
    """Shards, folders of shards (all their *.bin) or bucket URLs of either; `embedded`: the held-out split of the
    package's corpus."""
    tasks: str = ""
    """Comma-separated tasks of lm-evaluation-harness (needs the extra `eval`); `paper`: the paper's seven;
    `mlra_needle`: whether the model finds a number in a long text, which needs nothing."""
    step: NotNegative | None = None
    """Step of the checkpoint; default: the latest."""
    mesh: MeshConfig = ALL_DEVICES
    """Device mesh, as in training; default: data parallelism over all devices."""
    protocol: Protocol = "exact"
    """exact: predict every token of a shard but its first; paper: whole batches of six windows, at most 1e8 tokens."""
    seq_len: NotNegative = 0
    """Window length, and maximum length of a task's sequences, in tokens; 0: as in training."""
    batch_size: Positive = 8
    """Sequences per data-parallel device (data x fsdp)."""
    verify: bool = False
    """First check the shards' tokens against their checksums."""
    fewshot: NotNegative = 0
    """Few-shot examples before each question."""
    limit: Positive | None = None
    """Evaluate only this many documents of each task, for a trial."""
    task_folder: str = ""
    """Folder with YAML files of further tasks."""
    needle_lengths: tuple[Positive, ...] = ()
    """Lengths of the sequences of mlra_needle, in tokens; default: an eighth of --seq-len and its doublings."""
    needle_depths: tuple[Percent, ...] = needle.DEPTHS
    """Where mlra_needle hides the number, in percent of the text around it."""
    needle_samples: Positive = 8
    """Numbers to find at each length and depth."""
    needle_digits: Annotated[int, Range(ge=1, le=100)] = needle.DIGITS
    """Digits of a number."""
    needle_figure: str = ""
    """File for a heat map of what was found, in the format of its suffix; empty: none."""
    tokenizer: str = ""
    """`byte`, `gpt2`, or a path; default: the model's own."""
    json: str = ""
    """JSON file for the results."""
    compilation_cache: str | None = None
    """Folder for XLA's persistent compilation cache, empty: none; default: the run's own setting."""


def _harness() -> Any:
    try:
        from mlra_jax.evaluation import harness
    except ImportError as error:
        raise ConfigError(
            f"--tasks needs lm-evaluation-harness: pip install 'mlra_jax[eval]' ({error})."
        ) from error
    return harness


def _byte_lengths(args: EvaluateArgs, config: TrainConfig) -> np.ndarray | None:
    """The tokenizer's byte lengths; None, with a note, if it is not available or has none."""
    name = args.tokenizer or config.data.tokenizer
    try:
        lengths = get_tokenizer(name).byte_lengths()
        reason = "its tokens have no fixed bytes"
    except UserError as error:
        if args.tokenizer:
            raise
        lengths, reason = None, str(error).rstrip(".")
    if lengths is None:
        _say(f"note: no bits per byte, for the tokenizer {name}: {reason}.")
    elif len(lengths) > config.model.vocab_size:
        raise ConfigError(
            f"The tokenizer {name} has {len(lengths)} ids, the model's vocabulary {config.model.vocab_size}; name "
            "the tokenizer that the model was trained with."
        )
    return lengths


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def perplexity_table(results: Sequence[Perplexity]) -> list[str]:
    """One row per shard, and one for their unweighted mean."""
    number = lambda value, digits=4: "" if value is None else f"{value:.{digits}f}"
    shown = lambda r: (number(r["nats_per_token"]), number(r["perplexity"], 3), number(r["bits_per_byte"]))
    rows = [(r.name, f"{r.tokens:,}", *shown(r.as_dict())) for r in results]
    if len(results) > 1:
        rows.append(("mean", "", *shown(mean(results))))
    return padded(("shard", "tokens", "nats/token", "perplexity", "bits/byte"), rows, "lr")


def task_table(results: dict[str, dict[str, float]], average: float | None) -> list[str]:
    """One row per metric of each task, and the paper's average if there is one."""
    rows = []
    for task, metrics in results.items():
        for name, value in metrics.items():
            if not name.endswith("_stderr") and name != "sample_len":  # the number of documents
                error = metrics.get(f"{name}_stderr")
                rows.append((task, name, f"{value:.4f}", "" if error is None else f"{error:.4f}"))
    if average is not None:
        rows.append(("the paper's average", "%", f"{average:.2f}", ""))
    return padded(("task", "metric", "value", "standard error"), rows, "llr")


def needle_table(found: needle.Found) -> list[str]:
    """One row per length, one column per depth, in percent."""
    rows = [
        (f"{n:,}", *(f"{100 * share:.0f}" for share in shares))
        for n, shares in zip(found.lengths, found.share, strict=True)
    ]
    return padded(("tokens", *(f"at {depth} %" for depth in found.depths)), rows, "r")


@command
def main(argv: Sequence[str]) -> int:
    """Evaluates and prints; returns the exit status."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    distributed, argv = take_args(argv)
    args = tyro.cli(EvaluateArgs, args=argv, prog="mlra-evaluate")
    args.validate()
    initialize(distributed)

    # Whatever can be refused is refused here, before parameters are read.
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    model = plan_evaluation(
        args.checkpoint, args.mesh, seq_len=args.seq_len, batch_size=args.batch_size, step=args.step
    )
    config = model.config
    out = Path(args.json).expanduser()
    if args.json and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(f"--json {args.json} must be a file in a folder that exists.")
    figure = check_figure("--needle-figure", args.needle_figure) if args.needle_figure else None
    needles = None
    if needle.TASK in names:
        names.remove(needle.TASK)
        lengths = args.needle_lengths or tuple(model.seq_len // d for d in (8, 4, 2, 1))
        needles = plan_evaluation(
            args.checkpoint, args.mesh, seq_len=max(lengths), batch_size=args.batch_size, step=args.step
        )
        needle_tokenizer = get_tokenizer(args.tokenizer or config.data.tokenizer)
        needle.sequence(needle_tokenizer, min(lengths), 0, "0" * args.needle_digits)
    parts: list[Part] = []
    byte_lengths = None
    if args.data or not args.tasks:
        tokenizer_name = args.tokenizer or config.data.tokenizer
        data = dataclasses.replace(config.data, tokenizer=tokenizer_name, verify=args.verify)
        parts = open_parts(args.data, data, config.model.vocab_size, args.protocol)
        byte_lengths = _byte_lengths(args, config)
    tasks = None
    if names:
        harness = _harness()
        tokenizer = get_tokenizer(args.tokenizer or config.data.tokenizer)
        tasks = harness.load_tasks(names, args.task_folder)
        if tasks.generates:
            check_decode_layout(config.model, MeshConfig(**model.mesh.shape))
    keep_compiled(config.compilation_cache if args.compilation_cache is None else args.compilation_cache)

    first = jax.process_index() == 0
    report: dict[str, Any] = _describe(args, model)
    with BackEnds(_say) as back_ends:
        if parts:
            results = list(evaluate(model, parts, byte_lengths, progress=first))
            report["perplexity"] = {"shards": [r.as_dict() for r in results], "mean": mean(results)}
            if first:
                print(*perplexity_table(results), sep="\n", flush=True)
        if needles is not None:
            found = needle.find_needles(
                Scorer(needles),
                needle_tokenizer,
                lengths,
                args.needle_depths,
                samples=args.needle_samples,
                digits=args.needle_digits,
                progress=first,
            )
            report[needle.TASK] = {
                "samples": args.needle_samples,
                "digits": args.needle_digits,
                **found.as_dict(),
            }
            if first:
                print(*needle_table(found), sep="\n", flush=True)
            if first and figure:
                save_figure(needle.heat_map(found, config.name), figure)
        if tasks is not None:
            make_generator = lambda: Generator.from_checkpoint(
                model.checkpoint, mesh=MeshConfig(**model.mesh.shape), tokenizer=args.tokenizer
            )
            adapter = harness.HarnessModel(Scorer(model), tokenizer, make_generator, progress=first)
            scores = harness.run_tasks(adapter, tasks, num_fewshot=args.fewshot, limit=args.limit)
            report["tasks"] = scores
            average = harness.paper_average(scores)
            if average is not None:
                report["paper_average"] = average
            if first:
                print(*task_table(scores, average), sep="\n", flush=True)
    _say(str(back_ends))
    if args.json and first:
        write_whole(out, json.dumps(report, indent=2) + "\n")
    return 0


def _describe(args: EvaluateArgs, model: Evaluated) -> dict[str, Any]:
    """Describes what was measured, and how."""
    return {
        "checkpoint": model.checkpoint,
        "name": model.config.name,
        "protocol": args.protocol,
        "seq_len": model.seq_len,
        "batch_size": model.batch_size,
        "mesh": dict(model.mesh.shape),
        "device": model.mesh.devices.flat[0].device_kind,
        "compute_dtype": model.config.model.compute_dtype,
        "fewshot": args.fewshot,
        "limit": args.limit,
    }


if __name__ == "__main__":
    sys.exit(main())
