"""The commands that measure and tune decode attention, on the CPU: what they read off a profile, search and write."""

import dataclasses
import functools
import importlib.util
import json
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import decode_attention as bench
from benchmarks import tune_decode_attention as tuner
from benchmarks.measure import (
    L2_BYTES,
    Timing,
    gpu_events,
    measure,
    rotation,
    split_runs,
    sum_mosaic,
    sum_xla,
)
from mlra_jax.execution.topologies import gpu_devices
from mlra_jax.ops import device
from mlra_jax.ops.back_end import Kernel
from mlra_jax.ops.decode import mosaic_gpu, xla
from mlra_jax.ops.decode.arg_specs import ArgSpec, abstract_call
from mlra_jax.ops.decode.shape import Shape
from mlra_jax.ops.tuning import read_table
from tests.ops.common import make_call

TINY = "tiny 2x256"
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def few_calls(monkeypatch):
    """Programs of two calls."""
    monkeypatch.setattr(bench, "PROGRAM_US", 0.0)


# Measuring


def test_runs_are_told_apart_by_the_longest_pauses_and_last_until_their_last_kernel_ends():
    first = [(0, 10), (12, 30), (13, 20)]  # kernels may overlap
    second = [(1000, 1010), (1060, 1070)]
    third = [(3000, 3001)]
    assert split_runs(first + second + third, 3) == [(0, 30), (1000, 1070), (3000, 3001)]
    assert split_runs(first, 1) == [(0, 30)]


def test_events_are_those_of_the_streams_of_gpus_by_start():
    event = lambda name, start, length: SimpleNamespace(name=name, start_ns=start, duration_ns=length)
    line = lambda name, *events: SimpleNamespace(name=name, events=events)
    plane = lambda name, *lines: SimpleNamespace(name=name, lines=lines)
    profile = SimpleNamespace(
        planes=[
            plane("/host:CPU", line("Stream", event("a", 0, 1))),
            plane(
                "/device:GPU:0",
                line("Steps", event("b", 0, 1)),
                line("Stream #14(Compute)", event("late", 30, 2), event("early", 10, 5)),
                line("Stream #15(Compute)", event("other", 20, 1)),
            ),
        ]
    )
    assert gpu_events(profile) == [(10, 15, "early"), (20, 21, "other"), (30, 32, "late")]


def test_more_than_the_cache_holds_is_read_between_two_uses_of_a_buffer():
    for size in (10**6, 5 * 10**7, 10**8, 10**10):
        buffers, calls = rotation(size, 1500.0)
        assert buffers >= 2
        assert calls % buffers == 0
        assert (buffers - 1) * size >= L2_BYTES
    assert rotation(10**10, 1500.0) == (2, 2)  # as few as that needs


def test_time_of_a_call_is_the_program_s_over_its_calls_by_the_host_s_clock_where_there_is_no_gpu():
    timing = measure(lambda x: time.sleep(0.02), (jnp.zeros(1),), calls=4, runs=3)
    assert timing.clock == "wall"
    assert 5000 <= timing.us < 10000


def test_a_read_reads_it_all():
    x = jnp.arange(2 * 8 * 512, dtype=jnp.int32).reshape(2, 8, 512)
    assert sum_xla(x, jnp.array([0], jnp.int32)) == np.arange(2 * 8 * 512).sum()


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11) or not importlib.util.find_spec("jax_cuda13_plugin"),
    reason="needs JAX 0.11 or later and its CUDA 13 plugin",
)
def test_the_reader_for_hopper_compiles():
    mesh = Mesh(np.array(gpu_devices(H100)), ("x",), axis_types=(AxisType.Explicit,))
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((3072, 8, 512), jnp.int32, sharding=whole)
    seed = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=whole)
    with jax.set_mesh(mesh):
        compiled = jax.jit(functools.partial(sum_mosaic, processors=132)).lower(x, seed).compile()
    assert "mosaic_gpu" in compiled.as_text()


# The benchmark


def test_every_target_names_a_case_and_goals_are_no_higher_than_floors():
    assert set(bench.TARGETS) <= set(bench.CASES)
    for target in bench.TARGETS.values():
        if target.goal is not None:
            assert target.goal <= target.floor <= target.theirs


def test_cases_are_chosen_by_pattern_and_an_unknown_one_is_refused():
    assert bench.select(["gqa 1x*M", "gqa 1x2M"], quick=False) == ["gqa 1x1M", "gqa 1x2M"]
    assert bench.select(None, quick=False) == list(bench.TARGETS)
    assert set(bench.select(None, quick=True)) < set(bench.TARGETS)
    with pytest.raises(ValueError, match="No case is like 'gqaa'; there are mlra_4 1x128K, "):
        bench.select(["gqaa"], quick=False)


@pytest.mark.parametrize(
    ("us", "clock", "kind", "verdict"),
    [
        (22.0, "device", H100, "PASS, goal"),
        (26.0, "device", H100, "PASS, floor"),
        (26.1, "device", H100, "MISS"),
        (22.0, "wall", H100, ""),
        (22.0, "device", "NVIDIA L4", ""),
    ],
)
def test_the_verdict_is_by_goal_and_floor_on_the_device_that_they_are_for(us, clock, kind, verdict):
    timing = Timing(us, 0.0, {}, clock)
    assert bench.judge(timing, timing, bench.TARGETS["mlra_4 1x128K"], kind) == verdict


def test_a_goal_may_be_a_multiple_of_the_reader_s_time():
    verdict = lambda us: bench.judge(
        Timing(us, 0.0, {}, "device"), Timing(100.0, 0.0, {}, "device"), bench.Target(over_read=1.08), H100
    )
    assert [verdict(108.0), verdict(108.2)] == ["PASS, goal", "MISS"]


@pytest.mark.parametrize(
    "case",
    [
        ArgSpec((128, 70), rows=8, width=64, rope=32, page_size=64),
        ArgSpec((128, 70), rows=8, width=64, rope=0, q_len=2),
        ArgSpec((128,), heads=2, rows=4, width=64, rope=0, value=64),
    ],
)
def test_a_program_calls_the_op_with_queries_of_each_call_over_the_buffers_in_turn(case, monkeypatch):
    monkeypatch.setattr(bench, "rotation", lambda *_: (2, 4))
    program = bench.prepare(case, ["triton", "xla"])
    assert (program.implementation, program.buffers, program.calls) == ("xla", 2, 4)
    args = bench.Memory(2**12).arguments(case, 2, 4)
    firsts, others, caches, rest = args
    caches[1] = [x + 1 for x in caches[1]]
    call = abstract_call(case)
    for i, (out, lse) in enumerate(program.run(firsts, others, caches, rest)):
        expected = call(firsts[i], *others, *caches[i % 2], *rest, implementation="xla")
        np.testing.assert_allclose(np.float32(out), np.float32(expected[0]), atol=2e-2)
        np.testing.assert_allclose(lse, expected[1], atol=1e-3)
    assert np.array_equal(rest[0], make_call(case).args[-2])


def test_the_command_prints_and_writes_a_row_for_each_case(tmp_path, capsys):
    argv = ["--cases", TINY, "--implementation", "xla", "--quick", "--out", str(tmp_path)]
    assert bench.main(argv) == 0
    stem = "decode_attention_cpu_xla"
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"{stem}.json", f"{stem}.md"]
    written = json.loads((tmp_path / f"{stem}.json").read_text())
    [row] = written["rows"]
    assert row["case"] == TINY
    assert row["bytes"] == 2 * 256 * 96 * 2
    assert row["ratio"] == row["timing"]["us"] / row["read"]["us"]
    assert written["versions"]["jax"] == jax.__version__
    assert written["command"].startswith("python -m benchmarks.decode_attention --cases 'tiny 2x256' ")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {TINY}"))
    assert line in (tmp_path / f"{stem}.md").read_text().splitlines()


def test_a_case_that_cannot_be_measured_is_reported_beside_the_others(tmp_path, monkeypatch):
    monkeypatch.setitem(bench.CASES, "no", ArgSpec((256,), rows=8, width=64))
    monkeypatch.setattr(bench, "prepare", refuse_64(bench.prepare))
    assert bench.main(["--cases", "no", TINY, "--quick", "--out", str(tmp_path)]) == 1
    written = json.loads((tmp_path / "decode_attention_cpu.json").read_text())
    assert written["failures"] == {"no": "RuntimeError: out of memory"}
    assert [r["case"] for r in written["rows"]] == [TINY]


def refuse_64(prepare):
    def refuse(case, implementations):
        if case.rope == 64:
            raise RuntimeError("out of memory\nand more")
        return prepare(case, implementations)

    return refuse


# Tuning


@dataclasses.dataclass(frozen=True)
class Config:
    """Of a back end that is plain XLA, and faster the nearer it is to n = 5 and depth = 3."""

    n: int = 1
    depth: int = 1

    @property
    def us(self):
        return 10.0 + abs(self.n - 5) + abs(self.depth - 3)


class Fake(Kernel):
    """Plain XLA, and faster the nearer its configuration is to n = 5 and depth = 3."""

    name = "fake"

    def check(self, args):
        if self.config.n == 4:
            raise NotImplementedError("4 is too many")

    def heuristic(self, shape):
        return Config()

    def run(self, shape, config, args):
        FakeSpace.tried.append(config)
        out, lse = xla.decode_attention(args)
        return out + (config == FakeSpace.wrong), lse


class FakeSpace(tuner.Space):
    kernel = Fake
    tried: list
    wrong = Config(5, 3)
    """Nearest, but of another output."""

    def fits(self, config):
        return True

    def changes(self, config):
        change = lambda **fields: dataclasses.replace(config, **fields)
        return [[change(n=n) for n in (1, 4, 5, 6)], [change(depth=d) for d in (1, 2, 3)]]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Runs the command with the back end above, timed by what its configuration says; gives the table's entries."""
    FakeSpace.tried = []
    configs = {}
    compile_with = tuner.Tuner.compile

    def compile_and_remember(self, config):
        program = compile_with(self, config)
        configs[id(program[0])] = config
        return program

    monkeypatch.setattr(tuner.Tuner, "compile", compile_and_remember)
    monkeypatch.setattr(
        tuner, "measure", lambda run, *_, **__: Timing(configs[id(run)].us, 0.0, {}, "device")
    )
    monkeypatch.setattr(tuner, "SPACES", {"fake": FakeSpace})

    def run(*argv):
        code = tuner.main(["--implementation", "fake", "--out", str(tmp_path), *argv])
        return code, read_table(tmp_path / "cpu.json")

    return run


def test_the_fastest_configuration_that_runs_and_is_right_is_entered(fake):
    code, [entry] = fake("--cases", TINY)
    assert code == 0
    # (5, 3) is wrong, and 4 does not run.
    assert entry.config in ({"n": 5, "depth": 2}, {"n": 6, "depth": 3})
    assert (entry.us, entry.heuristic_us) == (11.0, Config().us)
    assert entry.sizes == bench.CASES[TINY].shape.tuning_key
    assert FakeSpace.wrong in FakeSpace.tried


def test_where_nothing_is_faster_by_one_percent_the_heuristic_is_entered(fake, monkeypatch):
    monkeypatch.setattr(Config, "us", property(lambda self: 1000.0 - self.depth))
    _, [entry] = fake("--cases", TINY)
    assert (entry.config, entry.us) == (None, 999.0)


def test_what_the_table_holds_is_kept_and_not_measured_again_unless_asked(fake, capsys):
    fake("--cases", TINY)
    FakeSpace.tried.clear()
    assert len(fake("--cases", TINY)[1]) == 1
    assert FakeSpace.tried == []
    assert f"{TINY}: in the table" in capsys.readouterr().out
    assert len(fake("--cases", TINY, "--page", "64", "--again")[1]) == 1
    assert FakeSpace.tried


def test_after_the_time_limit_cases_are_left_and_named(fake, capsys):
    code, entries = fake("--cases", TINY, "--limit-seconds", "0")
    assert (code, entries) == (1, ())
    assert f"; left: {TINY}" in capsys.readouterr().out


def test_a_broken_table_is_refused_before_anything_is_measured(fake, tmp_path, capsys):
    (tmp_path / "cpu.json").write_text("{")
    with pytest.raises(SystemExit):
        fake("--cases", TINY)
    assert "cpu.json is not a table of tuned configurations" in capsys.readouterr().err
    assert FakeSpace.tried == []


@pytest.mark.parametrize("back_end", ["mosaic_gpu", "triton", "mosaic_tpu"])
@pytest.mark.parametrize("case", [*bench.TARGETS, TINY])
def test_the_search_starts_at_what_fits_and_goes_where_it_fits(back_end, case, compiled_for, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", max(jax.__version_info__, (0, 11)))
    compiled_for(H100)
    tpu = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5E, 1)
    monkeypatch.setattr(device, "tpu_info", lambda: tpu)
    space = tuner.SPACES[back_end](bench.CASES[case])
    start = space.heuristic()
    neighbours = space.neighbours(start)
    assert len({c for cs in neighbours for c in cs}) >= 3
    assert all(space.fits(c) for cs in neighbours for c in [start, *cs])


@pytest.mark.parametrize(
    "case",
    [
        ArgSpec((128, 128), heads=2, rows=8, q_len=3, page_size=64),
        ArgSpec((128,), rows=8, rope=0),
        ArgSpec((128, 128), heads=2, rows=8, rope=0, value=64),
    ],
)
def test_the_table_knows_a_case_by_what_the_back_end_asks_for(case):
    shapes = []

    class Asked(mosaic_gpu.MosaicGPU):
        def check(self, args):
            shapes.append(Shape.of(args))
            raise NotImplementedError

    call = abstract_call(case)
    with pytest.raises(NotImplementedError):
        jax.eval_shape(functools.partial(call, implementation=Asked()), *call.args)
    assert shapes == [case.shape]
