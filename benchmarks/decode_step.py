"""Time of a decode step and of prefill, against reading the weights and the cache once from memory.

    python -m benchmarks.decode_step --profile --out benchmarks/results/decode_step_h100

Weights, in the decode layout, and cache are random. A batch is timed in one compiled loop of steps
(`mlra_jax.generation.engine.run`), as in `decode.py`, by the host's clock from the call to the last token. With
--profile one more run is traced, and its device time shown by kernel; XLA then launches kernels one by one rather than
as CUDA graphs, with longer gaps. The contexts of a batch share one cache, so that each batch is compiled once.

Ideal: (bytes of the weights + bytes of what the cache holds) / bandwidth. The embedding counts once: its rows are the
logits' weights. FLOPs of prefill, of T tokens: 2 T (parameters without the embedding) + 2 V D, and for attention in the
absorbed form T^2 / 2 pairs of query and key x N J heads and branches x 2 (2 C + R) (grouped: x N x 4 H), per layer.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import gc
import math
import os
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

# The largest cases take nearly all memory of an 80 GB card; JAX would keep a quarter of it free.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import records
from benchmarks.measure import kernel_ops, trace
from benchmarks.records import Setting, parse_size
from mlra_jax.attention.kv_cache import Cache
from mlra_jax.cli.configs import load_config
from mlra_jax.config import ConfigError, MeshConfig, ModelConfig
from mlra_jax.generation.engine import (
    LENGTH_UNIT,
    STEPS_PER_RUN,
    Engine,
    Rows,
    next_chunk,
    round_up,
)
from mlra_jax.markdown import head, row, table
from mlra_jax.model import Transformer
from mlra_jax.ops.dispatch import choose
from mlra_jax.ops.skinny_gemm.api import SKINNY_GEMM
from mlra_jax.sharding import AxisRules, decode_rules, make_mesh

CASES = ("1x1K", "1x32K", "1x128K", "8x1K", "8x32K", "8x128K", "64x1K", "64x32K", "64x128K")
SCOPES = (
    "embed", "norm", "latents", "queries", "absorb", "append", "attend", "values", "output", "mlp", "logits", "sample",
)  # fmt: skip
"""Named scopes of the model, by which a step's time is split."""


def parse_option(text: str) -> tuple[str, str | bool | int]:
    """Parses `NAME=VALUE`, with the value in the type that XLA expects."""
    name, _, value = text.partition("=")
    if value in ("true", "false"):
        return name, value == "true"
    return name, int(value) if re.fullmatch(r"-?\d+", value) else value


@functools.partial(jax.jit, static_argnames=("x", "mean"))
def _random(key: jax.Array, x: jax.ShapeDtypeStruct, mean: float) -> jax.Array:
    values = mean + 0.02 * jax.random.normal(key, x.shape, x.dtype)
    return jax.sharding.reshard(values, x.sharding.spec)


def describe(make: Callable[[], Any]) -> Any:
    """The abstract result of `make` on the current mesh; gains are float32, as in `load_model`."""

    def leaf(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = jnp.float32 if "gain" in jax.tree_util.keystr(path) else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return jax.tree_util.tree_map_with_path(leaf, nnx.eval_shape(make))


def random_values(described: Any, key: jax.Array) -> Any:
    """Random parameters in place of abstract ones, laid out over the current mesh; gains are about 1."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(described)
    gain = lambda path: float("gain" in jax.tree_util.keystr(path))
    values = [_random(jax.random.fold_in(key, i), x, gain(path)) for i, (path, x) in enumerate(leaves)]
    return jax.tree.unflatten(treedef, values)


def random_model(config: ModelConfig, rules: AxisRules | None = None) -> Transformer:
    """A model of random weights in the decode layout on the current mesh, as `load_model` would return it."""
    rules = rules or decode_rules()
    make = lambda: Transformer(config, rngs=nnx.Rngs(0), rules=rules, layout="decode")
    return random_values(describe(make), jax.random.key(0))


def filled(cache: Cache, key: jax.Array) -> Cache:
    """A cache of these shapes with random values, repeated every `LENGTH_UNIT` tokens, and zero lengths.

    Inside a compiled function the key must be an argument, or the compiler would compute the values.
    """

    def fill(i: int, x: jax.ShapeDtypeStruct) -> jax.Array:
        *lead, length, width = x.shape
        block = jax.random.normal(jax.random.fold_in(key, i), (*lead, 1, LENGTH_UNIT, width), x.dtype)
        tiles = jnp.broadcast_to(block, (*lead, length // LENGTH_UNIT, LENGTH_UNIT, width))
        return jax.sharding.reshard(tiles.reshape(x.shape), x.sharding.spec)

    layers, treedef = jax.tree.flatten(cache.layers)
    values = [fill(i % 2, x) for i, x in enumerate(layers)]
    return Cache(jax.tree.unflatten(treedef, values), jnp.zeros(cache.lengths.shape, jnp.int32))


def filled_rows(engine: Engine, prompts: Sequence[Sequence[int]], max_len: int) -> Rows:
    """A row for each prompt, filled with it."""
    rows, done = Rows(engine, len(prompts), max_len), 0
    shapes = [shape for shape in engine.chunk_shapes(rows.batch, max_len) if shape[0] == rows.part_rows]
    while left := [max(0, len(prompt) - done) for prompt in prompts if len(prompt) > done]:
        n, size = next_chunk([left], shapes)
        rows.fill({i: (done, p[done : done + size]) for i, p in enumerate(prompts) if len(p) > done}, n, size)
        done += size
    return rows


def prefill_flops(config: ModelConfig, n_weights: int, tokens: int) -> float:
    """FLOPs of prefill; the formula is in the docstring of this module."""
    embedding = config.vocab_size * config.d_model
    attention = config.n_layers * config.attention.decode_flops(config.n_heads) * tokens**2 / 2
    return 2 * tokens * (n_weights - embedding) + 2 * embedding + attention


@dataclasses.dataclass
class Benchmark:
    """An engine, sizes of its model, and results."""

    engine: Engine
    args: argparse.Namespace
    weight_bytes: int
    n_weights: int
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def rows(self, batch: int, capacity: int) -> Rows:
        """A batch whose cache is full of random values, of which `set_length` selects a prefix."""
        rows = Rows(self.engine, batch, capacity)
        shapes = jax.tree.map(jax.typeof, rows.state.cache)
        rows.state = dataclasses.replace(rows.state, cache=None)  # only one is in memory
        with jax.set_mesh(self.engine.mesh):
            cache = jax.jit(functools.partial(filled, shapes))(jax.random.key(0))
        rows.state = dataclasses.replace(rows.state, cache=cache)
        return rows

    def set_length(self, rows: Rows, length: int) -> None:
        """Sets each row to `length` cached tokens, with more to generate than will be run."""
        engine, state = self.engine, rows.state
        b = rows.batch
        with jax.set_mesh(engine.mesh):
            lengths = engine.put(np.full(b, length, np.int32), "batch")
            left_B = engine.put(np.full(b, 10**6, np.int32))
        rows.state = dataclasses.replace(
            state, left_B=left_B, cache=dataclasses.replace(state.cache, lengths=lengths)
        )

    def steps(self, rows: Rows, context: int) -> float:
        """Time of a run of steps around a context, in seconds."""
        n = self.args.steps
        self.set_length(rows, context - n // 2)
        jax.block_until_ready(rows.state)
        start = time.perf_counter()
        tokens = np.asarray(rows.run(n).id_B)
        seconds = time.perf_counter() - start
        assert (tokens[:n] >= 0).all()
        return seconds

    def measure(self, rows: Rows, context: int) -> None:
        """Measures, prints and records one context of a batch."""
        batch, n = rows.batch, self.args.steps
        self.steps(rows, context)
        times = [self.steps(rows, context) / n for _ in range(self.args.runs)]
        seconds = statistics.median(times)
        cache_bytes = rows.cache_bytes_per_device * context // rows.state.cache.capacity
        ideal = (self.weight_bytes + cache_bytes) / self.args.bandwidth
        result = {
            "batch": batch,
            "context": context,
            "step_ms": 1e3 * seconds,
            "spread_ms": 1e3 * (max(times) - min(times)),
            "ideal_ms": 1e3 * ideal,
            "ratio": seconds / ideal,
            "tokens_per_second": batch / seconds,
            "weight_bytes": self.weight_bytes,
            "cache_bytes": cache_bytes,
        }
        if self.args.profile:
            (program,) = [p for k, p in self.engine.programs.items() if k[:3] == ("run", *rows._key[:2])]
            result["profile"] = profile(lambda: self.steps(rows, context), program.as_text() or "", n)
        self.results.append(result)
        print(line(result), *profile_table(result), sep="\n", flush=True)

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Times prefill of a prompt, after compilation."""
        engine = self.engine
        prompt = np.random.default_rng(0).integers(0, engine.n_vocab, tokens).tolist()

        def once() -> float:
            start = time.perf_counter()
            rows = filled_rows(engine, [prompt], round_up(tokens, LENGTH_UNIT))
            assert np.isfinite(np.asarray(rows.logits_BV)).all()
            return time.perf_counter() - start

        with jax.set_mesh(engine.mesh):
            once()
            times = [once() for _ in range(2)]
            seconds, flops = min(times), prefill_flops(engine.config, self.n_weights, tokens)
            result: dict[str, Any] = {
                "tokens": tokens,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "flops": flops,
                "flops_per_second": flops / seconds,
                "share_of_peak": flops / seconds / self.args.peak,
            }
            if self.args.profile:
                texts = [p.as_text() or "" for k, p in engine.programs.items() if k[0] == "prefill"]
                result["profile"] = profile(once, "\n".join(texts), 1)
        return result


def profile(once: Callable[[], Any], hlo: str, steps: int) -> dict[str, Any]:
    """Device time of one call, by scope and by kernel; empty if the profile shows no GPU."""
    events = trace(once)
    if not events:
        return {}
    scopes = {}
    for name, op in kernel_ops(hlo).items():
        found = [part for part in re.split(r"[/()]", op) if part in SCOPES]
        scopes[name] = found[-1] if found else "other"
    by_scope, by_kernel = collections.Counter[str](), collections.Counter[tuple[str, str]]()
    launches, kernel_launches = collections.Counter[str](), collections.Counter[tuple[str, str]]()
    for start, end, name in events:
        scope = scopes.get(name, "other")
        kernel = scope, re.sub(r"(_\d+)+$", "", name)[:60]
        by_scope[scope] += (end - start) / 1e3 / steps
        by_kernel[kernel] += (end - start) / 1e3 / steps
        launches[scope] += 1
        kernel_launches[kernel] += 1
    span = (max(end for _, end, _ in events) - events[0][0]) / 1e3 / steps
    return {
        "span_us": span,
        "busy_us": sum(by_scope.values()),
        "kernels": len(events) / steps,
        "parts": [(k, us, launches[k] / steps) for k, us in by_scope.most_common()],
        "top": [(*k, us, kernel_launches[k] / steps) for k, us in by_kernel.most_common(24)],
    }


HEAD = head(("batch", "context", "step, ms", "spread", "ideal, ms", "ratio", "tokens/s"), "r")


def line(r: dict[str, Any]) -> str:
    """A line of the table of steps."""
    times = (f"{r[name]:.3f}" for name in ("step_ms", "spread_ms", "ideal_ms"))
    return row(
        (r["batch"], f"{r['context']:,}", *times, f"{r['ratio']:.2f}", f"{r['tokens_per_second']:,.0f}")
    )


def profile_table(r: dict[str, Any]) -> list[str]:
    """Lines of Markdown: device time by scope and by kernel; none without a profile."""
    if not (p := r.get("profile")):
        return []
    parts = [(name, f"{us:,.1f}", f"{n:.0f}") for name, us, n in p["parts"]]
    top = [(part, f"`{name}`", f"{us:,.1f}", f"{n:.0f}") for part, name, us, n in p["top"]]
    return [
        "",
        f"{p['kernels']:.0f} kernels, busy {p['busy_us']:,.0f} us of {p['span_us']:,.0f} us.",
        "",
        *table(("part", "us", "kernels"), parts, "lr"),
        "",
        *table(("part", "kernel", "us", "kernels"), top, "llr"),
        "",
    ]


def prefill_lines(r: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    return [
        f"Prefill of {r['tokens']:,} tokens: {r['seconds']:.3f} s, {r['tokens_per_second']:,.0f} tokens/s, "
        f"{r['flops']:.3g} FLOPs, {r['flops_per_second'] / 1e12:.0f} TFLOP/s, {r['share_of_peak']:.1%} of peak.",
        *profile_table(r),
    ]


def main() -> int:
    """Runs the benchmark."""
    parser = records.parser("benchmarks.decode_step", __doc__, out=False)
    parser.add_argument("--config", default="mlra_4", help="name or path of a configuration")
    parser.add_argument("--cases", nargs="*", type=records.case, default=[parse_size(c) for c in CASES])
    parser.add_argument("--steps", type=int, default=32, help=f"steps per run, at most {STEPS_PER_RUN}")
    parser.add_argument("--runs", type=int, default=5, help="timed runs")
    parser.add_argument("--layers", type=int, help="number of layers, instead of the configuration's")
    parser.add_argument(
        "--prefill", type=int, default=32768, help="tokens of the prompt for prefill; 0: skip prefill"
    )
    parser.add_argument("--profile", action="store_true", help="also measure device time by kernel")
    parser.add_argument(
        "--bandwidth", type=float, default=2.88e12, help="bytes per second, for the ideal time"
    )
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s, for the share of peak")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no further measurement after this time"
    )
    parser.add_argument("--option", nargs="*", default=[], metavar="NAME=VALUE", help="XLA compiler option")
    parser.add_argument(
        "--products",
        nargs="*",
        default=[],
        choices=SKINNY_GEMM,
        help="back ends of skinny GEMM, in the order in which they are tried; default: the first that takes the call",
    )
    parser.add_argument("--out", type=pathlib.Path, help="write OUT.md and OUT.json")
    args = parser.parse_args()
    if not 1 <= args.steps <= STEPS_PER_RUN:
        parser.error(f"--steps must be from 1 to {STEPS_PER_RUN}; got {args.steps}.")

    begin = time.perf_counter()
    clock = lambda: f"[{time.perf_counter() - begin:.0f} s]"
    config = load_config(args.config).model
    config = dataclasses.replace(
        config, param_dtype=config.compute_dtype, n_layers=args.layers or config.n_layers
    )
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        engine = Engine(random_model(config), mesh, config.vocab_size)
        engine.compiler_options |= dict(parse_option(option) for option in args.option)
    jax.block_until_ready(engine.leaves)
    weight_bytes = sum(x.nbytes for x in engine.leaves)
    benchmark = Benchmark(engine, args, weight_bytes, sum(x.size for x in engine.leaves))
    setting = Setting.here("benchmarks.decode_step", sys.argv[1:])
    about = [
        f"{setting.device}, {setting.date}, {records.versions(vars(setting))}",
        f"`{setting.command}`",
        f"{args.config}, {config.n_layers} layers, weights of {weight_bytes / 1e9:.2f} GB ({config.param_dtype}); "
        f"ideal at {args.bandwidth / 1e12:.2f} TB/s; {args.runs} runs of {args.steps} steps each, median.",
    ]
    print(*about, clock(), "", *HEAD, sep="\n", flush=True)

    refused: list[str] = []
    prefill: dict[str, Any] = {}

    def save() -> None:
        if not args.out:
            return
        content = {"about": about, "steps": benchmark.results, "prefill": prefill, "refused": refused}
        lines = ["# Decode steps and prefill", "", *(line + "\n" for line in about), *HEAD]
        lines += [line(r) for r in benchmark.results] + ["", *refused, ""]
        lines += prefill_lines(prefill) if prefill else []
        for r in benchmark.results:
            if profiled := profile_table(r):
                lines += ["", f"## Batch {r['batch']}, {r['context']:,} tokens", *profiled]
        records.write(args.out, content, lines)

    batches: dict[int, list[int]] = {}
    for batch, context in args.cases:
        batches.setdefault(batch, []).append(context)
    names = tuple(dict.fromkeys((*args.products, "reference")))
    with choose(skinny_gemm=names, swiglu=names) if args.products else contextlib.nullcontext():
        for batch, contexts in batches.items():
            fitting = []
            for context in sorted(contexts):
                try:
                    engine.check_memory(batch, context + LENGTH_UNIT)
                    fitting.append(context)
                except ConfigError as e:
                    refused.append(f"Refused: {e}")
                    print(refused[-1], flush=True)
            if not fitting or time.perf_counter() - begin > args.seconds:
                continue
            before = engine.compile_seconds
            rows = benchmark.rows(batch, round_up(max(fitting), LENGTH_UNIT) + LENGTH_UNIT)
            for context in fitting:
                if time.perf_counter() - begin < args.seconds:
                    benchmark.measure(rows, context)
                    save()
            print(f"batch {batch}: compiled in {engine.compile_seconds - before:.0f} s {clock()}", flush=True)
            del rows
            gc.collect()  # the next batch needs its memory
        if args.prefill and time.perf_counter() - begin < args.seconds:
            prefill = benchmark.prefill(args.prefill)
            print(*prefill_lines(prefill), clock(), sep="\n", flush=True)
            save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
