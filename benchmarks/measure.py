"""Device time of compiled programs, and of plain memory reads."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.profiler import ProfileData

PAUSE_S = 2e-3
"""Pause between runs, longer than any inside one, so that a profile shows where each begins."""
L2_BYTES = 64 * 1024**2
"""More than the L2 cache of any GPU here (50 MB, H100)."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Time of one of a program's many calls."""

    us: float
    """Median over runs of the program: from its first kernel's start to its last one's end, per call."""
    spread_us: float
    """Slowest run minus fastest."""
    kernels: dict[str, float]
    """Time per call by kernel, in us. The sum differs from `us` where kernels overlap or leave gaps."""
    clock: str
    """`device`: from a profile of the first GPU; `wall`: the host's clock, if the profile shows no GPU."""


def measure(program: Callable[..., Any], args: Sequence[Any], *, calls: int, runs: int) -> Timing:
    """Times each of the equal calls that a compiled program makes.

    Args:
      program: compiled program.
      args: its arguments, on the device.
      calls: number of calls that it makes.
      runs: timed runs of the program, after one that is not timed.
    """
    jax.block_until_ready(program(*args))
    wall = []

    def run_all() -> None:
        for _ in range(runs):
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            wall.append(time.perf_counter() - start)

    events = trace(run_all)
    if not events:
        us = [1e6 * w / calls for w in wall]
        return Timing(statistics.median(us), max(us) - min(us), {}, "wall")
    spans = split_runs([(start, end) for start, end, _ in events], runs)
    us = [(end - start) / 1e3 / calls for start, end in spans]
    kernels: dict[str, float] = collections.defaultdict(float)
    for start, end, name in events:
        kernels[name] += (end - start) / 1e3 / calls / runs
    return Timing(statistics.median(us), max(us) - min(us), dict(kernels), "device")


def trace(call: Callable[[], object]) -> list[tuple[float, float, str]]:
    """The `gpu_events` of a call; empty if the profile shows no GPU."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            call()
        [file] = pathlib.Path(folder).rglob("*.xplane.pb")
        return gpu_events(ProfileData.from_file(str(file)))


def kernel_ops(hlo: str) -> dict[str, str]:
    """The operation that each kernel comes from: XLA names a kernel after its instruction, whose metadata name it."""
    named = re.findall(r"%([\w.-]+) = .*?op_name=\"([^\"]*)\"", hlo)
    return {re.sub(r"\W", "_", name): op for name, op in named}


def gpu_events(profile: ProfileData) -> list[tuple[float, float, str]]:
    """Start and end, in ns, and name of the kernels on the streams of the first GPU, by start.

    With several GPUs any one shows the time: waiting for others is part of its collectives.
    """
    for plane in sorted((p for p in profile.planes if "GPU" in p.name), key=lambda p: p.name):
        events = [
            (event.start_ns, event.start_ns + event.duration_ns, event.name)
            for line in plane.lines
            if "Stream" in line.name
            for event in line.events
        ]
        if events:
            return sorted(events)
    return []


COMPILING_AT_ONCE = 8
T = TypeVar("T")


def attempt(job: Callable[[], T]) -> T | Exception:
    """Returns a job's result or its exception: a case that does not compile, or fit, must not lose the others."""
    try:
        return job()
    except Exception as e:
        return e


def together(jobs: Sequence[Callable[[], T]]) -> list[T | Exception]:
    """Runs `attempt` on compile jobs, several at once; nothing is timed meanwhile."""
    with concurrent.futures.ThreadPoolExecutor(COMPILING_AT_ONCE) as pool:
        return list(pool.map(attempt, jobs))


def split_runs(intervals: Sequence[tuple[float, float]], runs: int) -> list[tuple[float, float]]:
    """Start and end of each run, given all kernels' by start: the longest pauses are those between runs."""
    ends: list[float] = []  # running maximum: kernels may overlap
    for _, end in intervals:
        ends.append(max(end, ends[-1] if ends else end))
    pauses = sorted(range(1, len(intervals)), key=lambda i: intervals[i][0] - ends[i - 1])
    first = [0, *sorted(pauses[len(pauses) - runs + 1 :])]
    return [(intervals[i][0], ends[j - 1]) for i, j in zip(first, [*first[1:], len(intervals)], strict=True)]


def rotation(size: int, microseconds: float) -> tuple[int, int]:
    """The number of buffers to rotate, and of calls that use them, in one program.

    Args:
      size: bytes of a buffer. Between two uses of one, more than the L2 cache holds is read: at least two buffers.
      microseconds: target duration of the program at 2.5 TB/s, in at most 100 calls.
    """
    buffers = 1 + max(1, -(-L2_BYTES // size))
    calls = min(100, microseconds / (size / 2.5e6 + 5))
    buffers = min(buffers, max(2, round(calls)))
    return buffers, max(1, round(calls / buffers)) * buffers


def sum_xla(x: jax.Array, seed: jax.Array) -> jax.Array:
    """Reads x by XLA's sum; int32 [blocks, UNROLL, WIDTH]."""
    return jnp.sum(x ^ seed)


UNROLL, WIDTH = 8, 512
"""Loads that a warpgroup has in flight, and int32 of each: 16 bytes for each of its 128 threads."""


def sum_mosaic(x: jax.Array, seed: jax.Array, *, processors: int) -> jax.Array:
    """Reads x by a Pallas Mosaic GPU kernel of plain vector loads, two programs of four warpgroups a processor."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    programs, warpgroups = 2 * processors, 4
    workers = programs * warpgroups
    layout = plgpu.Layout.WG_STRIDED((WIDTH,), WIDTH // 128)

    def kernel(x_ref: Any, seed_ref: Any, out_ref: Any) -> None:
        me = lax.axis_index("program") * warpgroups + lax.axis_index("wg")

        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            block = i * workers + me
            rows = [plgpu.load(x_ref.at[block, u], layout=layout, optimized=False) for u in range(UNROLL)]
            return functools.reduce(jnp.add, rows, total)

        rounds = lax.div(x.shape[0] - me + (workers - 1), workers)
        zero = plgpu.layout_cast(jnp.zeros((WIDTH,), jnp.int32), layout)
        total = lax.fori_loop(0, rounds, add, zero)

        @pl.when(seed_ref[0] < 0)  # it never is, which the compiler does not know
        def _() -> None:
            out_ref[...] = total

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((WIDTH,), jnp.int32),
        grid=(programs,),
        grid_names=("program",),
        num_threads=warpgroups,
        thread_name="wg",
        kernel_name="read",
    )(x, seed)
