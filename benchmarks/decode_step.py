"""Time of a decode step and of prefill, against reading the weights and the cache once from memory.

    python -m benchmarks.decode_step --profile --out benchmarks/results/decode_step_h100

The model has random weights in the decode layout, made on the device; the cache holds random values. A batch is
measured in one compiled loop of steps (`mlra_jax.generation.engine.run`), as `decode.py` generates, on the host's clock
from the call to the last token. With --profile, one run more is traced, and its device time is shown by what the
kernels do; XLA launches them one by one then and not as CUDA graphs, so that gaps between them are longer. Contexts of
a batch share one cache, as long as the longest that fits, so that each batch is compiled once.

Ideal: (bytes of the weights + bytes of what the cache holds) / bandwidth. The embedding counts once: its rows are the
logits' weights. FLOPs of prefill, of T tokens: 2 T (parameters without the embedding) + 2 V D, and for attention in the
absorbed form T^2 / 2 pairs of query and key x N J heads and branches x 2 (2 C + R) (grouped: x N x 4 H), per layer.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import json
import math
import os
import pathlib
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

# The largest cases take nearly all memory of an 80 GB card; JAX would keep a quarter of it free.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.profiler import ProfileData

from benchmarks.measure import gpu_events
from mlra_jax.attention.kv_cache import Cache
from mlra_jax.cli.configs import load_config
from mlra_jax.config import ConfigError, MeshConfig, ModelConfig
from mlra_jax.generation.engine import LENGTH_UNIT, STEPS_PER_RUN, Engine, Rows, State, round_up
from mlra_jax.generation.sampling import GREEDY
from mlra_jax.model import Transformer
from mlra_jax.ops.dispatch import choose
from mlra_jax.ops.skinny_gemm.api import SKINNY_GEMM
from mlra_jax.sharding import AxisRules, decode_rules, make_mesh

CASES = ("1x1K", "1x32K", "1x128K", "8x1K", "8x32K", "8x128K", "64x1K", "64x32K", "64x128K")
SCOPES = (
    "embed", "norm", "latents", "queries", "absorb", "append", "attend", "values", "output", "mlp", "logits", "sample",
)  # fmt: skip
"""Parts of a step, as the model names them."""


def parse_case(text: str) -> tuple[int, int]:
    """`8x32K` as batch and context."""
    if not (match := re.fullmatch(r"(\d+)x(\d+)(K?)", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a batch and a context such as 8x32K.")
    return int(match[1]), int(match[2]) * (1024 if match[3] else 1)


def parse_option(text: str) -> tuple[str, str | bool | int]:
    """`NAME=VALUE` with the value in the type that XLA wants."""
    name, _, value = text.partition("=")
    if value in ("true", "false"):
        return name, value == "true"
    return name, int(value) if re.fullmatch(r"-?\d+", value) else value


@functools.partial(jax.jit, static_argnames=("x", "mean"))
def _random(key: jax.Array, x: jax.ShapeDtypeStruct, mean: float) -> jax.Array:
    values = mean + 0.02 * jax.random.normal(key, x.shape, x.dtype)
    return jax.sharding.reshard(values, x.sharding.spec)


def describe(make: Callable[[], Any]) -> Any:
    """What `make` makes on the current mesh, without values; gains are float32, as `load_model` has them."""

    def leaf(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = jnp.float32 if "gain" in jax.tree_util.keystr(path) else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return jax.tree_util.tree_map_with_path(leaf, nnx.eval_shape(make))


def random_values(described: Any, key: jax.Array) -> Any:
    """Random parameters for what is only described, laid out over the current mesh; gains are about 1."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(described)
    gain = lambda path: float("gain" in jax.tree_util.keystr(path))
    values = [_random(jax.random.fold_in(key, i), x, gain(path)) for i, (path, x) in enumerate(leaves)]
    return jax.tree.unflatten(treedef, values)


def random_model(config: ModelConfig, rules: AxisRules | None = None) -> Transformer:
    """A model in the decode layout on the current mesh, as `load_model` would leave it, of random weights."""
    rules = rules or decode_rules()
    make = lambda: Transformer(config, rngs=nnx.Rngs(0), rules=rules, layout="decode")
    return random_values(describe(make), jax.random.key(0))


def filled(cache: Cache, key: jax.Array) -> Cache:
    """A cache of these shapes with random values, the same ones again every `LENGTH_UNIT` tokens, and no lengths.

    Inside a compiled function the key must be an argument, or the compiler would work out the values.
    """

    def fill(i: int, x: jax.ShapeDtypeStruct) -> jax.Array:
        *lead, length, width = x.shape
        block = jax.random.normal(jax.random.fold_in(key, i), (*lead, 1, LENGTH_UNIT, width), x.dtype)
        tiles = jnp.broadcast_to(block, (*lead, length // LENGTH_UNIT, LENGTH_UNIT, width))
        return jax.sharding.reshard(tiles.reshape(x.shape), x.sharding.spec)

    layers, treedef = jax.tree.flatten(cache.layers)
    values = [fill(i % 2, x) for i, x in enumerate(layers)]
    return Cache(jax.tree.unflatten(treedef, values), jnp.zeros(cache.lengths.shape, jnp.int32))


def prefill_flops(config: ModelConfig, n_weights: int, tokens: int) -> float:
    """See the head of this file."""
    embedding = config.vocab_size * config.d_model
    attention = config.n_layers * config.attention.decode_flops(config.n_heads) * tokens**2 / 2
    return 2 * tokens * (n_weights - embedding) + 2 * embedding + attention


@dataclasses.dataclass
class Benchmark:
    """An engine with what is known of its model."""

    engine: Engine
    args: argparse.Namespace
    weight_bytes: int
    n_weights: int
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def rows(self, batch: int, capacity: int) -> Rows:
        """A batch whose cache is full of random values; `set_length` says how much of it counts."""
        engine = self.engine
        with jax.set_mesh(engine.mesh):
            create = functools.partial(Cache.create, engine.config, engine.rules, batch, capacity)
            cache = jax.jit(functools.partial(filled, jax.eval_shape(create)))(jax.random.key(0))
            zeros = lambda: engine.put(np.zeros(batch, np.int32))
            scalars = engine.put(np.uint32(0)), engine.put(np.int32(-1))
            state = State(cache, zeros(), zeros(), zeros(), *scalars)
        return Rows(engine, state, zeros(), GREEDY, capacity)

    def set_length(self, rows: Rows, length: int) -> None:
        """Makes each row hold so many tokens, and want more than will be asked for."""
        engine, state = self.engine, rows.state
        b = len(rows.first_B)
        with jax.set_mesh(engine.mesh):
            lengths = engine.put(np.full(b, length, np.int32), "batch")
            left_B = engine.put(np.full(b, 10**6, np.int32))
        rows.state = dataclasses.replace(
            state, left_B=left_B, cache=dataclasses.replace(state.cache, lengths=lengths)
        )

    def steps(self, rows: Rows, context: int) -> float:
        """Seconds of a run of steps around a context."""
        n = self.args.steps
        self.set_length(rows, context - n // 2)
        jax.block_until_ready(rows.state)
        start = time.perf_counter()
        tokens = np.asarray(rows.run(n))
        seconds = time.perf_counter() - start
        assert (tokens[:n] >= 0).all()
        return seconds

    def measure(self, rows: Rows, context: int) -> None:
        """Measures one context of a batch, prints it and keeps it."""
        batch, n = len(rows.first_B), self.args.steps
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
        print(row(result), flush=True)
        for line in profile_table(result):
            print(line, flush=True)

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Time to fill the cache with a prompt of so many tokens, compiled before."""
        engine = self.engine
        prompt = np.random.default_rng(0).integers(0, engine.n_vocab, tokens).tolist()

        def once() -> float:
            start = time.perf_counter()
            _, logits_BV = engine._fill([prompt], 1, round_up(tokens, LENGTH_UNIT))
            assert np.isfinite(np.asarray(logits_BV)).all()
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
    """Device time of one call by part of the step and by kernel; empty where the profile shows no GPU."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            once()
        [file] = pathlib.Path(folder).rglob("*.xplane.pb")
        events = gpu_events(ProfileData.from_file(str(file)))
    if not events:
        return {}
    # XLA names a kernel after its instruction; the instruction's metadata say which part of the model it is of.
    scopes = {}
    for name, op in re.findall(r"%([\w.-]+) = .*?op_name=\"([^\"]*)\"", hlo):
        found = [part for part in re.split(r"[/()]", op) if part in SCOPES]
        scopes[re.sub(r"\W", "_", name)] = found[-1] if found else "other"
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


HEAD = [
    "| batch | context | step, ms | spread | ideal, ms | ratio | tokens/s |",
    "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
]


def row(r: dict[str, Any]) -> str:
    """A line of the table of steps."""
    return (
        f"| {r['batch']} | {r['context']:,} | {r['step_ms']:.3f} | {r['spread_ms']:.3f} | {r['ideal_ms']:.3f} | "
        f"{r['ratio']:.2f} | {r['tokens_per_second']:,.0f} |"
    )


def profile_table(r: dict[str, Any]) -> list[str]:
    """Lines of Markdown: device time by part and by kernel; none without a profile."""
    if not (p := r.get("profile")):
        return []
    lines = [
        "",
        f"{p['kernels']:.0f} kernels, busy {p['busy_us']:,.0f} us of {p['span_us']:,.0f} us.",
        "",
        "| part | us | kernels |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {us:,.1f} | {n:.0f} |" for name, us, n in p["parts"]),
        "",
        "| part | kernel | us | kernels |",
        "| --- | --- | ---: | ---: |",
        *(f"| {part} | `{name}` | {us:,.1f} | {n:.0f} |" for part, name, us, n in p["top"]),
        "",
    ]
    return lines


def prefill_lines(r: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    return [
        f"Prefill of {r['tokens']:,} tokens: {r['seconds']:.3f} s, {r['tokens_per_second']:,.0f} tokens/s, "
        f"{r['flops']:.3g} FLOPs, {r['flops_per_second'] / 1e12:.0f} TFLOP/s, {r['share_of_peak']:.1%} of peak.",
        *profile_table(r),
    ]


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="mlra_4", help="name or path of a configuration")
    parser.add_argument("--cases", nargs="*", type=parse_case, default=[parse_case(c) for c in CASES])
    parser.add_argument("--steps", type=int, default=32, help=f"of a run, at most {STEPS_PER_RUN}")
    parser.add_argument("--runs", type=int, default=5, help="timed")
    parser.add_argument("--layers", type=int, help="of the model, instead of the configuration's")
    parser.add_argument("--prefill", type=int, default=32768, help="tokens of the prompt; 0: none")
    parser.add_argument("--profile", action="store_true", help="device time by kernel as well")
    parser.add_argument("--bandwidth", type=float, default=2.88e12, help="bytes a second, of the ideal")
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s, of the ideal")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no other measurement after so long"
    )
    parser.add_argument("--option", nargs="*", default=[], metavar="NAME=VALUE", help="of XLA's compiler")
    parser.add_argument(
        "--products",
        nargs="*",
        default=[],
        choices=SKINNY_GEMM,
        help="back ends of skinny GEMM, in the order in which they are tried; default: the first that takes the call",
    )
    parser.add_argument("--out", type=pathlib.Path, help="writes OUT.md and OUT.json")
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
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    command = "python -m benchmarks.decode_step " + " ".join(sys.argv[1:])
    about = [
        f"{jax.devices()[0].device_kind}, {today}, " + ", ".join(f"{k} {v}" for k, v in versions.items()),
        f"`{command}`",
        f"{args.config}, {config.n_layers} layers, weights of {weight_bytes / 1e9:.2f} GB ({config.param_dtype}); "
        f"ideal at {args.bandwidth / 1e12:.2f} TB/s; {args.runs} runs of {args.steps} steps each, median.",
    ]
    print(*about, clock(), "", *HEAD, sep="\n", flush=True)

    refused: list[str] = []
    prefill: dict[str, Any] = {}

    def save() -> None:
        if not args.out:
            return
        args.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"about": about, "steps": benchmark.results, "prefill": prefill, "refused": refused}
        args.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        lines = ["# Decode steps and prefill", "", *(line + "\n" for line in about), *HEAD]
        lines += [row(r) for r in benchmark.results] + ["", *refused, ""]
        lines += prefill_lines(prefill) if prefill else []
        for r in benchmark.results:
            if table := profile_table(r):
                lines += ["", f"## Batch {r['batch']}, {r['context']:,} tokens", *table]
        args.out.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")

    batches: dict[int, list[int]] = {}
    for batch, context in args.cases:
        batches.setdefault(batch, []).append(context)
    names = tuple(dict.fromkeys((*args.products, "reference")))
    with choose(skinny_gemm=names, swiglu=names) if args.products else contextlib.nullcontext():
        for batch, contexts in batches.items():
            fitting = []
            for context in sorted(contexts):
                try:
                    engine.check_memory(batch, 1, context + LENGTH_UNIT)
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
