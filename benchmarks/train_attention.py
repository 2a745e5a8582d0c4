"""Attention over whole sequences on the current GPU, forward and backward, by back end.

    python -m benchmarks.train_attention                                  # 3 sequences of 2048 of the 2.9 B models
    python -m benchmarks.train_attention --cases mlra_4 --implementations mosaic_gpu cudnn --batch 1 --tokens 8192
    python -m benchmarks.train_attention --cases mlra_4 --cuts row_groups=2,block=128,stages=3 dk_shares=2

Prints the device time of one layer's attention from a profile, the median of several runs, and the TFLOP/s of the FLOPs
that are necessary: those of the causal triangle, with the backward pass counted as 2.5 forward passes, as is usual,
whatever a kernel computes. For back ends that take joined queries and keys, joining them is part of the time. `--cuts`
also times the kernels for Hopper with some fields of their `mosaic_gpu.Config` changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import records
from benchmarks.measure import measure
from mlra_jax.ops.attention import causal_attention_parts
from mlra_jax.ops.attention.api import IMPLEMENTATIONS
from mlra_jax.ops.attention.mosaic_gpu import Config, MosaicGPU
from mlra_jax.ops.attention.mosaic_gpu.config import Shape

CASES: dict[str, tuple[int, int, Sequence[tuple[int, int, int]], int | None]] = {
    "mlra_4": (4, 24, ((128, 4, 4), (64, 1, 1)), None),
    "mlra_2": (4, 12, ((128, 4, 4), (64, 2, 1)), None),
    "mla": (24, 1, ((128, 24, 24), (64, 24, 1)), 128),
    "gqa": (6, 4, ((128, 6, 6),), 128),
    "mha": (24, 1, ((128, 24, 24),), 128),
    "tiny": (2, 2, ((32, 2, 2), (32, 1, 1)), None),
}
"""KV heads L, query heads of each M, parts of the key (width, heads of the queries, heads of the keys), width of the
values; None: they are the first part of the key. MLA as it trains, in the expanded form. `tiny` is for a CPU."""


def make(case: str, batch: int, tokens: int) -> tuple[Any, jax.Array | None, jax.Array]:
    """Random parts, values and gradient of the output."""
    heads, m, parts, v_width = CASES[case]
    keys = iter(jax.random.split(jax.random.key(0), 8))
    new = lambda *shape: jax.random.normal(next(keys), (batch, tokens, *shape), jnp.bfloat16)
    pairs = [(new(q_heads, m, w), new(k_heads, w)) for w, q_heads, k_heads in parts]
    values = None if v_width is None else new(heads, v_width)
    return pairs, values, new(heads, m, v_width or parts[0][0])


def forward_flops(case: str, batch: int, tokens: int) -> float:
    """FLOPs of one layer's attention."""
    heads, m, parts, v_width = CASES[case]
    widths = sum(w for w, *_ in parts) + (v_width or parts[0][0])
    return batch * heads * m * 2 * widths * tokens * (tokens + 1) / 2


def parse_cut(text: str) -> dict[str, int]:
    """Fields of a `mosaic_gpu.Config` in the form "block=128,stages=3"."""
    fields = [field.name for field in dataclasses.fields(Config)]
    changes = dict(re.findall(r"(\w+)=(\d+)", text))
    if not changes.keys() <= {*fields} or ",".join(f"{k}={v}" for k, v in changes.items()) != text:
        raise argparse.ArgumentTypeError(f"{text!r} is not like block=128,stages=3, of {', '.join(fields)}")
    return {name: int(value) for name, value in changes.items()}


def run(case: str, name: str, args: argparse.Namespace, cut: Mapping[str, int] | None = None) -> str:
    """A line of the table."""
    title = ",".join(f"{k}={n}" for k, n in cut.items()) if cut else name
    parts, v, d_out = make(case, args.batch, args.tokens)
    attend = functools.partial(causal_attention_parts, scale=0.07, implementation=name)

    def both(parts: Any, v: Any, d_out: jax.Array) -> Any:
        out, pullback = jax.vjp(attend, parts, v)
        return out, pullback(d_out)

    try:
        if cut:
            heuristic = MosaicGPU().heuristic(Shape.of(parts, v))
            kernels = MosaicGPU(config=dataclasses.replace(heuristic, **cut))
            attend = functools.partial(causal_attention_parts, scale=0.07, implementation=kernels)
        forward = measure(jax.jit(attend).lower(parts, v).compile(), (parts, v), calls=1, runs=args.runs)
        whole = measure(
            jax.jit(both).lower(parts, v, d_out).compile(), (parts, v, d_out), calls=1, runs=args.runs
        )
    except NotImplementedError as e:
        return f"| {case} | {title} | {e} | | | | |"
    flops = forward_flops(case, args.batch, args.tokens)
    kernels = sorted(whole.kernels.items(), key=lambda kernel: -kernel[1])[:4]
    shown = ", ".join(f"{kernel[:32]} {us:.0f}" for kernel, us in kernels)
    return (
        f"| {case} | {title} | {forward.us:.0f} | {flops / forward.us / 1e6:.0f} | {whole.us:.0f} | "
        f"{3.5 * flops / whole.us / 1e6:.0f} | {shown} |"
    )


def main() -> int:
    """Runs the benchmark."""
    parser = records.parser("benchmarks.train_attention", __doc__, out=False)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["mlra_4", "mla", "gqa"])
    parser.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, default=["mosaic_gpu", "cudnn"]
    )
    parser.add_argument("--batch", type=int, default=3, help="sequences")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--cuts",
        nargs="+",
        type=parse_cut,
        default=[],
        metavar="FIELD=N,...",
        help="fields of the Config of the kernels for Hopper to change",
    )
    args = parser.parse_args()
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.batch} x {args.tokens} tokens, bfloat16"
    )
    print("| case | back end | forward, us | TFLOP/s | and backward, us | TFLOP/s | kernels, us |")
    print("| --- | --- | ---: | ---: | ---: | ---: | --- |")
    for case in args.cases:
        for name in args.implementations:
            print(run(case, name, args), flush=True)
        for cut in args.cuts:
            print(run(case, "mosaic_gpu", args, cut), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
