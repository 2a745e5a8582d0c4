"""Skinny GEMM, few rows times a matrix of the 2.9 B MLRA-4, on a GPU: our kernel against XLA.

    python -m benchmarks.skinny_gemm                             # 8 and 64 rows, tiled as the heuristic says
    python -m benchmarks.skinny_gemm --rows 64 --only down --cuts 48x1x2x128
    python -m benchmarks.skinny_gemm --interpret                 # tiny sizes on a CPU, to see that it runs

Many calls are timed in one program, on distinct matrices, so that none is in the cache; device time, from a profile. A
cut is tile x tiles x splits x block (`mlra_jax.ops.skinny_gemm.mosaic_gpu.Config`); stages are as many as fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import records
from benchmarks.measure import measure, rotation, together
from benchmarks.records import Setting
from mlra_jax.markdown import head, row
from mlra_jax.ops.skinny_gemm import skinny_gemm, swiglu
from mlra_jax.ops.skinny_gemm.mosaic_gpu import Config, MosaicGPU
from mlra_jax.ops.skinny_gemm.mosaic_gpu.config import Shape
from mlra_jax.ops.tuning import slug

MATRICES = {  # F, K, whether gate and up
    "gate and up": (9984, 3072, True),
    "down": (3072, 9984, False),
    "output": (3072, 3072, False),
    "latents": (1600, 3072, False),
    "queries": (4608, 1024, False),
    "tokens": (50304, 3072, False),
}
TINY = {"gate and up": (48, 256, True), "down": (48, 256, False)}
PROCESSORS = 132  # of an H100


def parse_cut(text: str) -> Config:
    """A tiling from a text like `48x1x2x128`; stages are left to be filled in."""
    try:
        tile, tiles, splits, block = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no cut; give tile x tiles x splits x block, such as 48x1x2x128."
        ) from None
    return Config(tile, tiles, splits, block, 0)


def by_xla(x: jax.Array, w: jax.Array, *, gated: bool, dtype: jnp.dtype) -> jax.Array:
    """As a step multiplies them where it has no kernel."""
    if not gated:
        return jnp.einsum("NK,FK->NF", x, w, preferred_element_type=dtype)
    y = jnp.einsum("NK,GFK->NGF", x, w)
    return jax.nn.silu(y[:, 0]) * y[:, 1]


def by_kernel(
    x: jax.Array, w: jax.Array, *, config: Config, gated: bool, dtype: jnp.dtype, interpret: Any
) -> jax.Array:
    """The kernel with a given tiling."""
    if gated:
        return swiglu(x, w, implementation=MosaicGPU(config, interpret))
    return skinny_gemm(x, w, dtype=dtype, implementation=MosaicGPU(config, interpret))


def many(one: Callable[..., jax.Array], calls: int, x: jax.Array, ws: Sequence[jax.Array]) -> list[jax.Array]:
    """Calls in a row; barriers keep XLA from joining products of the same rows."""
    ys = []
    for i in range(calls):
        y = one(x, ws[i % len(ws)])
        x, y = jax.lax.optimization_barrier((x, y))
        ys.append(y)
    return ys


def run(name: str, rows: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Results of one matrix: XLA's, the heuristic's cut, and those asked for."""
    f, k, gated = (TINY if args.interpret else MATRICES)[name]
    interpret = None
    if args.interpret:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        interpret = plgpu.InterpretGPUParams()
    dtype = jnp.dtype("float32" if name == "tokens" else "bfloat16")
    shape = Shape(-(-rows // 8) * 8, f, k, gated, dtype.itemsize)
    kernel = functools.partial(by_kernel, gated=gated, dtype=dtype, interpret=interpret)
    ways: dict[str, Callable[..., jax.Array]] = {"xla": functools.partial(by_xla, gated=gated, dtype=dtype)}
    for config in (Config.heuristic(shape, PROCESSORS), *(cut.fill(shape) for cut in args.cuts)):
        if config is None or not config.fits(shape):
            print(f"{name}, {rows} rows: {config} does not fit.")
            continue
        ways[", ".join(f"{n}={v}" for n, v in dataclasses.asdict(config).items())] = functools.partial(
            kernel, config=config
        )
    size = 2 * f * k * (1 + gated)
    buffers, calls = (2, 2) if args.interpret else rotation(size, 1000)
    dims = (2, f, k) if gated else (f, k)
    draw = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    keys = jax.random.split(jax.random.key(0), buffers + 1)
    x, ws = 50 * draw(keys[0], (rows, k)), [draw(key, dims) for key in keys[1:]]
    wide = x.astype(jnp.float32), ws[-1].astype(jnp.float32)
    exact = (swiglu if gated else skinny_gemm)(*wide, implementation="reference")
    programs = together(
        [
            lambda one=one: jax.jit(functools.partial(many, one, calls)).lower(x, ws).compile()
            for one in ways.values()
        ]
    )
    results = []
    for cut, program in zip(ways, programs, strict=True):
        if isinstance(program, Exception):
            print(f"{name}, {rows} rows, {cut}: {program!r}"[:300])
            continue
        y = np.asarray(program(x, ws)[buffers - 1], np.float32)
        error = float(np.linalg.norm(y - exact) / np.linalg.norm(exact))
        timing = measure(program, (x, ws), calls=calls, runs=args.runs)
        results.append(
            {"matrix": name, "rows": rows, "bytes": size, "cut": cut, "us": timing.us, "error": error}
        )
        print(line(results[-1]), flush=True)
    return results


HEAD = head(("matrix", "MB", "rows", "cut", "us", "GB/s", "error"), "lrrlr")


def line(r: dict[str, Any]) -> str:
    """A result in the table."""
    speed = (f"{r['us']:.1f}", f"{r['bytes'] / r['us'] / 1e3:,.0f}", f"{r['error']:.1e}")
    return row((r["matrix"], f"{r['bytes'] / 1e6:.1f}", r["rows"], r["cut"], *speed))


def write(record: dict[str, Any], stem: pathlib.Path) -> None:
    """Writes `stem`.json and `.md`."""
    lines = [
        f"# Skinny GEMM on {record['device']}",
        "",
        f"{record['date']}, {records.versions(record)}. `{record['command']}`",
        "",
        "us of a call; error: of the result, relative, against float32.",
        "",
        *HEAD,
        *map(line, record["results"]),
    ]
    records.write(stem, record, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    argv = sys.argv[1:] if argv is None else argv
    parser = records.parser("benchmarks.skinny_gemm", __doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64])
    parser.add_argument(
        "--only", nargs="+", choices=MATRICES, default=list(MATRICES), help="matrices to multiply"
    )
    parser.add_argument(
        "--cuts", type=parse_cut, nargs="+", default=[], help="tilings to time besides the heuristic's"
    )
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each program")
    parser.add_argument(
        "--interpret", action="store_true", help="run the kernel's interpreter on a CPU, with tiny matrices"
    )
    args = parser.parse_args(argv)
    setting = Setting.here("benchmarks.skinny_gemm", argv)
    record: dict[str, Any] = dataclasses.asdict(setting) | {"results": []}
    stem = args.out / f"skinny_gemm_{slug(setting.device)}"
    print(*HEAD, sep="\n")
    for name in args.only:
        if args.interpret and name not in TINY:
            continue
        for rows in args.rows:
            record["results"] += run(name, rows, args)
            write(record, stem)  # what is measured is kept, whatever becomes of the next
    print(f"Written to {stem}.json and .md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
