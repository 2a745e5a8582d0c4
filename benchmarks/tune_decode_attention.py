"""Measures configurations of the decode attention kernels on the GPU at hand and writes the fastest into its table.

    python -m benchmarks.tune_decode_attention                   # the benchmark's cases that the table does not hold
    python -m benchmarks.tune_decode_attention --cases 'mla *' --again --limit-seconds 300

Starting from the heuristic's configuration, one property after the other is set to its fastest value, in two rounds. If
the result is more than 1 % faster than the heuristic in a second measurement, and agrees with plain XLA, it is entered
into `mlra_jax/ops/decode/tuned/DEVICE.json`, where the back ends find it (`mlra_jax.ops.tuning`); otherwise the table
says that the heuristic is best. The table is written after each case; its other entries stay.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from benchmarks import records
from benchmarks.decode_attention import CASES, COMPILING_AT_ONCE, TARGETS, Memory, compile_calls, free, select
from benchmarks.measure import measure
from benchmarks.records import Setting
from mlra_jax.ops import hopper
from mlra_jax.ops.decode import mosaic_gpu, mosaic_tpu, triton
from mlra_jax.ops.decode.api import Layout
from mlra_jax.ops.decode.arg_specs import ArgSpec, abstract_call
from mlra_jax.ops.decode.back_end import TUNED, DecodeKernel
from mlra_jax.ops.decode.mosaic_gpu.config import value_groups
from mlra_jax.ops.decode.triton.config import MAX_SPLITS
from mlra_jax.ops.tuning import Entry, distance, read_table, table_path, update, write_table

GAIN = 1.01
"""How many times faster than the heuristic's a configuration must be to be entered."""
TOLERANCE = 1e-2
"""Largest relative difference to plain XLA's output, in norm; bfloat16's is 2e-3."""
ROUNDS = 2


class Space:
    """Configurations of a back end for one call, around the heuristic's."""

    kernel: ClassVar[type[DecodeKernel[Any]]]
    layout: ClassVar[Layout] = "token_major"

    def __init__(self, spec: ArgSpec):
        self.shape = spec.shape

    def heuristic(self) -> Any:
        """Where the search starts."""
        return self.kernel().heuristic(self.shape)

    def fits(self, config: Any) -> bool:
        """Whether the device can run the call so."""
        raise NotImplementedError

    def changes(self, config: Any) -> list[list[Any]]:
        """For each property in turn, configurations that differ from this one in it."""
        raise NotImplementedError

    def neighbours(self, config: Any) -> list[list[Any]]:
        """Those of `changes` that fit."""
        return [[c for c in configs if self.fits(c)] for configs in self.changes(config)]


class MosaicGPUSpace(Space):
    """Configurations of the Mosaic GPU kernel."""

    kernel = mosaic_gpu.MosaicGPU

    def fits(self, config: mosaic_gpu.Config) -> bool:
        """See `Space.fits`."""
        return config.fits(self.shape)

    def changes(self, config: mosaic_gpu.Config) -> list[list[mosaic_gpu.Config]]:
        """See `Space.changes`."""
        shape, processors = self.shape, self.kernel().target()
        change = functools.partial(dataclasses.replace, config)
        tiles = lambda row_groups: shape.heads * -(-shape.rows // (hopper.ROWS * row_groups))
        one_each = lambda row_groups: max(1, processors // tiles(row_groups))
        groups = range(1, 4) if value_groups(shape) == 1 else (1,)
        groups = [n for n in groups if n == 1 or (n - 1) * hopper.ROWS < shape.rows]
        grouped = [change(row_groups=n, n_splits=1 if config.n_splits == 1 else one_each(n)) for n in groups]
        even = one_each(config.row_groups)
        splits = {n for n in (even, max(1, even - max(1, even // 32)), 2 * even) if n > 1}
        # A program for each sequence, with nothing to merge, needs about as many of them as there are processors.
        if tiles(config.row_groups) * shape.batch >= 0.5 * processors:
            splits.add(1)
        split = [change(n_splits=n, streams=1) for n in sorted(splits)]
        if config.row_groups == 1 and value_groups(shape) == 1:
            split.append(change(n_splits=2 * even, stages=2, streams=2))
        ring = [change(block=b, stages=s) for b, s in itertools.product((64, 128), range(2, 7))]
        return [grouped, split, ring]


class TritonSpace(Space):
    """Configurations of the Triton kernel."""

    kernel = triton.Triton

    def fits(self, config: triton.Config) -> bool:
        """See `Space.fits`."""
        return config.fits(self.shape, self.kernel().target())

    def changes(self, config: triton.Config) -> list[list[triton.Config]]:
        """See `Space.changes`."""
        change = functools.partial(dataclasses.replace, config)
        blocks = [
            change(block_rows=r, block_tokens=t)
            for r, t in itertools.product((16, 32, 64), (32, 64, 128))
            if r == 16 or r < 2 * self.shape.rows
        ]
        most = min(MAX_SPLITS, max(1, self.shape.capacity // config.block_tokens))
        splits = {config.splits // 2, config.splits - 1, config.splits + 1, 2 * config.splits, 1}
        if config.splits > 8:
            splits.discard(1)
        split = [change(splits=n) for n in sorted(splits) if 1 <= n <= most]
        depth = [change(warps=w, stages=s) for w, s in itertools.product((4, 8), range(1, 6))]
        return [blocks, split, depth]


class MosaicTPUSpace(Space):
    """Configurations of the Mosaic TPU kernel."""

    kernel = mosaic_tpu.MosaicTPU
    layout = "feature_major"

    def fits(self, config: mosaic_tpu.Config) -> bool:
        """See `Space.fits`."""
        return config.fits(self.shape, self.kernel().target())

    def changes(self, config: mosaic_tpu.Config) -> list[list[mosaic_tpu.Config]]:
        """See `Space.changes`."""
        change = functools.partial(dataclasses.replace, config)
        powers = [2**i for i in range(7, 15)]
        blocks = [change(block=n, step=min(config.step, n), tail=min(config.tail, n)) for n in powers]
        steps = [change(step=n) for n in powers]
        tails = [change(tail=n) for n in powers]
        return [blocks, steps, tails, [change(shares=n) for n in (1, 2)]]


SPACES: Mapping[str, type[Space]] = {
    "mosaic_gpu": MosaicGPUSpace,
    "triton": TritonSpace,
    "mosaic_tpu": MosaicTPUSpace,
}
"""What can be tuned, by the name of the back end."""


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
      space: one of `SPACES`, made for it.
      memory: to fill caches from.
      deadline: by `time.monotonic`.
    """

    def __init__(self, case: ArgSpec, space: Space, memory: Memory, deadline: float):
        self.case, self.space, self.deadline = case, space, deadline
        self.call = abstract_call(case)
        self.programs: dict[Any, tuple[Any, int]] = {}
        self.times: dict[Any, float] = {}
        start = self.compile(space.heuristic())
        self.args = memory.arguments(case, start[2], start[1])
        firsts, others, caches, rest = self.args
        xla = jax.jit(functools.partial(self.call, implementation="xla"))
        self.expected = jax.device_get(xla(firsts[0], *others, *caches[0], *rest))

    def compile(self, config: Any) -> tuple[Any, int, int]:
        """The program of a configuration, its calls and its buffers."""
        run, buffers, calls = compile_calls(
            self.case, functools.partial(self.call, implementation=self.space.kernel(config=config))
        )
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
        start = best = self.space.heuristic()
        self.times.update(self.time([start], 5))
        if start not in self.times:
            raise ValueError("the heuristic's configuration failed")
        for _ in range(ROUNDS):
            before = best
            for i in range(len(self.space.neighbours(best))):
                candidates = [c for c in self.space.neighbours(best)[i] if c not in self.times]
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
        case = dataclasses.replace(CASES[name], page_size=page, layout=SPACES[implementation].layout)
        sizes = case.shape.tuning_key
        entries = read_table(path)
        known = any(e.back_end == implementation and distance(e.sizes, sizes) == (0, 0) for e in entries)
        if known and not again:
            print(f"{name}: in the table", flush=True)
            continue
        if time.monotonic() > deadline:
            left.append(name)
            continue
        print(f"{name}:", flush=True)
        tuner = None
        try:
            tuner = Tuner(case, SPACES[implementation](case), memory, deadline)
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
    default = "mosaic_tpu" if jax.default_backend() == "tpu" else default
    parser = records.parser("benchmarks.tune_decode_attention", __doc__, out=False)
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="GLOB",
        help=f"names of cases (default: the benchmark's {len(TARGETS)})",
    )
    parser.add_argument(
        "--implementation", choices=list(SPACES), default=default, help="back end (default: %(default)s)"
    )
    parser.add_argument("--page", type=int, help="tokens of a page (default: a contiguous cache)")
    parser.add_argument("--again", action="store_true", help="measure also what the table holds already")
    parser.add_argument(
        "--limit-seconds", type=float, default=float("inf"), help="stop after this many seconds"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=TUNED, help="folder of the tables (default: that of the package)"
    )
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
