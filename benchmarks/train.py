"""Tokens per second and MFU of the train step on the GPUs at hand, and a breakdown of its time.

    python -m benchmarks.train                                # mlra_4, mla and gqa
    python -m benchmarks.train --configs mlra_4 --micro-batch 2 --remat mlp
    python -m benchmarks.train --configs mlra_4 --fsdp 2      # or --tensor 2: on two GPUs
    python -m benchmarks.train --configs long --seq-len 131072 --context 2 --accumulation 1

The model is the configuration's, in full, with random weights and random tokens; micro-batch and rematerialisation are
what training would choose, if they are not given. A step has `--accumulation` micro-batches, fewer than the paper's:
the optimizer, which runs once a step, costs more of it than in a real run. Steps are timed on the host's clock from
call to result, after two that are not. One more is traced, and its device time shown by what the kernels do.

Tokens/s are those of one device: of all, divided by their number. The profile is that of the first device.

MFU = tokens/s x (6 x parameters + causal attention, forward and backward, per token) / peak FLOP/s; what is recomputed
does not count (`mlra_jax.execution.flops`).
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import json
import os
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # as train.py

import jax
import numpy as np
from jax.sharding import NamedSharding

from benchmarks import records
from benchmarks.measure import kernel_ops, trace
from benchmarks.records import Setting
from mlra_jax.cli.configs import load_config
from mlra_jax.config import ConfigError, MeshConfig, TrainConfig
from mlra_jax.execution.accelerators import GIB, device_memory, find_accelerator
from mlra_jax.execution.flops import train_flops_per_token
from mlra_jax.execution.planner import resolve
from mlra_jax.markdown import table
from mlra_jax.ops.tuning import slug
from mlra_jax.sharding import TRAIN_RULES, make_mesh
from mlra_jax.training.step import init_state, make_train_step

ATTENTION_WIDTH = 3.0
"""Model FLOPs of attention, forward and backward, over those of the forward pass."""
PARTS = (
    "attention forward",
    "attention backward",
    "products",
    "gradient sums",
    "elementwise",
    "optimizer",
    "exchanges",
)


def part_of(kernel: str, op: str) -> str:
    """Classifies a kernel by its name and that of its operation (empty: unknown)."""
    if "nccl" in kernel.lower():
        return "exchanges"  # may overlap with others
    if re.match(r"attention(_mosaic|$)", kernel):
        return "attention forward"
    if re.match(r"attention_d[qk]", kernel):
        return "attention backward"
    if "cudnn" in kernel or "fmha" in kernel:
        return "attention backward" if "bprop" in kernel else "attention forward"
    if re.search(r"gemm|nvjet|cublas|cutlass|xmma|splitK|wgrad|dgrad", kernel):
        return "products"
    if op and "while" not in op:
        return "optimizer"  # and anything else that runs once a step
    # Sums that matmuls do not accumulate themselves.
    if re.search(r"while/body/([^/]*/)?(transpose\(jvp\([^/]*/)?(checkpoint/)?add$", op):
        return "gradient sums"
    return "elementwise"


def split_time(events: Sequence[tuple[float, float, str]], hlo: str) -> dict[str, Any]:
    """Device time of a step in us, by part and by kernel; empty if the profile shows no GPU."""
    if not events:
        return {}
    ops = kernel_ops(hlo)
    parts, kernels = collections.Counter[str](), collections.Counter[tuple[str, str]]()
    launches = collections.Counter[tuple[str, str]]()
    for start, end, name in events:
        op = ops.get(name, "")
        part = part_of(name, op)
        kernel = part, re.sub(r"(_\d+)+$", "", name)[:48] + " " + "/".join(op.split("/")[-2:])[-48:]
        parts[part] += (end - start) / 1e3
        kernels[kernel] += (end - start) / 1e3
        launches[kernel] += 1
    span = (max(end for _, end, _ in events) - events[0][0]) / 1e3
    return {
        "span_us": span,
        "parts": {part: parts[part] for part in PARTS},
        "kernels": [(*k, us, launches[k]) for k, us in kernels.most_common(40)],
    }


def measure(name: str, args: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """Measures a configuration."""
    config: TrainConfig = load_config(name)
    model = config.model
    if args.layers:
        model = dataclasses.replace(model, n_layers=args.layers)
    asked = {"remat": args.remat, "gather": args.gather, "deterministic": args.deterministic}
    execution = dataclasses.replace(config.execution, **{k: v for k, v in asked.items() if v})
    mesh = make_mesh(MeshConfig(fsdp=args.fsdp, tensor=args.tensor, context=args.context))
    n_data = mesh.size // (args.tensor * args.context)
    # The global batch follows from the micro-batch; to choose one, the planner needs a batch that all sizes divide.
    length = args.seq_len or config.data.seq_len
    data = dataclasses.replace(config.data, micro_batch=args.micro_batch, seq_len=length)
    config = dataclasses.replace(config, model=model, execution=execution, data=data)
    with jax.set_mesh(mesh):
        capacity = device_memory(jax.devices()[0])
        plan = resolve(config, mesh, capacity)[1]
        # The same once more with the batch that is run: with a single micro-batch nothing is gathered once a step.
        sequences = plan.micro_batch * args.accumulation * n_data
        data = dataclasses.replace(data, micro_batch=plan.micro_batch, global_batch=sequences)
        execution = dataclasses.replace(execution, remat=plan.remat)
        config = dataclasses.replace(config, execution=execution, data=data)
        config, plan = resolve(config, mesh, capacity)
        print(f"{name}: {plan}", flush=True)
        state = init_state(config)
        n_params = sum(x.size for x in jax.tree.leaves(state.params))
        rng = np.random.default_rng(0)
        shape = (args.accumulation, plan.micro_batch * n_data, config.data.seq_len)
        laid_out = NamedSharding(mesh, TRAIN_RULES.spec(None, "batch", "length"))
        ids = lambda: jax.device_put(rng.integers(0, model.vocab_size, shape, dtype=np.int32), laid_out)
        batch = {"inputs": ids(), "targets": ids()}
        begin = time.perf_counter()
        step = make_train_step(config).lower(state, batch).compile()
        compile_s = time.perf_counter() - begin
        memory = step.memory_analysis()

        def once() -> None:
            nonlocal state
            state, metrics = step(state, batch)
            assert np.isfinite(jax.device_get(metrics["loss"]))

        for _ in range(2):
            once()
        times = []
        for _ in range(args.steps):
            begin = time.perf_counter()
            once()
            times.append(time.perf_counter() - begin)
        traced = split_time(trace(once), step.as_text() or "") if args.profile else {}
    chip = find_accelerator(jax.devices()[0].device_kind)
    seconds, tokens = statistics.median(times), sequences * config.data.seq_len / mesh.size
    flops = train_flops_per_token(config.model, n_params, config.data.seq_len)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "config": name,
        "setting": dataclasses.asdict(setting),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "layers": config.model.n_layers,
        "seq_len": config.data.seq_len,
        "parameters": n_params,
        "micro_batch": plan.micro_batch,
        "accumulation": args.accumulation,
        "remat": plan.remat,
        "gather": plan.gather,
        "compile_s": compile_s,
        "step_s": seconds,
        "spread_s": max(times) - min(times),
        "tokens_per_second": tokens / seconds,
        "flops_per_token": flops,
        "attention_flops_per_token": flops - 6 * n_params,
        "mfu": tokens / seconds * flops / chip.flops if chip else None,
        "tokens": tokens,
        "estimated_bytes": plan.total,
        "compiled_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else None,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "profile": traced,
    }


def results_table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    gib = lambda n: "" if n is None else f"{n / GIB:.1f}"
    rows = [
        (
            r["config"],
            on_mesh(r),
            f"{length_of(r):,}",
            f"{r['micro_batch']} x {r['accumulation']}",
            r["remat"],
            r["gather"] if "fsdp" in r["mesh"] else "",
            f"{r['tokens_per_second']:,.0f}",
            "" if r["mfu"] is None else f"{r['mfu']:.1%}",
            f"{r['step_s']:.3f}",
            f"{r['spread_s']:.3f}",
            f"{gib(r['estimated_bytes'])}, {gib(r['compiled_bytes'])}",
        )
        for r in results
    ]
    names = (
        "configuration",
        "mesh",
        "sequences",
        "micro-batch",
        "remat",
        "gather",
        "tokens/s",
        "MFU",
        "step, s",
        "spread",
    )
    return table((*names, "memory: planned, compiled, GiB"), rows, "llrrllr")


def on_mesh(r: Mapping[str, Any]) -> str:
    """The mesh axes of a result that are larger than 1."""
    return " x ".join(f"{axis} {size}" for axis, size in r["mesh"].items())


def length_of(r: Mapping[str, Any]) -> int:
    """The length of a result's sequences, which earlier versions left out."""
    return r.get("seq_len", 2048)


def title(r: Mapping[str, Any]) -> str:
    """Describes what was measured."""
    on = f" on {on_mesh(r)}" if r["mesh"] else ""
    gather = f", gathered each {r['gather']}" if "fsdp" in r["mesh"] else ""
    return f"{r['config']}{on}, {length_of(r):,} tokens, {r['micro_batch']} x {r['accumulation']} {r['remat']}{gather}"


def budget(r: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown: the time of each part, and its time at the device's peak; none without a profile."""
    if not (p := r["profile"]):
        return []
    chip = find_accelerator(r["setting"]["device"])
    flops = {
        "attention forward": r["attention_flops_per_token"] / ATTENTION_WIDTH * r["tokens"],
        "attention backward": r["attention_flops_per_token"] * (1 - 1 / ATTENTION_WIDTH) * r["tokens"],
        "products": 6 * r["parameters"] * r["tokens"],
    }
    # Read: parameter, gradient, two moments; written: parameter, two moments; all float32.
    parts_of_state = r["mesh"].get("fsdp", 1) * r["mesh"].get("tensor", 1)
    bytes_moved = {"optimizer": 28 * r["parameters"] / parts_of_state}
    limits = {}
    if chip:
        limits |= {k: (f"{n / 1e12:,.1f} TFLOP", f"{1e3 * n / chip.flops:,.1f}") for k, n in flops.items()}
        limits |= {
            k: (f"{n / 1e9:,.1f} GB", f"{1e3 * n / chip.bandwidth:,.1f}") for k, n in bytes_moved.items()
        }
    ms = lambda us: (f"{us / 1e3:,.1f}", f"{us / p['span_us']:.1%}")
    rows = [
        (part, *ms(us), f"{us / r['tokens']:.2f}", *limits.get(part, ("", "")))
        for part, us in p["parts"].items()
    ]
    idle = p["span_us"] - sum(p["parts"].values())
    rows.append(("idle (negative: overlap)", *ms(idle), "", "", ""))
    kernels = [(part, f"`{kernel}`", f"{us / 1e3:,.1f}", n) for part, kernel, us, n in p["kernels"]]
    return [
        "",
        f"{title(r)}: one step of {r['tokens']:,.0f} tokens a device, device time {p['span_us'] / 1e3:,.1f} ms:",
        "",
        *table(("part", "ms", "share", "us/token", "model FLOPs or least bytes", "at peak, ms"), rows, "lr"),
        "",
        *table(("part", "kernel, operation", "ms", "launches"), kernels, "llr"),
    ]


KEY = "config", "layers", "mesh", "micro_batch", "accumulation", "remat", "gather"
"""The fields that, with the length of its sequences, identify a result."""


def merged(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All results; a repeated measurement replaces the old one in place."""
    key = lambda r: json.dumps([length_of(r), *(r.get(name) for name in KEY)])
    return list({key(r): r for r in (*old, *new)}.values())


def stored(path: pathlib.Path) -> list[Mapping[str, Any]]:
    """The results in a file; none if it does not exist.

    Raises:
      ConfigError: it is something else.
    """
    if not path.exists():
        return []
    try:
        results = json.loads(path.read_text())["results"]
        if all("setting" in r for r in results):
            return results
    except (ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{path} holds no results of this command; move it, or give another --out.")


def write(out: pathlib.Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Writes `out`.md and `out`.json, keeping the results already in them."""
    results = merged(stored(out.with_suffix(".json")), results)
    lines = [
        f"# Training on {results[0]['setting']['device']}",
        "",
        *results_table(results),
        "",
        "Measured by",
    ]
    for r in results:
        s = r["setting"]
        lines += ["", f"- {title(r)}: `{s['command']}`, {s['date']}, {records.versions(s)}"]
    for r in results:
        lines += budget(r)
    records.write(out, {"results": results}, lines)


def main() -> int:
    """Runs the benchmark."""
    parser = records.parser("benchmarks.train", __doc__)
    parser.add_argument(
        "--configs", nargs="+", default=["mlra_4", "mla", "gqa"], help="names or paths of configurations"
    )
    parser.add_argument("--micro-batch", type=int, default=0, help="sequences per micro-batch; 0: what fits")
    parser.add_argument("--accumulation", type=int, default=8, help="micro-batches per step")
    parser.add_argument("--remat", help="see ExecutionConfig.remat; default: the planner's choice")
    parser.add_argument(
        "--fsdp", type=int, default=1, help="size of this mesh axis; further devices are data"
    )
    parser.add_argument("--tensor", type=int, default=1, help="size of this mesh axis")
    parser.add_argument("--context", type=int, default=1, help="size of this mesh axis")
    parser.add_argument("--seq-len", type=int, default=0, help="tokens of a sequence; 0: the configuration's")
    parser.add_argument("--gather", help="see ExecutionConfig.gather; default: the planner's choice")
    parser.add_argument("--deterministic", choices=("yes", "no"), help="see ExecutionConfig.deterministic")
    parser.add_argument("--layers", type=int, help="number of layers, instead of the configuration's")
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument(
        "--no-profile", dest="profile", action="store_false", help="skip the breakdown of the time"
    )
    args = parser.parse_args()

    setting = Setting.here("benchmarks.train", sys.argv[1:])
    out = args.out / f"train_{slug(setting.device)}"
    results: list[dict[str, Any]] = []
    try:
        stored(out.with_suffix(".json"))
    except ConfigError as e:
        parser.error(str(e))
    for name in args.configs:
        try:
            results.append(measure(name, args, setting))
        except ConfigError as e:
            print(f"{name}: {e}", file=sys.stderr)
            return 1
        print("\n".join([*results_table(results[-1:]), *budget(results[-1])]), flush=True)
        write(out, results)  # what is measured is kept, whatever becomes of the next
        jax.clear_caches()
        gc.collect()
    print(f"Written to {out}.md and .json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
