"""Decode attention on the GPU at hand: device time of a call, next to a plain read of the same bytes.

    python -m benchmarks.decode_attention                       # the table of docs/kernels.md
    python -m benchmarks.decode_attention --cases 'mla *' 'gqa 1x*' 'mlra_4 3x20000' --implementation triton

A call is timed from queries and cache to the output and its log-sum-exp: in a profile, from the first kernel's start to
the last one's end, of a program that makes many calls. Each call has its own queries; caches are rotated so that they
do not fit the GPU's L2 cache together. Lengths are the same in all calls, as in the layers of a model, so what depends
on them alone is computed once. A plain read of the same bytes is timed in the same way.

Results go to `benchmarks/results/decode_attention_DEVICE.md` and `.json`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import records
from benchmarks.measure import (
    COMPILING_AT_ONCE,
    UNROLL,
    WIDTH,
    Timing,
    attempt,
    measure,
    rotation,
    sum_mosaic,
    sum_xla,
    together,
)
from benchmarks.records import Setting, parse_size
from mlra_jax.markdown import head
from mlra_jax.markdown import row as markdown_row
from mlra_jax.ops.decode import IMPLEMENTATIONS
from mlra_jax.ops.decode.arg_specs import BENCHMARKS, SHARES, ArgSpec, Call, abstract_call
from mlra_jax.ops.hopper import find_processors
from mlra_jax.ops.tuning import slug

PROGRAM_US = 1500.0
"""About how long a program of many calls takes."""

CASES: Mapping[str, ArgSpec] = {
    **BENCHMARKS,
    **{f"mlra_4 q_len {t} 1x2M": dataclasses.replace(BENCHMARKS["mlra_4 1x2M"], q_len=t) for t in (2, 4)},
    **{
        f"mlra_4 {rows} rows 1x512K": dataclasses.replace(BENCHMARKS["mlra_4 1x512K"], rows=rows)
        for rows in (16, 24, 32, 64)
    },
    "tiny 2x256": ArgSpec((256, 256), rows=8, width=64, rope=32),
}
"""What can be measured, by name; the last one is small enough for a CPU. `find_case` takes more names."""


def find_case(name: str) -> ArgSpec:
    """The case of `CASES` with this name, or a share of `SHARES` at any size: `VARIANT BATCHxTOKENS`.

    Raises:
      ValueError: neither.
    """
    if name in CASES:
        return CASES[name]
    variant, _, size = name.rpartition(" ")
    if variant not in SHARES:
        raise ValueError(
            f"No case is like {name!r}; there are {', '.join(CASES)}, and {', '.join(SHARES)} at any size, such as "
            "'mla 3x20000'."
        )
    batch, tokens = parse_size(size)
    return dataclasses.replace(SHARES[variant], lengths=(tokens,) * batch)


@dataclasses.dataclass(frozen=True)
class Target:
    """What other kernels take for a case on an H100 80GB HBM3, and what ours should take, in us."""

    theirs: float | None = None
    """FlashMLA for MLA, else FlashAttention-3, as measured for this project on such a card."""
    floor: float | None = None
    goal: float | None = None
    over_read: float | None = None
    """Goal as a multiple of the time that the reader takes."""


TARGETS: Mapping[str, Target] = {
    **{
        f"mlra_4 {size}": Target(*numbers)
        for size, *numbers in (
            ("1x128K", 37.8, 26, 22),
            ("1x256K", 55.7, 45, 39),
            ("1x512K", 91.1, 76, 72),
            ("1x1M", 159, 143, 137),
            ("1x2M", 294, 280, 270),
            ("16x4K", 20.6, 18, 14),
            ("16x16K", 48.5, 45, 39),
            ("64x4K", 49.7, 45, 39),
            ("64x16K", 151, 145, 140),
            ("128x32K", 545, 545, 540),
        )
    },
    "mlra_4 q_len 2 1x2M": Target(300, 300, 290),
    "mlra_4 q_len 4 1x2M": Target(520, 520, 480),
    **{f"mlra_4 {rows} rows 1x512K": Target() for rows in (16, 24, 32, 64)},
    **{f"mlra_4 all heads {size}": Target(over_read=1.08) for size in ("1x256K", "1x512K", "1x2M", "64x16K")},
    **{
        f"{variant} {size}": Target(us, us, us)
        for variant, *numbers in (
            ("mla", 90.1, 248, 850),
            ("gla_2", 52.2, 142, 497),
            ("gqa", 41.5, 111, 388),
        )
        for size, us in zip(("1x128K", "1x512K", "1x2M"), numbers, strict=True)
    },
}
"""The rows of the table."""
SPREAD_OF_ROWS = 1.03
"""Goal for the slowest of 16 to 64 rows over the fastest."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A case as measured."""

    case: str
    implementation: str
    bytes: int
    """Bytes of cache that a call must read."""
    timing: Timing
    read: Timing
    reader: str
    target: Target
    verdict: str
    """Goal, floor or miss; empty if there is no target for the case or the device."""

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes of cache over time."""
        return self.bytes / self.timing.us / 1e3

    @property
    def ratio(self) -> float:
        """To the reader's time."""
        return self.timing.us / self.read.us


@dataclasses.dataclass(frozen=True)
class Program:
    """Many calls, compiled."""

    run: Callable[..., Any]
    call: Call
    implementation: str
    buffers: int
    calls: int


def split_arguments(call: Call) -> tuple[list[Any], list[Any], list[Any]]:
    """Queries, cache, and lengths with the page table."""
    queries = [x for x in call.args if x is not None and x.ndim == 5]
    n = len(queries)
    return queries, list(call.args[n : n + 2]), list(call.args[n + 2 :])


def compile_calls(case: ArgSpec, attend: Callable[..., Any]) -> tuple[Callable[..., Any], int, int]:
    """A program of many calls of `attend(*arguments of the op)`; how many buffers, and how many calls.

    The program takes the first query of each call, the other queries, the buffers of the cache, and the rest.
    """
    (first, *others), cache, rest = split_arguments(abstract_call(case))
    buffers, calls = rotation(case.cache_bytes, PROGRAM_US)
    once = jax.jit(attend)  # traced once for all calls

    def many(firsts: Any, others: Any, caches: Any, rest: Any) -> Any:
        return [once(q, *others, *caches[i % buffers], *rest) for i, q in enumerate(firsts)]

    compiled = jax.jit(many).lower([first] * calls, others, [cache] * buffers, rest).compile()
    return compiled, buffers, calls


def prepare(case: ArgSpec, implementations: Sequence[str]) -> Program:
    """The program of the first implementation that takes the case.

    Raises:
      NotImplementedError: none does.
    """
    call = abstract_call(case)
    reasons = []
    for name in implementations:
        try:
            run, buffers, calls = compile_calls(case, functools.partial(call, implementation=name))
            return Program(run, call, name, buffers, calls)
        except NotImplementedError as e:
            reasons.append(f"{name}: {e}")
    raise NotImplementedError("; ".join(reasons))


class Memory:
    """Fills arrays from a pool of normally distributed bfloat16: power, and so the clock, varies with the data."""

    def __init__(self, elements: int = 2**26):
        self.pool = jax.random.normal(jax.random.key(0), (elements,), jnp.bfloat16)
        self.words = lax.bitcast_convert_type(self.pool.reshape(-1, 2), jnp.int32)
        self.rng = np.random.default_rng(0)

    def caches(self, shapes: Sequence[jax.ShapeDtypeStruct], buffers: int) -> list[list[jax.Array]]:
        """So many buffers of arrays of these shapes."""
        words = shapes[0].dtype == jnp.int32
        fill = jax.jit(lambda pool: [jnp.resize(pool, x.shape) for x in shapes])
        return [fill(self.words if words else self.pool) for _ in range(buffers)]

    def queries(self, shape: jax.ShapeDtypeStruct, number: int) -> list[jax.Array]:
        """So many queries."""
        draw = lambda: self.rng.standard_normal(shape.shape, np.float32)
        return [jnp.asarray(draw(), shape.dtype) for _ in range(number)]

    def arguments(self, case: ArgSpec, buffers: int, calls: int) -> tuple[Any, ...]:
        """What the program of `compile_calls` takes; free the third, which is large, when done."""
        (first, *others), cache, (kv_len, table) = split_arguments(abstract_call(case))
        earlier = np.arange(case.q_len - 1, -1, -1)
        lengths = np.maximum(np.array(case.lengths)[:, None] - earlier, 0).astype(kv_len.dtype)
        pages = None
        if table is not None:
            pages = jnp.asarray(self.rng.permutation(table.size).reshape(table.shape), table.dtype)
        queries = self.queries(first, calls), [self.queries(x, 1)[0] for x in others]
        return *queries, self.caches(cache, buffers), [jnp.asarray(lengths), pages]


def free(arrays: Any) -> None:
    """Gives their memory back now."""
    for x in jax.tree.leaves(arrays):
        x.delete()


class Readers:
    """Times plain reads of so many bytes, each number once."""

    def __init__(self, memory: Memory, runs: int):
        self.memory, self.runs = memory, runs
        self.functions: dict[str, Callable[..., jax.Array]] = {"XLA sum": sum_xla}
        processors = find_processors(jax.devices()[0].device_kind)
        if processors is not None and jax.__version_info__ >= (0, 11):
            self.functions["vector loads"] = functools.partial(sum_mosaic, processors=processors)
        self.compiled: dict[tuple[int, str], tuple[Any, int, int]] = {}
        self.measured: dict[int, tuple[Timing, str]] = {}

    def shape(self, size: int) -> jax.ShapeDtypeStruct:
        """Of an array of so many bytes, or a few more."""
        return jax.ShapeDtypeStruct((-(-size // (4 * UNROLL * WIDTH)), UNROLL, WIDTH), jnp.int32)

    def compile(self, size: int, name: str) -> None:
        """Makes ready to measure."""
        buffers, calls = rotation(size, PROGRAM_US)
        read = self.functions[name]

        def many(caches: Any, seeds: Any) -> Any:
            sums: list[jax.Array] = []
            for i, seed in enumerate(seeds):
                # One after the other: XLA would make one read of several of the same buffer.
                seed, *_ = jax.lax.optimization_barrier((seed, *sums[-1:]))
                sums.append(read(caches[i % buffers][0], seed))
            return sums

        seed = jax.ShapeDtypeStruct((1,), jnp.int32)
        run = jax.jit(many).lower([[self.shape(size)]] * buffers, [seed] * calls).compile()
        self.compiled[size, name] = run, buffers, calls

    def measure(self, size: int) -> tuple[Timing, str]:
        """The fastest reader's time of one read of so many bytes, and its name."""
        if size not in self.measured:
            timings = []
            for name in self.functions:
                if (size, name) not in self.compiled:
                    self.compile(size, name)
                run, buffers, calls = self.compiled.pop((size, name))
                caches = self.memory.caches([self.shape(size)], buffers)
                seeds = [jnp.array([i], jnp.int32) for i in range(calls)]
                timings.append((measure(run, (caches, seeds), calls=calls, runs=self.runs), name))
                free(caches)
            self.measured[size] = min(timings, key=lambda x: x[0].us)
        return self.measured[size]


def judge(timing: Timing, read: Timing, target: Target, kind: str) -> str:
    """Whether goal or floor was reached, on the device that they are for."""
    goal = target.goal if target.over_read is None else target.over_read * read.us
    if goal is None or timing.clock != "device" or not re.search("H100 80GB HBM3", kind):
        return ""
    if timing.us <= goal:
        return "PASS, goal"
    if target.floor is not None and timing.us <= target.floor:
        return "PASS, floor"
    return "MISS"


COLUMNS = (
    "case",
    "back end",
    "us",
    "spread",
    "GB/s",
    "read, us",
    "of read",
    "others, us",
    "floor",
    "goal",
    "",
)
HEADER = "\n".join(head((*COLUMNS, "kernels, us")))


def format_row(row: Row) -> str:
    """A line of the table."""
    number = lambda x: "" if x is None else f"{x:g}"
    target = row.target
    goal = number(target.goal) if target.over_read is None else f"{target.over_read:g} x read"
    longest = sorted(row.timing.kernels.items(), key=lambda x: -x[1])
    kernels = ", ".join(f"{name[:40]} {us:.1f}" for name, us in longest if us >= 0.05)
    cells = (
        row.case,
        row.implementation,
        f"{row.timing.us:.1f}" + (" (wall)" if row.timing.clock == "wall" else ""),
        f"{row.timing.spread_us:.1f}",
        f"{row.gigabytes_per_second:.0f}",
        f"{row.read.us:.1f} ({row.reader})",
        f"{row.ratio:.2f}",
        number(target.theirs),
        number(target.floor),
        goal,
        row.verdict,
        kernels,
    )
    return markdown_row(cells)


def compare_rows(rows: Sequence[Row]) -> str | None:
    """How far apart 16 to 64 query rows are, where more than one was measured."""
    us = [r.timing.us for r in rows if re.fullmatch(r"mlra_4 \d+ rows .*", r.case)]
    if len(us) < 2:
        return None
    spread = max(us) / min(us)
    verdict = "PASS" if spread <= SPREAD_OF_ROWS else "MISS"
    return (
        f"Slowest over fastest of the numbers of query rows: {spread:.3f} (goal {SPREAD_OF_ROWS}): {verdict}."
    )


def write(rows: Sequence[Row], failures: Mapping[str, str], setting: Setting, stem: pathlib.Path) -> None:
    """Writes `stem`.md and `stem`.json."""
    record = as_record(rows, failures, setting)
    lines = [
        f"# Decode attention on {setting.device}",
        "",
        f"{setting.date}, {records.versions(record)}. `{setting.command}`. bfloat16; caches are contiguous unless paged.",
        "",
        "*us*: device time of a call, from queries and cache to the output and its log-sum-exp: in a profile, from the",
        "first kernel's start to the last one's end in a program of many calls, over the calls; median of the runs.",
        "*Spread*: slowest run less fastest. Caches are rotated past the second-level cache. *Read*: the fastest plain",
        "reader of the same bytes in the same run. *Others*: FlashMLA for MLA, else FlashAttention-3, measured on an",
        "H100 80GB HBM3. *Kernels*: their shares of a call; they may overlap.",
        "",
        HEADER,
        *map(format_row, rows),
    ]
    if comparison := compare_rows(rows):
        lines += ["", comparison]
    records.write(stem, record, lines + records.not_measured(failures))


def as_record(rows: Sequence[Row], failures: Mapping[str, str], setting: Setting) -> dict[str, Any]:
    """What is kept of a run, for JSON."""
    derived = lambda r: {"gigabytes_per_second": r.gigabytes_per_second, "ratio": r.ratio}
    measured = [dataclasses.asdict(r) | derived(r) for r in rows]
    return dataclasses.asdict(setting) | {"rows": measured, "failures": dict(failures)}


def select(patterns: Sequence[str] | None, quick: bool) -> list[str]:
    """Names of the cases that are asked for.

    Raises:
      ValueError: a pattern fits none.
    """
    names = list(TARGETS) if patterns is None else []
    for pattern in patterns or ():
        found = fnmatch.filter(CASES, pattern)
        if not found:
            find_case(pattern)
            found = [pattern]
        names += [name for name in found if name not in names]
    return [name for name in names if not quick or find_case(name).cache_bytes < 3e8]


def run(
    names: Sequence[str],
    implementations: Sequence[str],
    *,
    page: int | None,
    runs: int,
    write: Callable[[list[Row], dict[str, str]], None],
) -> tuple[list[Row], dict[str, str]]:
    """Measures cases, and prints each as it comes: the rows, and by name why others failed.

    After each case calls `write` with what there is so far.
    """
    rows: list[Row] = []
    failures: dict[str, str] = {}
    kind = jax.devices()[0].device_kind
    cases = {name: dataclasses.replace(find_case(name), page_size=page) for name in names}
    memory = Memory() if any(case.cache_bytes > 2**24 for case in cases.values()) else Memory(2**16)
    readers = Readers(memory, runs)

    for start in range(0, len(names), COMPILING_AT_ONCE):
        group = names[start : start + COMPILING_AT_ONCE]
        sizes = dict.fromkeys(cases[name].cache_bytes for name in group)
        jobs: list[Callable[[], Any]] = [
            functools.partial(prepare, cases[name], implementations) for name in group
        ]
        jobs += [
            functools.partial(readers.compile, size, name)
            for size in sizes
            if size not in readers.measured
            for name in readers.functions
        ]
        for name, made in zip(group, together(jobs), strict=False):
            row = made
            if not isinstance(made, Exception):
                time_it = functools.partial(
                    measure_case, name, cases[name], made, memory, readers, runs, kind
                )
                row = attempt(time_it)
            if isinstance(row, Exception):
                failures[name] = f"{type(row).__name__}: {str(row).strip().splitlines()[0]}"
                print(f"{name}: not measured. {failures[name]}", flush=True)
            else:
                rows.append(row)
                print(format_row(row), flush=True)
            write(rows, failures)
    return rows, failures


def measure_case(
    name: str, case: ArgSpec, program: Program, memory: Memory, readers: Readers, runs: int, kind: str
) -> Row:
    """Times a program and a read of as many bytes."""
    args = memory.arguments(case, program.buffers, program.calls)
    try:
        timing = measure(program.run, args, calls=program.calls, runs=runs)
    finally:
        free(args[2])
    read, reader = readers.measure(case.cache_bytes)
    target = TARGETS.get(name, Target())
    verdict = judge(timing, read, target, kind)
    return Row(name, program.implementation, case.cache_bytes, timing, read, reader, target, verdict)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 1 where a case failed."""
    argv = sys.argv[1:] if argv is None else argv
    parser = records.parser("benchmarks.decode_attention", __doc__)
    parser.add_argument(
        "--cases", nargs="+", metavar="GLOB", help="names of cases (default: all of the table)"
    )
    parser.add_argument(
        "--implementation",
        choices=list(IMPLEMENTATIONS),
        help="back end (default: the first that takes the call)",
    )
    parser.add_argument("--page", type=int, help="tokens of a page (default: a contiguous cache)")
    parser.add_argument("--quick", action="store_true", help="only cases under 300 MB, three runs each")
    options = parser.parse_args(argv)
    try:
        names = select(options.cases, options.quick)
    except ValueError as e:
        parser.error(str(e))
    implementations = [options.implementation] if options.implementation else list(IMPLEMENTATIONS)
    setting = Setting.here("benchmarks.decode_attention", argv)
    suffix = f"_{options.implementation}" if options.implementation else ""
    stem = options.out / f"decode_attention_{slug(setting.device)}{suffix}"
    print(f"{setting.device}, {setting.versions}\n{HEADER}", flush=True)
    rows, failures = run(
        names,
        implementations,
        page=options.page,
        runs=3 if options.quick else 7,
        write=lambda rows, failures: write(rows, failures, setting, stem),
    )
    if comparison := compare_rows(rows):
        print(comparison)
    print(f"Written to {stem}.md and {stem}.json")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
