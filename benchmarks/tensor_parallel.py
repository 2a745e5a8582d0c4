"""Decoding on 1, 2 and 4 devices that split the latent heads: attention, its whole layer, and the 2.9 B model.

    python -m benchmarks.tensor_parallel                                   # on as many devices as there are
    python -m benchmarks.tensor_parallel --parts layer --variants mlra_4 mla --cases 1x128K 1x2M 64x8K
    python -m benchmarks.tensor_parallel --size tiny --cases 1x256 --model-cases 1x256      # on a CPU

Where there are fewer devices, one device's share is timed alone, without the exchanges between devices, and marked so
(`benchmarks/attention_layer.py` says what a share is). Three parts:

- layer: the decode step of an attention layer as the paper's 2.9 B models have it, but with 64 query heads (GQA: 8 KV
  heads). Its attention kernels and its exchanges are told apart by a profile. MLRA is timed with the query heads of
  W_qb and W_o split over the devices, and whole on each. MLA is timed with its whole cache on each device, and as `MLA
  (context)` with the tokens of the cache split over the devices, and query heads split and whole: decode context
  parallelism, as vLLM and SGLang decode MLA.
- model: steps of the 2.9 B model in the engine of `decode.py`, as `benchmarks.decode_step` times them.
- check: greedy tokens on all numbers of devices, in float32 and highest precision, which must be equal; and the largest
  difference of logits in bfloat16, of a prompt and of steps after it. Needs the devices.

Writes `tensor_parallel_DEVICE.json`, `.md` and `.png`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import pathlib
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

from benchmarks import decode_step, paper
from benchmarks.attention_layer import EXCHANGE, Place, device_bytes, measure_layers, places
from benchmarks.decode_attention import RESULTS, Setting, parse_size
from benchmarks.figures import Series, draw, show_tokens
from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.attention.registry import attention_name
from mlra_jax.cli.configs import load_config
from mlra_jax.config import ConfigError, ModelConfig
from mlra_jax.execution.accelerators import find_accelerator
from mlra_jax.generation.engine import LENGTH_UNIT, STEPS_PER_RUN, Engine, prefill, round_up
from mlra_jax.generation.load import abstract_params
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


def case(text: str) -> tuple[int, int]:
    """`16x32K` as batch and context, for argparse."""
    try:
        return parse_size(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


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
    """The same with the query heads of the paper's decode shape."""
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
    """Results of `benchmarks.decode_step` of each case, with where the model lies; or a name and why there is none."""
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
                engine.check_memory(batch, 1, capacity)
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
    """An engine whose parameters depend on the configuration alone, and not on how they are laid out."""
    mesh, config, rules = place.mesh(), place.config, place.rules
    abstract = abstract_params(config, rules, mesh)
    with jax.set_mesh(mesh):
        params = decode_step.random_values(abstract, jax.random.key(0))
        return Engine(to_decode(config, params, rules, donate=True), mesh, config.vocab_size)


def greedy(engine: Engine, prompts: Sequence[Sequence[int]], n: int) -> np.ndarray:
    """The most probable `n` tokens after each prompt, [prompts, n]."""
    rows = engine.start(prompts, [n] * len(prompts))
    tokens = [np.asarray(rows.first_B)[None]]
    while (done := sum(map(len, tokens))) < n:
        tokens.append(np.asarray(rows.run(n - done))[: min(n - done, STEPS_PER_RUN)])
    return np.concatenate(tokens).T[: len(prompts)]


def stepped_logits(engine: Engine, tokens: np.ndarray, start: int) -> np.ndarray:
    """Logits after the first `start` tokens of each row, and after each one more: [rows, 1 + rest, V]."""
    b, total = tokens.shape
    max_len = round_up(total, LENGTH_UNIT)
    chunk = lambda leaves, *args: prefill(engine.model(leaves), *args)
    with jax.set_mesh(engine.mesh):
        cache, logits_BV = engine._fill(tokens[:, :start].tolist(), b, max_len)
        found = [np.asarray(logits_BV)]
        for t in range(start, total):
            new = engine.put(tokens[:, t : t + 1], "batch"), engine.put(np.ones(b, np.int32), "batch")
            args = engine.leaves, cache, logits_BV, *new
            cache, logits_BV = engine.call(("prefill", b, max_len, 1), chunk, *args, donate=(1, 2))
            found.append(np.asarray(logits_BV))
    return np.stack(found, axis=1)


def check(variant: str, config: ModelConfig, tensors: Sequence[int], n_tokens: int) -> dict[str, Any]:
    """Compares one device with several: greedy tokens in float32, and logits in bfloat16.

    Args:
      variant: name of the model.
      config: of it.
      tensors: numbers of devices, 1 the first.
      n_tokens: tokens that are made, and steps whose logits are compared.
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
    """For a table; empty for what is not known."""
    return "" if x is None or not np.isfinite(x) else f"{x:,.{digits}f}"


def over(x: float | None, y: float | None) -> float | None:
    """A ratio, if both are known."""
    return x / y if x is not None and y else None


LAYER_HEAD = [
    "| attention | devices | query heads | batch | context | layer, us | by profile | by host | bound | of bound | "
    "attention, us | of bandwidth | exchanges, us | of layer |",
    "| --- | --- | --- |" + " ---: |" * 11,
]


def layer_line(r: Mapping[str, Any]) -> str:
    """A layer in the table."""
    us, attention, exchange, bandwidth = (r[k] for k in ("us", "attention_us", "exchange_us", "bandwidth"))
    read = 1e6 * r["cache_bytes"] / bandwidth if bandwidth else None
    of_bound, of_read, of_layer = over(r["bound_us"], us), over(read, attention), over(exchange, us)
    percent = lambda x: "" if x is None else f"{x:.0%}"
    cells = [
        NAMES[row_of(r)],
        f"{r['tensor']}{' (share)' if r['share'] else ''}",
        r["heads"],
        str(r["batch"]),
        show_tokens(r["context"]),
        number(us),
        "" if r["timing"]["clock"] == "wall" else number(r["timing"]["us"]),
        number(r["wall_us"]),
        number(r["bound_us"]),
        percent(of_bound),
        number(attention),
        percent(of_read),
        "" if r["share"] else number(exchange),
        "" if r["share"] else percent(of_layer),
    ]
    return "| " + " | ".join(cells) + " |"


def quantities(r: Mapping[str, Any]) -> dict[str, float | None]:
    """What is compared between layers, in us."""
    attention, exchange = r["attention_us"], r["exchange_us"]
    both = None if attention is None else attention + exchange
    return {"attention": attention, "attention and exchanges": both, "layer": r["us"]}


def fastest(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """By one of `ROWS`, batch, context and devices: the faster of the layouts."""
    found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for r in sorted(rows, key=lambda r: -r["us"]):
        found[row_of(r), r["batch"], r["context"], r["tensor"]] = r
    return found


def comparisons(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tables of MLA over MLRA-4, and of one device over several, of the faster layout of each."""
    found = fastest(rows)
    sizes = sorted({key[1:3] for key in found})
    tensors = sorted({key[3] for key in found})
    shared = {key[3] for key, r in found.items() if r["share"]}
    named = [f"{t}{' (share)' if t in shared else ''}" for t in tensors]
    lines = ["", "## MLA's time over MLRA-4's, at equal number of devices", ""]
    what = ("attention", "attention and exchanges", "layer")
    rivals = [
        (v, t, n)
        for v in ("mla", CONTEXT)
        for t, n in zip(tensors, named, strict=True)
        if v == "mla" or (t > 1 and any(key[0] == v for key in found))
    ]
    heads = [f"{NAMES[v]}: {w}, {n}" for w in what for v, _, n in rivals]
    lines += ["| batch | context | " + " | ".join(heads) + " |", "| ---: |" + " ---: |" * (1 + len(heads))]
    for batch, context in sizes:
        cells = []
        for w in what:
            for v, t, _ in rivals:
                pair = [found.get((row, batch, context, t)) for row in (v, "mlra_4")]
                mla, mlra = (quantities(r)[w] if r else None for r in pair)
                cells.append(number(over(mla, mlra), 2))
        lines.append(f"| {batch} | {show_tokens(context)} | " + " | ".join(cells) + " |")
    lines += ["", "## One device's time over that of several, of the whole layer", ""]
    several = [(t, n) for t, n in zip(tensors, named, strict=True) if t > 1]
    variants = [v for v in ROWS if any(key[0] == v for key in found)]
    heads = [f"{NAMES[v]}, {n}" for v in variants for _, n in several]
    lines += ["| batch | context | " + " | ".join(heads) + " |", "| ---: |" + " ---: |" * (1 + len(heads))]
    for batch, context in sizes:
        cells = []
        for v in variants:
            one = found.get(("mla" if v == CONTEXT else v, batch, context, 1))
            for t, _ in several:
                r = found.get((v, batch, context, t))
                cells.append(number(over(one["us"], r["us"]), 2) if one and r else "")
        lines.append(f"| {batch} | {show_tokens(context)} | " + " | ".join(cells) + " |")
    return lines


def model_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of the 2.9 B model."""
    lines = [
        "",
        "## The 2.9 B model",
        "",
        "Steps of the engine of `decode.py`, by the host's clock. *Bound*: weights and cache read once, at the",
        "bandwidth of the data sheet. *Exchanges*: of the time in kernels, by a profile, with residual sum and norm",
        "where one kernel does all three.",
        "",
        "| model | devices | query heads | batch | context | step, ms | spread | bound | of bound | tokens/s | "
        "exchanges | weights, GB a device | cache, GB a device |",
        "| --- | --- | --- |" + " ---: |" * 10,
    ]
    for r in results:
        exchange = over(r["exchange_us"], r["busy_us"])
        cells = [
            NAMES[row_of(r)],
            f"{r['tensor']}{' (share)' if r['share'] else ''}",
            r["heads"],
            str(r["batch"]),
            show_tokens(r["context"]),
            number(r["step_ms"], 3),
            number(r["spread_ms"], 3),
            number(r["ideal_ms"], 3),
            "" if not np.isfinite(r["ratio"]) else f"{1 / r['ratio']:.0%}",
            number(r["tokens_per_second"], 0),
            "" if exchange is None or r["share"] else f"{exchange:.0%}",
            number(r["weight_bytes"] / 1e9, 2),
            number(r["cache_bytes"] / 1e9, 3),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def check_lines(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of equal results."""
    lines = [
        "",
        "## Against one device",
        "",
        "| model | devices | query heads | greedy tokens in float32 | largest difference in bfloat16 logits | std |",
        "| --- | ---: | --- | --- | ---: | ---: |",
    ]
    for c in checks:
        for r in c["rows"]:
            equal = "equal" if r["equal_tokens"] else "DIFFERENT"
            cells = NAMES[row_of(r, c["variant"])], str(r["tensor"]), r["heads"], equal
            lines.append(f"| {' | '.join(cells)} | {r['largest_difference']:.4f} | {r['logits_std']:.3f} |")
    return lines


def markdown(record: Mapping[str, Any]) -> str:
    """All tables."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"# Tensor-parallel decoding on {record['n_devices']} x {record['device']}",
        "",
        f"{record['date']}, {versions}. `{record['command']}`",
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
    lines += [
        line for name, why in record["failures"].items() for line in ("", f"{name}: not measured. {why}")
    ]
    return "\n".join(lines) + "\n"


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
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    note = [f"{record['n_devices']} x {record['device']}, {versions}, {record['date']}"]
    note += textwrap.wrap(record["command"], 150)
    if any(r["share"] for r in found.values()):
        note.append("Share: one device of so many, alone, without the exchanges between devices.")
    draw(path, panels, x_label="cached tokens", y_label="us", note="\n".join(note), log=True)


def write(record: Mapping[str, Any], stem: pathlib.Path) -> None:
    """Writes `stem`.json, `.md` and `.png`."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(record))
    draw_figure(record, stem.with_suffix(".png"))


def parse(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tensor_parallel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="of layers")
    parser.add_argument("--tensor", nargs="+", type=int, default=[1, 2, 4], help="numbers of devices")
    parser.add_argument(
        "--cases", nargs="+", type=case, default=[parse_size(c) for c in CASES], help="of layers"
    )
    parser.add_argument("--models", nargs="+", choices=VARIANTS, default=["mlra_4", "mla"], help="end to end")
    parser.add_argument("--model-cases", nargs="+", type=case, default=[parse_size(c) for c in MODEL_CASES])
    parser.add_argument("--size", choices=("paper", "tiny"), default="paper", help="tiny: for a CPU")
    parser.add_argument("--runs", type=int, default=5, help="timed")
    parser.add_argument(
        "--steps", type=int, default=32, help=f"of a run of the model, at most {STEPS_PER_RUN}"
    )
    parser.add_argument("--check-tokens", type=int, default=32, help="tokens that are compared")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no other measurement after so long"
    )
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--redraw", type=pathlib.Path, metavar="JSON", help="write tables and figure of a JSON again"
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
        try:
            write(json.loads(args.redraw.read_text()), args.redraw.with_suffix(""))
        except (OSError, ValueError, KeyError, TypeError) as e:
            parser.error(f"{args.redraw} cannot be drawn; it must be what this command has written ({e!r}).")
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
                records = [row.record() for row in result]
                keep("layers", records, [layer_line(r) for r in records])
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
