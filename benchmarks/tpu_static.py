"""The TPU compiler's estimates for attention, without a TPU.

For the decode attention kernel, its cycles against those that reading HBM takes; for attention in training, the cost of
its two forms.

    python benchmarks/tpu_static.py --out benchmarks/results/tpu_static.md

Needs `libtpu`. Each decode kernel is compiled in its own process by the real compiler, which dumps its schedule and
estimate. The kernel is the shipped one with the flag `static`: all rows are full, as known at compile time, and blocks
are not copied from HBM, because the estimate takes code under a run-time condition as not executed, and a copy as a
fixed latency. What remains is the core's computation.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Literal, get_args

import jax
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mlra_jax.cli.configs import load_config
from mlra_jax.config import ExecutionConfig
from mlra_jax.markdown import head, row, table
from mlra_jax.ops.decode.arg_specs import ArgSpec, abstract_call
from mlra_jax.ops.decode.mosaic_tpu import MosaicTPU

KERNEL = "decode_attention"
Form = Literal["absorbed", "expanded"]


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a TPU generation."""

    topology: str
    version: pltpu.ChipVersion
    cores: int
    gigahertz: float
    """Assumed: Google does not publish clocks. They follow from peak FLOPs and the number and size of matrix units."""
    terabytes_per_second: float
    """HBM bandwidth, from Google Cloud. For v4 and TPU7x that of half a chip, which is one device."""


CHIPS = {
    "v4": Chip("v4:2x2x1", pltpu.ChipVersion.TPU_V4, 1, 1.05, 1.2 / 2),
    "v5e": Chip("v5e:2x2", pltpu.ChipVersion.TPU_V5E, 1, 1.5, 0.819),
    "v5p": Chip("v5p:2x2x1", pltpu.ChipVersion.TPU_V5P, 2, 1.75, 2.765),
    "v6e": Chip("v6e:2x2", pltpu.ChipVersion.TPU_V6E, 1, 1.75, 1.64),
    "tpu7x": Chip("tpu7x:2x2x1", pltpu.ChipVersion.TPU_7X, 1, 2.2, 7.38 / 2),
}
ROWS = (24, 32, 64)
TOKENS = 2048
"""Of a sequence in training."""
LENGTHS = {"1 x 128K": (128 * 1024,), "16 x 4K": (4096,) * 16}
UNITS = {
    "MATMUL": "matrix unit (rows in)",
    "MATPUSH": "matrix unit (weights in)",
    "XLU": "cross-lane unit (XLU)",
    "VALU": "vector arithmetic",
    "VPOP": "results out of matrix and cross-lane units",
    "EUP": "exponentials",
    "VLOAD": "vector loads",
    "VSTORE": "vector stores",
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The compiler's estimate of one kernel."""

    cycles: int
    """Cycles of each core for the whole call."""
    stalls: bool
    """Whether `cycles` includes stalls; if not, it is the number of instruction bundles issued, a lower bound."""
    use: dict[str, tuple[int, float]]
    """Use of each unit: instructions in the kernel's code, and the share of its slots that they fill."""
    block: int
    """Tokens per iteration of the kernel's inner loop, which is nearly all of its code."""

    @property
    def binding(self) -> str:
        """The unit that the schedule uses most."""
        return max(UNITS, key=lambda unit: self.use[unit][1])

    @property
    def spills(self) -> float:
        """Vector registers spilled for each 1024 tokens."""
        return self.use["VSTORE:SPILL"][0] / self.block * 1024


def case(rows: int, lengths: tuple[int, ...]) -> ArgSpec:
    """One latent head of MLRA, C = 128 and R = 64."""
    return ArgSpec(lengths, rows=rows, layout="feature_major")


def compile_static(topology: str, rows: int, lengths: tuple[int, ...]) -> None:
    """Compiles one kernel; the compiler writes where `LIBTPU_INIT_ARGS` says."""
    mesh = one_device(topology)
    call = abstract_call(case(rows, lengths))
    everywhere = NamedSharding(mesh, PartitionSpec())
    args = [
        None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere) for x in call.args
    ]
    run = functools.partial(call, implementation=MosaicTPU(static=True))
    with jax.set_mesh(mesh):
        jax.jit(run).lower(*args).compile()


def estimate(chip: Chip, rows: int, lengths: tuple[int, ...]) -> Estimate:
    """Compiles one kernel in its own process and reads the compiler's output."""
    block = chosen_block(chip, rows, lengths)
    for with_stalls in (True, False):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            failure = compile_in_process(chip, rows, lengths, folder, with_stalls)
            schedules = list(folder.glob(f"*-{KERNEL}*-final_bundles.txt"))
            profiles = list(folder.glob(f"{KERNEL}*_static_llo_profile.textproto"))
            if schedules and (profiles or not with_stalls):
                [table] = folder.glob(f"*-{KERNEL}*-per-bundle-utilization.txt")
                use = utilization(table.read_text())
                if with_stalls:
                    found = re.search(r"estimated_cycles: (\d+)", profiles[0].read_text())
                    assert found is not None
                    return Estimate(int(found[1]), True, use, block)
                [schedule] = [f for f in schedules if "schedule-analysis" not in f.name]
                in_loops = len(re.findall(r"^ +0x\w+ +(?:\w+)?: >+ ", schedule.read_text(), re.MULTILINE))
                return Estimate(in_loops * sum(lengths) // block, False, use, block)
    raise RuntimeError(f"The compiler wrote no schedule for {chip.topology}:\n{failure[-2000:]}")


def compile_in_process(
    chip: Chip, rows: int, lengths: tuple[int, ...], folder: pathlib.Path, with_stalls: bool
) -> str:
    """Has the compiler write to a folder; returns its standard error.

    The compiler may abort on a check in its own estimate, before writing it (v4) or after (v5e). So only the written
    files count; without an estimate the kernel is compiled again, for its schedule alone.
    """
    flags = {
        "xla_jf_dump_to": folder,
        "xla_jf_dump_llo_text": "true",
        "xla_jf_dump_llo_pass_label_regex": "final.*",
    }
    if with_stalls:
        flags["xla_jf_dump_static_llo_profile_to"] = folder
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": " ".join(f"--{k}={v}" for k, v in flags.items()),
    }
    command = [sys.executable, __file__, "--compile", chip.topology, str(rows), *map(str, lengths)]
    return subprocess.run(command, env=environment, capture_output=True, text=True).stderr


def chosen_block(chip: Chip, rows: int, lengths: tuple[int, ...]) -> int:
    """Tokens of the block that the kernel chooses."""
    info = pltpu.get_tpu_info_for_chip(chip.version, chip.cores)
    return MosaicTPU(info=info).heuristic(case(rows, lengths).shape).block


def utilization(text: str) -> dict[str, tuple[int, float]]:
    """Reads the compiler's table of the slots used by each bundle."""
    _, names, capacities, _, *lines = text.splitlines()
    bundles = [[int(n) for n in line.split()] for line in lines if line.strip()]
    sums = [sum(column) for column in zip(*bundles, strict=True)]
    return {
        name.strip(): (n, n / (int(capacity) * len(bundles)))
        for name, n, capacity in zip(names.split(","), sums, capacities.split(), strict=True)
    }


def cost_of_form(chip: Chip, form: Form, backward: bool) -> tuple[float, float, float]:
    """FLOPs, bytes accessed and bytes of temporaries of an MLRA-4 layer's attention over `TOKENS`, in one form."""
    config = load_config("mlra_4").model
    execution = ExecutionConfig(attention_form=form)
    layer = nnx.eval_shape(lambda: config.attention.module()(config, rngs=nnx.Rngs(0), execution=execution))
    graph, state = nnx.split(layer)
    x = jax.ShapeDtypeStruct((1, TOKENS, config.d_model), config.compute_dtype)
    run = lambda state, x: nnx.merge(graph, state)(x).astype(np.float32).sum()
    mesh = one_device(chip.topology)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())),
        (state, x),
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(run, argnums=(0, 1)) if backward else run).lower(*placed).compile()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    assert cost is not None
    assert memory is not None
    return cost["flops"], cost["bytes accessed"], memory.temp_size_in_bytes


def one_device(topology: str) -> Mesh:
    """A mesh of the first device of a topology."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(devices[:1]), ("x",), axis_types=(AxisType.Explicit,))


def report(chips: list[str]) -> str:
    """The table, with what it was made with."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    command = "python benchmarks/tpu_static.py --out benchmarks/results/tpu_static.md"
    lines = [
        "# Attention on TPU, as its compiler expects",
        "",
        f"{datetime.date.today()}, {versions}. `{command}`. Nothing was run on a TPU.",
        "",
        "## Decode attention",
        "",
        "One latent head, C = 128, R = 64, bfloat16, 384 bytes a token. *Cycles*: of each core over the whole call, by",
        "the compiler's estimate, stalls included, of the shipped kernel without its copies from HBM. *HBM*: cycles",
        "in which the device reads the cache once at its public bandwidth. *Ratio*: cycles / HBM; below 1 the copies,",
        "which run beside the computation, decide. *Binding unit*: the one whose slots the schedule fills most, and",
        "how far. *Spills*: vector registers stored as spills for each 1024 tokens. The scores and the turned values",
        "of a step, rows + 64 registers for each 1024 tokens, do not fit the 64 that there are and go through VMEM;",
        "the compiler books these as spills.",
        "",
        *table(
            ("chip", "assumed clock", "HBM bandwidth of a device", "cores of a device"),
            [
                (name, f"{c.gigahertz} GHz", f"{c.terabytes_per_second:.3g} TB/s", c.cores)
                for name in chips
                for c in [CHIPS[name]]
            ],
        ),
        "",
        *head(("chip", "context", "rows", "cycles", "HBM", "ratio", "binding unit", "spills")),
    ]

    def add(*cells: object) -> None:
        lines.append(row(cells))
        print(lines[-1], file=sys.stderr, flush=True)

    for name in chips:
        for context, lengths in LENGTHS.items():
            for rows in ROWS:
                chip, e = CHIPS[name], estimate(CHIPS[name], rows, lengths)
                hbm = case(rows, lengths).cache_bytes / chip.terabytes_per_second / 1e3 * chip.gigahertz
                least = "" if e.stalls else "≥ "
                cycles, ratio = f"{least}{e.cycles / 1e3:.1f}K", f"{least}{e.cycles / hbm:.2f}"
                unit = f"{UNITS[e.binding]}, {e.use[e.binding][1]:.0%}"
                add(name, context, rows, cycles, f"{hbm / 1e3:.1f}K", ratio, unit, f"{e.spills:.0f}")
    if "v4" in chips:
        lines += [
            "",
            "≥: for v4 the compiler's estimate fails a check of its own; bundles are counted, without stalls.",
        ]
    lines += [
        "",
        "## Attention in training, absorbed or expanded",
        "",
        f"An MLRA-4 layer's attention with its projections over {TOKENS} tokens, one row, one device, "
        "Splash attention:",
        "what the compiler counts of the whole program. FLOPs leave out those inside of Splash attention, the same in",
        'both forms: as many heads, keys 192 wide, values 128. `execution.attention_form = "auto"` takes the absorbed',
        "form.",
        "",
        *head(("chip", "pass", "form", "GFLOPs", "bytes accessed", "temporaries")),
    ]
    for name in chips:
        for backward in (False, True):
            for form in get_args(Form):
                flops, *sizes = cost_of_form(CHIPS[name], form, backward)
                passes = "forward and backward" if backward else "forward"
                add(name, passes, form, f"{flops / 1e9:.1f}", *(f"{size / 1e6:.0f} MB" for size in sizes))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prints the table, or writes it to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chips", nargs="*", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--compile", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        topology, rows, *lengths = args.compile
        compile_static(topology, int(rows), tuple(map(int, lengths)))
    elif args.out:
        args.out.write_text(report(args.chips))
    else:
        print(report(args.chips))


if __name__ == "__main__":
    main()
