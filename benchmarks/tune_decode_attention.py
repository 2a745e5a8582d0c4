"""Measures configurations of the decode attention kernels on the GPU at hand and writes the fastest into its table.

    python -m benchmarks.tune_decode_attention                   # the cases of the benchmark, those measured left out
    python -m benchmarks.tune_decode_attention --cases 'mla *' --again --limit-seconds 300

From the heuristic's configuration on, one property after the other is set to the value that is fastest, twice around.
What is faster than the heuristic by more than 1 % in a second measurement, and agrees with plain XLA, is entered into
`mlra_jax/ops/decode/tuned/DEVICE.json`, from where the back ends take it (`mlra_jax.ops.tuning`); else the table says
that the heuristic is best. It is written after each case, and entries for others stay.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.decode_attention import (
    CASES,
    COMPILING_AT_ONCE,
    TARGETS,
    Memory,
    Setting,
    compile_calls,
    free,
    select,
    split_arguments,
)
from benchmarks.measure import measure
from mlra_jax.ops import hopper
from mlra_jax.ops.decode import latent_decode_attention, mosaic_gpu, triton
from mlra_jax.ops.decode.cases import Call, Case, abstract_call
from mlra_jax.ops.tuning import DECODE, Entry, Sizes, read_table, table_path, update, write_table

GAIN = 1.01
"""How many times faster than the heuristic's a configuration must be to be entered."""
TOLERANCE = 1e-2
"""Largest relative difference to plain XLA's output, in norm; bfloat16's is 2e-3."""
ROUNDS = 2


def sizes_of(case: Case) -> Sizes:
    """What the table knows a case by."""
    latent = case.value is None
    return Sizes(
        heads=case.heads,
        rows=case.rows,
        q_len=case.q_len,
        widths=(case.width, case.rope) if case.rope and latent else (case.width,),
        v_width=case.value or case.width,
        latent=latent,
        batch=len(case.lengths),
        capacity=case.capacity,
    )


class Mosaic:
    """Configurations of the Mosaic GPU kernel."""

    attend = staticmethod(mosaic_gpu.decode_attention)

    def __init__(self, case: Case, kind: str):
        processors = hopper.find_processors(kind)
        if processors is None:
            raise ValueError(f"the Mosaic GPU kernel runs on Hopper GPUs; this is a {kind}.")
        self.processors = processors
        sizes = sizes_of(case)
        pages = 1 if case.page is None else case.capacity // case.page
        self.shape = mosaic_gpu.Shape(
            batch=sizes.batch,
            q_len=sizes.q_len,
            heads=sizes.heads,
            rows_per_query=sizes.rows,
            widths=sizes.widths,
            shared=(False, sizes.heads > 1)[: len(sizes.widths)],
            v_width=sizes.v_width,
            latent=sizes.latent,
            page=case.page or case.capacity,
            pages=sizes.batch * pages,
            row_pages=None if case.page is None else pages,
        )

    def heuristic(self) -> mosaic_gpu.Config:
        """Where the search starts."""
        return mosaic_gpu.Config.heuristic(self.shape, self.processors)

    def tiles(self, row_groups: int) -> int:
        """Tiles of query rows of all heads."""
        return self.shape.heads * -(-self.shape.rows // (hopper.ROWS * row_groups))

    def neighbours(self, config: mosaic_gpu.Config) -> list[list[mosaic_gpu.Config]]:
        """For each property in turn, configurations that differ from this one in it."""
        one_each = lambda tiles: max(1, self.processors // tiles)
        change = functools.partial(dataclasses.replace, config)
        groups = range(1, 4) if self.shape.value_groups == 1 else (1,)
        groups = [n for n in groups if n == 1 or (n - 1) * hopper.ROWS < self.shape.rows]
        grouped = [
            change(row_groups=n, n_splits=1 if config.n_splits == 1 else one_each(self.tiles(n)))
            for n in groups
        ]
        tiles = self.tiles(config.row_groups)
        even = one_each(tiles)
        splits = {even, max(1, even - max(1, even // 32)), 2 * even}
        # A program for each sequence, with nothing to merge, needs about as many of them as there are processors.
        splits = {n for n in splits if n > 1}
        if tiles * self.shape.batch >= 0.5 * self.processors:
            splits.add(1)
        split = [change(n_splits=n) for n in sorted(splits)]
        # Two programs a processor: as many more shares, of which each has half the room for a ring.
        other = 3 - config.resident
        scaled = (
            config.n_splits if config.n_splits == 1 else max(2, config.n_splits * other // config.resident)
        )
        split += [change(n_splits=scaled, resident=other, stages=s) for s in (2, 3, 4)]
        ring = [change(block=b, stages=s) for b, s in itertools.product((64, 128), range(2, 7))]
        return [[c for c in cs if c.fits(self.shape)] for cs in (grouped, split, ring)]


class Triton:
    """Configurations of the Triton kernel."""

    attend = staticmethod(triton.decode_attention)

    def __init__(self, case: Case, kind: str):
        chip = triton.find_chip(kind)
        if chip is None:
            raise ValueError(f"the Triton kernel does not know {kind}; add it to mlra_jax.ops.device.CHIPS.")
        self.chip, self.sizes, self.page = chip, sizes_of(case), case.page

    def heuristic(self) -> triton.Config:
        """Where the search starts."""
        return triton.heuristic_for(self.sizes, self.page, self.chip)

    def fits(self, config: triton.Config) -> bool:
        """Whether pages hold whole blocks, and shared memory queries, weights and blocks."""
        key, value = sum(self.sizes.widths), 0 if self.sizes.latent else self.sizes.v_width
        queries = 2 * config.block_rows * (key + config.block_tokens)
        blocks = 2 * config.stages * config.block_tokens * (key + value)
        whole = self.page is None or self.page % config.block_tokens == 0
        return whole and queries + blocks <= self.chip.shared_bytes

    def neighbours(self, config: triton.Config) -> list[list[triton.Config]]:
        """For each property in turn, configurations that differ from this one in it."""
        change = functools.partial(dataclasses.replace, config)
        rows = self.sizes.q_len * self.sizes.rows
        blocks = [
            change(block_rows=r, block_tokens=t)
            for r, t in itertools.product((16, 32, 64), (32, 64, 128))
            if r == 16 or r < 2 * rows
        ]
        most = min(triton.MAX_SPLITS, max(1, self.sizes.capacity // config.block_tokens))
        splits = {config.splits // 2, config.splits - 1, config.splits + 1, 2 * config.splits, 1}
        if config.splits > 8:
            splits.discard(1)
        split = [change(splits=n) for n in sorted(splits) if 1 <= n <= most]
        depth = [change(warps=w, stages=s) for w, s in itertools.product((4, 8), range(1, 6))]
        return [[c for c in cs if self.fits(c)] for cs in (blocks, split, depth)]


BACK_ENDS: Mapping[str, Callable[[Case, str], Any]] = {"mosaic_gpu": Mosaic, "triton": Triton}


def op_with(call: Call, attend: Callable[..., Any], config: Any) -> Callable[..., Any]:
    """The op of a call by a back end's function with this configuration; takes the op's arguments."""

    def run(*args: Any) -> Any:
        queries, cache, (kv_len, page_table) = split_arguments(dataclasses.replace(call, args=args))
        if call.op is latent_decode_attention:
            keys, v = [cache[0], cache[1][:, None]], None
            parts = [(q, k) for q, k in zip(queries, keys, strict=True) if q.shape[-1]]
        else:
            parts, v = [(queries[0], cache[0])], cache[1]
        return attend(parts, v, kv_len, page_table=page_table, config=config, **call.static)

    return run


@dataclasses.dataclass(frozen=True)
class Best:
    """What came out for a case."""

    config: Any
    """None: the heuristic's."""
    us: float
    heuristic_us: float


class Tuner:
    """Times configurations of a back end for one case.

    Args:
      case: what to run.
      back_end: one of `BACK_ENDS`, made for it.
      memory: to fill caches from.
      deadline: by `time.monotonic`.
    """

    def __init__(self, case: Case, back_end: Any, memory: Memory, deadline: float):
        self.case, self.back_end, self.deadline = case, back_end, deadline
        self.call = abstract_call(case)
        self.programs: dict[Any, tuple[Any, int]] = {}
        self.times: dict[Any, float] = {}
        start = self.compile(back_end.heuristic())
        self.args = memory.arguments(case, start[2], start[1])
        firsts, others, caches, rest = self.args
        xla = jax.jit(functools.partial(self.call, implementation="xla"))
        self.expected = jax.device_get(xla(firsts[0], *others, *caches[0], *rest))

    def compile(self, config: Any) -> tuple[Any, int, int]:
        """The program of a configuration, its calls and its buffers."""
        run, buffers, calls = compile_calls(self.case, op_with(self.call, self.back_end.attend, config))
        self.programs[config] = run, calls
        return run, calls, buffers

    def time(self, configs: Iterable[Any], runs: int) -> dict[Any, float]:
        """Device time of those that compile, run and are right, in us.

        Raises:
          TimeoutError: the deadline has passed.
        """
        configs = list(dict.fromkeys(configs))
        with concurrent.futures.ThreadPoolExecutor(COMPILING_AT_ONCE) as pool:
            new = [c for c in configs if c not in self.programs]
            failures = dict(zip(new, pool.map(self.attempt, [self.compile] * len(new), new), strict=True))
        times = {}
        for config in configs:
            if time.monotonic() > self.deadline:
                raise TimeoutError
            failure = failures.get(config) or self.attempt(self.check, config)
            if failure is None:
                run, calls = self.programs[config]
                times[config] = measure(run, self.args, calls=calls, runs=runs).us
            print(f"    {config}: {failure or f'{times[config]:.2f} us'}", flush=True)
        return times

    @staticmethod
    def attempt(function: Callable[..., Any], *args: Any) -> str | None:
        """Why a function failed: with a configuration that the device cannot run it may in any way."""
        try:
            function(*args)
            return None
        except Exception as e:
            return f"{type(e).__name__}: {(str(e).strip() or '-').splitlines()[0][:120]}"

    def check(self, config: Any) -> None:
        """Compares the first call with plain XLA.

        Raises:
          ValueError: they differ.
        """
        got = jax.device_get(self.programs[config][0](*self.args)[0])
        for name, ours, theirs in zip(("output", "log-sum-exp"), got, self.expected, strict=True):
            ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
            error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
            if not error <= TOLERANCE:  # NaN neither
                raise ValueError(f"its {name} is off by {error:.1e}")

    def search(self) -> Best:
        """The fastest configuration that the search comes across.

        Raises:
          TimeoutError: the deadline has passed.
          ValueError: the heuristic's does not run, or is wrong.
        """
        start = best = self.back_end.heuristic()
        self.times.update(self.time([start], 5))
        if start not in self.times:
            raise ValueError("the heuristic's configuration failed")
        for _ in range(ROUNDS):
            before = best
            for i in range(len(self.back_end.neighbours(best))):
                candidates = [c for c in self.back_end.neighbours(best)[i] if c not in self.times]
                self.times.update(self.time(candidates, 5))
                best = min(self.times, key=lambda c: self.times[c])
            if best == before:
                break
        again = self.time([start, best], 15)
        if best != start and best in again and again[start] > GAIN * again[best]:
            return Best(best, again[best], again[start])
        return Best(None, again[start], again[start])


def tune(
    names: Sequence[str],
    implementation: str,
    *,
    page: int | None,
    again: bool,
    deadline: float,
    path: pathlib.Path,
    setting: Setting,
) -> list[str]:
    """Tunes cases until the deadline, writing the table after each; the names of those left or failed."""
    memory = Memory() if any(CASES[n].cache_bytes > 2**24 for n in names) else Memory(2**16)
    left = []
    for name in names:
        case = dataclasses.replace(CASES[name], page=page)
        sizes = sizes_of(case)
        entries = read_table(path)
        known = any(e.back_end == implementation and e.sizes.distance(sizes) == (0, 0) for e in entries)
        if known and not again:
            print(f"{name}: in the table", flush=True)
            continue
        if time.monotonic() > deadline:
            left.append(name)
            continue
        print(f"{name}:", flush=True)
        tuner = None
        try:
            tuner = Tuner(case, BACK_ENDS[implementation](case, setting.device), memory, deadline)
            best = tuner.search()
        except TimeoutError:
            left.append(name)
            continue
        except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as e:
            print(f"{name}: {e}", flush=True)
            left.append(name)
            continue
        finally:
            if tuner is not None:
                free(tuner.args[2])
        config = None if best.config is None else dataclasses.asdict(best.config)
        entry = Entry(
            back_end=implementation,
            sizes=sizes,
            config=config,
            us=round(best.us, 2),
            heuristic_us=round(best.heuristic_us, 2),
            versions=setting.versions,
            date=setting.date,
            command=setting.command,
        )
        write_table(path, setting.device, update(entries, entry))
        print(
            f"{name}: {best.config or 'the heuristic'}, {best.us:.2f} of {best.heuristic_us:.2f} us",
            flush=True,
        )
    return left


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 1 where a case is left."""
    argv = sys.argv[1:] if argv is None else argv
    kind = jax.devices()[0].device_kind
    default = "triton" if hopper.find_processors(kind) is None else "mosaic_gpu"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune_decode_attention", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="GLOB",
        help=f"names of cases; if left out, the benchmark's {len(TARGETS)}",
    )
    parser.add_argument("--implementation", choices=list(BACK_ENDS), default=default, help=f"here {default}")
    parser.add_argument("--page", type=int, help="tokens of a page; a contiguous cache if left out")
    parser.add_argument("--again", action="store_true", help="also what the table holds already")
    parser.add_argument("--limit-seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--out", type=pathlib.Path, default=DECODE, help="folder of the tables")
    options = parser.parse_args(argv)
    try:
        names = select(options.cases, quick=False)
        path = table_path(options.out, kind)
        read_table(path)
    except ValueError as e:
        parser.error(str(e))
    left = tune(
        names,
        options.implementation,
        page=options.page,
        again=options.again,
        deadline=time.monotonic() + options.limit_seconds,
        path=path,
        setting=Setting.here("benchmarks.tune_decode_attention", argv),
    )
    print(f"Written to {path}" + (f"; left: {', '.join(left)}" if left else ""))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
