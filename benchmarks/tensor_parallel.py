"""Tensor-parallel decoding on 1, 2 and 4 devices: attention, whole attention layers, and the 2.9 B model.

    python -m benchmarks.tensor_parallel                                   # on as many devices as there are
    python -m benchmarks.tensor_parallel --parts layer --variants mlra_4 mla --cases 1x128K 1x2M 64x8K
    python -m benchmarks.tensor_parallel --size tiny --cases 1x256 --model-cases 1x256      # on a CPU

With fewer devices, one device's share is timed alone, without collectives, and marked (`benchmarks/attention_layer.py`
defines a share). Three parts:

- layer: the decode step of an attention layer of the paper's 2.9 B models, but with 64 query heads (GQA: 8 KV heads). A
  profile separates attention kernels and collectives. MLRA is timed with the query heads of W_qb and W_o split over the
  devices, and whole on each. MLA is timed with its whole cache on each device, and as `MLA (context)` with the cache's
  tokens split over the devices, query heads split and whole: decode context parallelism, as vLLM and SGLang decode MLA.
- model: steps of the 2.9 B model in the engine of `decode.py`, as `benchmarks.decode_step` times them.
- check: greedy tokens for each number of devices, in float32 and highest precision, which must be equal; and the
  largest difference of bfloat16 logits, of a prompt and of steps after it. Needs the devices.

Writes `tensor_parallel_DEVICE.json`, `.md` and `.png`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import pathlib
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

from benchmarks import decode_step, paper, records
from benchmarks.attention_layer import EXCHANGE, Place, device_bytes, measure_layers, places
from benchmarks.figures import Series, draw, show_tokens
from benchmarks.records import Setting, parse_size
from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.attention.registry import attention_name
from mlra_jax.cli.configs import load_config
from mlra_jax.config import ConfigError, ModelConfig
from mlra_jax.execution.accelerators import find_accelerator
from mlra_jax.generation.engine import LENGTH_UNIT, STEPS_PER_RUN, Engine, Request, round_up
from mlra_jax.generation.load import abstract_params
from mlra_jax.generation.loop import GenerationLoop
from mlra_jax.markdown import head, row, table
from mlra_jax.model import to_decode
from mlra_jax.ops.tuning import slug

VARIANTS = ("mlra_4", "mlra_2", "gla_2", "mla", "gqa")
CASES = ("1x16K", "1x128K", "1x512K", "1x2M", "16x4K", "16x32K", "64x8K", "128x4K", "128x32K")
MODEL_CASES = ("1x1K", "1x16K", "1x128K", "1x2M", "16x4K", "64x8K")
PARTS = ("layer", "model", "check")
CONTEXT = "mla_context"
"""Stands for MLA with the tokens of its cache split."""
ROWS = (*VARIANTS, CONTEXT)
NAMES = {**paper.NAMES, CONTEXT: "MLA (context)"}
COLORS = {**paper.COLORS, CONTEXT: "tab:brown"}
HEADS = 64
"""Query heads of the paper's decode shape."""


TINY = {
    "latent": {"q_lora_rank": 32, "kv_lora_rank": 64, "d_nope": 16, "d_rope": 8},
    "grouped": {"n_kv_heads": 8, "d_head": 16},
}
"""Sizes of an attention that a CPU can run."""


def tiny(config: ModelConfig) -> ModelConfig:
    """A model of the same attention that a CPU can run."""
    a = config.attention
    attention = dataclasses.replace(cast(Any, a), **TINY[attention_name(type(a))])
    return dataclasses.replace(
        config,
        vocab_size=256,
        n_layers=min(config.n_layers, 2),
        d_model=64,
        n_heads=8,
        d_ff=64,
        attention=attention,
    )


def model_config(variant: str, size: str) -> ModelConfig:
    """The paper's 2.9 B model of a variant in bfloat16, or a tiny one of the same attention.

    Output projections are random, not zero as before training: else a token's logits would not depend on the others.
    """
    config = load_config(variant).model
    config = dataclasses.replace(config, param_dtype=config.compute_dtype, output_init="normal")
    return config if size == "paper" else tiny(config)


def layer_config(variant: str, size: str) -> ModelConfig:
    """The same model with the query heads of the paper's decode shape."""
    config = model_config(variant, size)
    if size != "paper":
        return config
    attention: Any = (
        GroupedAttentionConfig(n_kv_heads=8, d_head=128) if variant == "gqa" else config.attention
    )
    return dataclasses.replace(config, n_heads=HEADS, attention=attention)


def by_batch(cases: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """Contexts of each batch, ascending."""
    found: dict[int, list[int]] = {}
    for batch, context in sorted(set(cases)):
        found.setdefault(batch, []).append(context)
    return found


# The 2.9 B model


def measure_model(place: Place, cases: Sequence[tuple[int, int]], args: argparse.Namespace) -> Iterator[Any]:
    """Yields `benchmarks.decode_step`'s results for each case, with the layout; or a name and why there is none."""
    mesh, config = place.mesh(), place.runs
    with jax.set_mesh(mesh):
        engine = Engine(decode_step.random_model(config, place.rules), mesh, config.vocab_size)
    jax.block_until_ready(engine.leaves)
    chip = find_accelerator(jax.devices()[0].device_kind)
    options = argparse.Namespace(
        steps=args.steps, runs=args.runs, profile=True, bandwidth=chip.bandwidth if chip else float("nan")
    )
    weight_bytes = device_bytes(engine.leaves)
    benchmark = decode_step.Benchmark(engine, options, weight_bytes, sum(x.size for x in engine.leaves))
    for batch, contexts in by_batch(cases).items():
        capacity = 0
        while contexts:
            capacity = round_up(max(contexts), LENGTH_UNIT) + LENGTH_UNIT
            try:
                engine.check_memory(batch, capacity)
                break
            except ConfigError as e:
                yield f"model {place.name} batch {batch} context {show_tokens(contexts.pop())}", str(e)
        if not contexts:
            continue
        rows = benchmark.rows(batch, capacity)
        for context in contexts:
            benchmark.measure(rows, context)
            result = benchmark.results.pop()
            profile = result.pop("profile", {})
            exchange = sum(us for _, kernel, us, _ in profile.get("top", []) if EXCHANGE.search(kernel))
            yield {
                "variant": place.variant,
                "tensor": place.tensor,
                "heads": place.heads,
                "share": place.share,
                "split_tokens": place.split_tokens,
                **result,
                "busy_us": profile.get("busy_us"),
                "exchange_us": exchange if profile else None,
                "cache_bytes_allocated": rows.cache_bytes_per_device,
            }
        del rows
        gc.collect()


# Equal results


def seeded_engine(place: Place) -> Engine:
    """An engine whose parameters depend only on the configuration, not on the layout."""
    mesh, config, rules = place.mesh(), place.config, place.rules
    abstract = abstract_params(config, rules, mesh)
    with jax.set_mesh(mesh):
        params = decode_step.random_values(abstract, jax.random.key(0))
        return Engine(to_decode(config, params, rules, donate=True), mesh, config.vocab_size)


def greedy(engine: Engine, prompts: Sequence[Sequence[int]], n: int) -> np.ndarray:
    """Greedily decodes `n` tokens after each prompt: [prompts, n]."""
    loop = GenerationLoop(engine, len(prompts), round_up(max(map(len, prompts)) + n, LENGTH_UNIT))
    tokens: dict[int, list[int]] = {loop.submit(Request(prompt, n)): [] for prompt in prompts}
    while loop.busy:
        for event in loop.step():
            tokens[event.request] += event.tokens
    return np.array([*tokens.values()])


def stepped_logits(engine: Engine, tokens: np.ndarray, start: int) -> np.ndarray:
    """Logits after the first `start` tokens of each row, and after each further one: [rows, 1 + rest, V]."""
    rows = decode_step.filled_rows(engine, tokens[:, :start].tolist(), round_up(tokens.shape[1], LENGTH_UNIT))
    found = [np.asarray(rows.logits_BV)]
    for t in range(start, tokens.shape[1]):
        rows.fill({i: (t, [token]) for i, token in enumerate(tokens[:, t])}, rows.part_rows, 1)
        found.append(np.asarray(rows.logits_BV))
    return np.stack(found, axis=1)


def check(variant: str, config: ModelConfig, tensors: Sequence[int], n_tokens: int) -> dict[str, Any]:
    """Compares one device with several: greedy tokens in float32, and logits in bfloat16.

    Args:
      variant: name of the model.
      config: its configuration.
      tensors: numbers of devices, starting with 1.
      n_tokens: tokens to generate, and steps whose logits to compare.
    """
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, config.vocab_size, (4, 48))
    given = rng.integers(0, config.vocab_size, (4, 48 + n_tokens))
    found: dict[str, Any] = {"variant": variant, "tokens": n_tokens, "rows": []}
    exact = dataclasses.replace(config, param_dtype="float32", compute_dtype="float32")
    alone: dict[str, np.ndarray] = {}
    for tensor in tensors:
        for place in places(variant, config, tensor, tensor):
            with jax.default_matmul_precision("highest"):
                engine = seeded_engine(dataclasses.replace(place, config=exact))
                tokens = greedy(engine, prompts.tolist(), n_tokens)
            del engine
            gc.collect()
            engine = seeded_engine(place)
            logits = stepped_logits(engine, given, 48)
            del engine
            gc.collect()
            if not alone:
                alone = {"tokens": tokens, "logits": logits}
            found["rows"].append(
                {
                    "tensor": tensor,
                    "heads": place.heads,
                    "split_tokens": place.split_tokens,
                    "equal_tokens": bool((tokens == alone["tokens"]).all()),
                    "largest_difference": float(np.abs(logits - alone["logits"]).max()),
                    "logits_std": float(alone["logits"].std()),
                }
            )
    return found


# What is written


def row_of(r: Mapping[str, Any], variant: str | None = None) -> str:
    """Of a result: one of `ROWS`. Results of earlier versions have no split tokens."""
    return CONTEXT if r.get("split_tokens") else variant or r["variant"]


def number(x: float | None, digits: int = 1) -> str:
    """Formats a number for a table; empty if unknown."""
    return "" if x is None or not np.isfinite(x) else f"{x:,.{digits}f}"


def over(x: float | None, y: float | None) -> float | None:
    """A ratio, if both are known."""
    return x / y if x is not None and y else None


LAYER_HEAD = head(
    [
        "attention",
        "devices",
        "query heads",
        "batch",
        "context",
        "layer, us",
        "by profile",
        "by host",
        "bound",
        "of bound",
        "attention, us",
        "of bandwidth",
        "exchanges, us",
        "of layer",
    ],
    "lllr",
)


def percent(x: float | None) -> str:
    """Formats a ratio for a table; empty if unknown."""
    return "" if x is None or not np.isfinite(x) else f"{x:.0%}"


def placed(r: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells that describe what ran: model, devices, query heads, batch and context."""
    devices = f"{r['tensor']}{' (share)' if r['share'] else ''}"
    return NAMES[row_of(r)], devices, r["heads"], str(r["batch"]), show_tokens(r["context"])


def layer_line(r: Mapping[str, Any]) -> str:
    """A layer in the table."""
    us, attention, exchange, bandwidth = (r[k] for k in ("us", "attention_us", "exchange_us", "bandwidth"))
    read = 1e6 * r["cache_bytes"] / bandwidth if bandwidth else None
    exchanges = ("", "") if r["share"] else (number(exchange), percent(over(exchange, us)))
    return row(
        (
            *placed(r),
            number(us),
            "" if r["timing"]["clock"] == "wall" else number(r["timing"]["us"]),
            number(r["wall_us"]),
            number(r["bound_us"]),
            percent(over(r["bound_us"], us)),
            number(attention),
            percent(over(read, attention)),
            *exchanges,
        )
    )


def quantities(r: Mapping[str, Any]) -> dict[str, float | None]:
    """The times to compare between layers, in us."""
    attention, exchange = r["attention_us"], r["exchange_us"]
    both = None if attention is None else attention + exchange
    return {"attention": attention, "attention and exchanges": both, "layer": r["us"]}


def fastest(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """The faster layout, by one of `ROWS`, batch, context and devices."""
    found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for r in sorted(rows, key=lambda r: -r["us"]):
        found[row_of(r), r["batch"], r["context"], r["tensor"]] = r
    return found


def comparisons(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tables of MLA over MLRA-4, and of one device over several, each in its faster layout."""
    found = fastest(rows)
    sizes = sorted({key[1:3] for key in found})
    tensors = sorted({key[3] for key in found})
    shared = {key[3] for key, r in found.items() if r["share"]}
    named = [f"{t}{' (share)' if t in shared else ''}" for t in tensors]
    what = ("attention", "attention and exchanges", "layer")
    several = [(t, n) for t, n in zip(tensors, named, strict=True) if t > 1]
    variants = [v for v in ROWS if any(key[0] == v for key in found)]
    rivals = [(v, t, n) for v in ("mla", CONTEXT) for t, n in zip(tensors, named, strict=True)]
    rivals = [(v, t, n) for v, t, n in rivals if v == "mla" or (t > 1 and v in variants)]

    def ratios(names: Iterable[str], cells: Callable[[int, int], Iterable[float | None]]) -> list[str]:
        rows = [(b, show_tokens(c), *(number(x, 2) for x in cells(b, c))) for b, c in sizes]
        return table(("batch", "context", *names), rows, "r")

    def over_mlra(batch: int, context: int) -> Iterator[float | None]:
        for w in what:
            for rival, t, _ in rivals:
                pair = [found.get((v, batch, context, t)) for v in (rival, "mlra_4")]
                yield over(*(quantities(r)[w] if r else None for r in pair))

    def over_several(batch: int, context: int) -> Iterator[float | None]:
        us = lambda v, t: found.get((v, batch, context, t), {}).get("us")
        alone = lambda v: us("mla" if v == CONTEXT else v, 1)
        return (over(alone(v), us(v, t)) for v in variants for t, _ in several)

    return [
        "",
        "## MLA's time over MLRA-4's, at equal number of devices",
        "",
        *ratios([f"{NAMES[v]}: {w}, {n}" for w in what for v, _, n in rivals], over_mlra),
        "",
        "## One device's time over that of several, of the whole layer",
        "",
        *ratios([f"{NAMES[v]}, {n}" for v in variants for _, n in several], over_several),
    ]


def model_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of the 2.9 B model."""
    rows = []
    for r in results:
        exchange = None if r["share"] else over(r["exchange_us"], r["busy_us"])
        times = [number(r[name], 3) for name in ("step_ms", "spread_ms", "ideal_ms")]
        rates = [percent(over(1.0, r["ratio"])), number(r["tokens_per_second"], 0), percent(exchange)]
        sizes = [number(r["weight_bytes"] / 1e9, 2), number(r["cache_bytes"] / 1e9, 3)]
        rows.append((*placed(r), *times, *rates, *sizes))
    names = ("model", "devices", "query heads", "batch", "context", "step, ms", "spread", "bound", "of bound")
    more = ("tokens/s", "exchanges", "weights, GB a device", "cache, GB a device")
    return [
        "",
        "## The 2.9 B model",
        "",
        "Steps of the engine of `decode.py`, by the host's clock. *Bound*: weights and cache read once, at the",
        "bandwidth of the data sheet. *Exchanges*: of the time in kernels, by a profile, with residual sum and norm",
        "where one kernel does all three.",
        "",
        *table((*names, *more), rows, "lllr"),
    ]


def check_lines(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of equal results."""
    rows = [
        (
            NAMES[row_of(r, c["variant"])],
            r["tensor"],
            r["heads"],
            "equal" if r["equal_tokens"] else "DIFFERENT",
            f"{r['largest_difference']:.4f}",
            f"{r['logits_std']:.3f}",
        )
        for c in checks
        for r in c["rows"]
    ]
    names = ("model", "devices", "query heads", "greedy tokens in float32")
    more = ("largest difference in bfloat16 logits", "std")
    return ["", "## Against one device", "", *table((*names, *more), rows, "lrllr")]


def markdown(record: Mapping[str, Any]) -> list[str]:
    """All tables."""
    lines = [
        f"# Tensor-parallel decoding on {record['n_devices']} x {record['device']}",
        "",
        f"{record['date']}, {records.versions(record)}. `{record['command']}`",
    ]
    if record["layers"]:
        lines += [
            "",
            "## Attention layers",
            "",
            f"bfloat16, widths of the 2.9 B models, {HEADS} query heads (unless tiny). *Share*: one device of so many",
            "alone, without the exchanges. *Layer*: the smaller of its device time in a profile (the first GPU's),",
            "where XLA launches kernels one by one, and its time by the host's clock without. *Bound*: the device's",
            "weights and cache read once at the bandwidth of the data sheet. *Attention*: its kernels; *of bandwidth*:",
            "the cache read once, over that. *Exchanges*: kernels between devices, waiting included. *MLA (context)*:",
            "with the tokens of the cache split over the devices; *MLA* has all of it on each.",
            "",
            *LAYER_HEAD,
            *map(layer_line, record["layers"]),
            *comparisons(record["layers"]),
        ]
    lines += model_lines(record["model"]) if record["model"] else []
    lines += check_lines(record["checks"]) if record["checks"] else []
    return lines + records.not_measured(record["failures"])


def draw_figure(record: Mapping[str, Any], path: pathlib.Path) -> None:
    """Attention and layer by context at batch 1, on one device and on the most."""
    found = fastest([r for r in record["layers"] if r["batch"] == 1])
    if not found:
        return
    most = max(key[3] for key in found)
    panels: dict[str, list[Series]] = {}
    for what in ("attention and exchanges", "layer"):
        lines = []
        for v in ROWS:
            for tensor in sorted({1, most}):
                points = {
                    key[2]: value
                    for key, r in found.items()
                    if key[0] == v and key[3] == tensor and (value := quantities(r)[what]) is not None
                }
                share = any(r["share"] for key, r in found.items() if key[0] == v and key[3] == tensor)
                label = f"{NAMES[v]}, {tensor}{' (share)' if share else ''}"
                lines.append(Series(label, COLORS[v], points, faint=tensor == 1 and most > 1))
        if any(line.points for line in lines):
            panels[f"{what.capitalize()}, batch 1, by devices"] = lines
    note = [f"{record['n_devices']} x {record['device']}, {records.versions(record)}, {record['date']}"]
    note += textwrap.wrap(record["command"], 150)
    if any(r["share"] for r in found.values()):
        note.append("Share: one device of so many, alone, without the exchanges between devices.")
    draw(path, panels, x_label="cached tokens", y_label="us", note="\n".join(note), log=True)


def write(record: Mapping[str, Any], stem: pathlib.Path) -> None:
    """Writes `stem`.json, `.md` and `.png`."""
    records.write(stem, record, markdown(record))
    draw_figure(record, stem.with_suffix(".png"))


def parse(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = records.parser("benchmarks.tensor_parallel", __doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="variants for the part `layer`"
    )
    parser.add_argument("--tensor", nargs="+", type=int, default=[1, 2, 4], help="numbers of devices")
    parser.add_argument(
        "--cases",
        nargs="+",
        type=records.case,
        default=[parse_size(c) for c in CASES],
        help="batch x context for the part `layer`",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=VARIANTS,
        default=["mlra_4", "mla"],
        help="variants for the parts `model` and `check`",
    )
    parser.add_argument(
        "--model-cases", nargs="+", type=records.case, default=[parse_size(c) for c in MODEL_CASES]
    )
    parser.add_argument("--size", choices=("paper", "tiny"), default="paper", help="tiny: sizes for a CPU")
    parser.add_argument("--runs", type=int, default=5, help="timed runs")
    parser.add_argument("--steps", type=int, default=32, help=f"model steps per run, at most {STEPS_PER_RUN}")
    parser.add_argument("--check-tokens", type=int, default=32, help="tokens to compare")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no further measurement after this time"
    )
    parser.add_argument(
        "--redraw", type=pathlib.Path, metavar="JSON", help="rewrite tables and figure of a results file"
    )
    args = parser.parse_args(argv)
    if min(args.tensor) < 1 or args.runs < 1 or args.check_tokens < 1:
        parser.error("--tensor, --runs and --check-tokens must be at least 1.")
    if not 1 <= args.steps <= STEPS_PER_RUN:
        parser.error(f"--steps must be from 1 to {STEPS_PER_RUN}; got {args.steps}.")
    return parser, args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 1 where something could not be measured, or results on several devices are not equal."""
    argv = sys.argv[1:] if argv is None else argv
    parser, args = parse(argv)
    if args.redraw:
        records.redraw(parser, args.redraw, lambda record: write(record, args.redraw.with_suffix("")))
        return 0
    begin, n_devices = time.perf_counter(), len(jax.devices())
    late = lambda: time.perf_counter() - begin > args.seconds
    setting = Setting.here("benchmarks.tensor_parallel", argv)
    record: dict[str, Any] = dataclasses.asdict(setting) | {"n_devices": n_devices}
    record |= {"layers": [], "model": [], "checks": [], "failures": {}}
    stem = args.out / f"tensor_parallel_{slug(setting.device)}"
    print(f"{n_devices} x {setting.device}, {setting.versions}", flush=True)

    def keep(kind: str, results: Sequence[Mapping[str, Any]], lines: Sequence[str]) -> None:
        record[kind] += results
        print(*lines, f"[{time.perf_counter() - begin:.0f} s]", sep="\n", flush=True)
        write(record, stem)  # what is measured is kept, whatever becomes of the next

    def fail(name: str, why: str) -> None:
        record["failures"][name] = why
        print(f"{name}: not measured. {why}", flush=True)
        write(record, stem)

    tensors = sorted(set(args.tensor))
    if "layer" in args.parts:
        print(*LAYER_HEAD, sep="\n", flush=True)
        contexts = by_batch(args.cases)
        layer_jobs: list[tuple[Place, int]] = []
        for batch in contexts:
            for v in args.variants:
                for t in tensors:
                    layer_jobs += [(p, batch) for p in places(v, layer_config(v, args.size), t, n_devices)]
        for result in measure_layers(layer_jobs, contexts, args.runs):
            if isinstance(result, tuple):
                fail(*result)
            else:
                measured = [layer.record() for layer in result]
                keep("layers", measured, [layer_line(r) for r in measured])
            if late():
                fail("layers", f"the rest was left out after --seconds {args.seconds:g}.")
                break
    if "model" in args.parts:
        for v in args.models:
            for t in tensors:
                for place in places(v, model_config(v, args.size), t, n_devices):
                    if late():
                        fail(f"model {v} tensor {t}", f"left out after --seconds {args.seconds:g}.")
                        continue
                    try:
                        for result in measure_model(place, args.model_cases, args):
                            if isinstance(result, tuple):
                                fail(*result)
                            else:
                                keep("model", [result], model_lines([result])[-1:])
                    except ConfigError as e:
                        fail(f"model {v} tensor {t}", str(e))
                    gc.collect()
    if "check" in args.parts:
        there = [t for t in tensors if t <= n_devices]
        for v in args.models:
            if len(there) < 2 or there[0] != 1:
                fail(
                    f"check {v}",
                    f"it compares one device with several; {there} of the --tensor asked for are there.",
                )
            elif late():
                fail(f"check {v}", f"left out after --seconds {args.seconds:g}.")
            else:
                found = check(v, model_config(v, args.size), there, args.check_tokens)
                keep("checks", [found], check_lines([found])[-len(found["rows"]) :])
    write(record, stem)
    print(f"Written to {stem}.json, .md and .png")
    equal = all(r["equal_tokens"] for c in record["checks"] for r in c["rows"])
    return 0 if equal and not record["failures"] else 1


if __name__ == "__main__":
    sys.exit(main())
