"""The training attention for Hopper GPUs: what it declines, its numbers, and what the compiler makes of it.

Numbers come from the interpreter, on the CPU and with JAX 0.11 or later, and from the GPU where there is one
(`MLRA_TEST_PLATFORM=cuda,cpu pytest tests/ops/test_attention_mosaic_gpu.py`).
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlra_jax.execution.topologies import gpu_devices
from mlra_jax.ops import hopper
from mlra_jax.ops.attention import causal_attention, causal_attention_parts
from mlra_jax.ops.attention.api import IMPLEMENTATIONS
from mlra_jax.ops.attention.mosaic_gpu import Config, MosaicGPU, kernel
from mlra_jax.ops.attention.mosaic_gpu.config import TILE, Shape
from mlra_jax.ops.dispatch import explain
from tests.ops.common import (
    H100,
    assert_no_races,
    compiles,
    interpreter,
    newer_jax,
    on_hopper,
    waits_left_out,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a call of `causal_attention_parts`."""

    t: int
    s: int | None = None  # as many as queries
    batch: int = 1
    heads: int = 1  # L
    m: int = 1
    widths: tuple[int, ...] = (64,)
    q_heads: tuple[int, ...] = ()  # of each part; () all of them
    k_heads: tuple[int, ...] = ()
    value: int | None = 64  # None: the first part of the key

    def abstract(self, dtype=jnp.bfloat16):
        """Parts, values, and the gradient of the output."""
        new = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
        b, t, s, everyone = self.batch, self.t, self.s or self.t, (self.heads,) * len(self.widths)
        q_heads, k_heads = self.q_heads or everyone, self.k_heads or everyone
        parts = [
            (new(b, t, q, self.m, w), new(b, s, k, w))
            for w, q, k in zip(self.widths, q_heads, k_heads, strict=True)
        ]
        v = None if self.value is None else new(b, s, self.heads, self.value)
        return parts, v, new(b, t, self.heads, self.m, self.value or self.widths[0])

    def draw(self, seed=0):
        """The same with values, alike for every seed."""
        rng = np.random.default_rng(seed)
        normal = lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32), x.dtype)
        return jax.tree.map(normal, self.abstract())

    @property
    def q_start(self):
        """The last query sees the last key."""
        return max((self.s or self.t) - self.t, 0)

    @property
    def scale(self):
        return 1.5 / np.sqrt(sum(self.widths))


LATENTS = {"widths": (128, 64), "q_heads": (4, 1), "k_heads": (4, 1), "value": None, "heads": 4}
PAPER = {  # the 2.9 B models: what their attention calls
    "mlra_4": Case(2048, m=24, **LATENTS),
    "mlra_2": Case(2048, m=12, **{**LATENTS, "q_heads": (4, 2)}),
    "mla": Case(2048, heads=24, widths=(128, 64), k_heads=(24, 1), value=128),
    "gqa": Case(2048, heads=12, m=2, widths=(128,), value=128),
}


def with_gradients(attend, case):
    """A compiled function of parts, values and the output's gradient: the output and all their gradients."""

    @jax.jit
    def run(parts, v, d_out, q_start):
        call = functools.partial(attend, scale=case.scale, q_start=q_start)
        out, pullback = jax.vjp(call, parts, v)
        return out, pullback(d_out)

    return run


# What it declines


@pytest.mark.parametrize(
    ("case", "dtype", "message"),
    [
        (PAPER["mlra_4"], jnp.float32, "take bfloat16; got float32"),
        (Case(64, widths=(96,)), jnp.bfloat16, "got 96 and 64"),
        (Case(64, widths=(64, 16)), jnp.bfloat16, r"got 64 \+ 16 and 64"),
        (Case(64, widths=(128, 128)), jnp.bfloat16, r"192 in all.*got 128 \+ 128 and 64"),
        (Case(64, value=32), jnp.bfloat16, "values of 64 or 128; got 64 and 32"),
        (Case(64, widths=(32, 64), value=None), jnp.bfloat16, r"got 32 \+ 64 and 32"),
    ],
    ids=str,
)
@newer_jax
def test_it_says_why_it_declines_a_call(compiled_for, case, dtype, message):
    compiled_for(H100)
    parts, v, _ = case.abstract(dtype)
    reasons = explain(causal_attention_parts, parts, v, scale=case.scale)["causal_attention"]
    assert re.search(message, reasons["mosaic_gpu"])


@pytest.mark.parametrize("device", [("cpu", "cpu"), ("NVIDIA A100-SXM4-40GB", "gpu"), ("Tesla T4", "gpu")])
def test_it_is_for_hopper_alone(compiled_for, device):
    compiled_for(*device)
    parts, v, _ = PAPER["mlra_4"].abstract()
    reason = explain(causal_attention_parts, parts, v, scale=1.0)["causal_attention"]["mosaic_gpu"]
    assert reason == f"the Mosaic GPU kernel runs on Hopper GPUs; this is a {device[0]}."


def test_before_jax_0_11_it_says_what_it_needs(monkeypatch, compiled_for):
    compiled_for(H100)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    parts, v, _ = PAPER["gqa"].abstract()
    reason = explain(causal_attention_parts, parts, v, scale=1.0)["causal_attention"]["mosaic_gpu"]
    assert "needs JAX 0.11 or later, which needs Python 3.12" in reason


def test_asked_for_by_name_it_fails_rather_than_fall_back():
    q, k, v = (jnp.zeros((1, 8, 1, 64), jnp.bfloat16) for _ in range(3))
    with pytest.raises(NotImplementedError, match="runs on Hopper GPUs; this is a cpu"):
        causal_attention(q, k, v, scale=1.0, implementation="mosaic_gpu")


# How it cuts the work


@settings(max_examples=50, deadline=None)
@given(t=st.integers(1, 70_000), m=st.integers(1, 24), heads=st.integers(1, 24), batch=st.integers(1, 8))
def test_the_heuristic_gives_every_program_whole_tiles_and_every_share_some(t, m, heads, batch):
    padded = -(-t // TILE) * TILE
    shape = Shape(batch, heads, (heads, 1), (heads, 1), (128, 64), 128, True, m, padded, padded, t)
    config = Config.heuristic(shape, 132)
    tiles = padded // hopper.ROWS * m
    assert tiles % config.row_groups == 0
    assert 1 <= config.dk_shares <= tiles
    if config.dk_shares > 1:  # split only as far as the processors would else have no work
        assert config.dk_shares * padded // TILE * heads * batch <= 12 * 132


# Numbers


def check_numbers(results, case, arrays, q_start):
    """As close to float32 as bfloat16 allows."""
    exact = with_gradients(IMPLEMENTATIONS["reference"], case)
    expected = exact(*jax.tree.map(lambda x: x.astype(jnp.float32), arrays), q_start)
    for ours, exact in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == jnp.bfloat16
        difference = np.asarray(ours, np.float32) - np.asarray(exact)
        assert np.linalg.norm(difference) < 5e-3 * np.linalg.norm(exact)


@functools.cache
def interpreted(case, config, races):
    """The kernels on the CPU: output and gradients."""
    return with_gradients(MosaicGPU(config=config, interpret=interpreter(races)), case)


def check_interpreted(case, config=None, q_start=None, races=False, seed=0):
    """Checks the numbers, and that threads wait for each other's memory."""
    arrays = case.draw(seed)
    q_start = case.q_start if q_start is None else q_start
    results = jax.block_until_ready(interpreted(case, config, races)(*arrays, q_start))
    if races:
        assert_no_races()
    check_numbers(results, case, arrays, q_start)


TINY = {"widths": (64, 32), "value": None, "heads": 2}
INTERPRETED = {
    "latents of two heads and a shared key": (Case(20, m=8, q_heads=(2, 1), k_heads=(2, 1), **TINY), None),
    "queries of half the heads": (
        Case(70, m=1, **{**TINY, "heads": 4}, q_heads=(4, 2), k_heads=(4, 1)),
        Config(2, 64, 2, 64, 2, 2, 2),
    ),
    "own values, three rows a key": (Case(45, batch=2, m=3), Config(3, 128, 2, 64, 2, 2, 1)),
    "wide own values": (
        Case(140, widths=(32,), value=128, heads=2, k_heads=(1,)),
        Config(1, 64, 2, 128, 2, 2, 4),
    ),
    "keys before the queries": (Case(40, 300, m=2, k_heads=(1,)), Config(2, 64, 3, 64, 2, 2, 1)),
    "shared queries": (Case(130, 200, heads=2, q_heads=(1,)), None),
    "fewer keys than queries": (Case(100, 70, widths=(64, 32), value=None), Config(1, 128, 2, 64, 2, 2, 1)),
}


@newer_jax
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_output_and_gradients_without_races(name):
    check_interpreted(*INTERPRETED[name], races=True)


@newer_jax
@settings(max_examples=8, deadline=None)
@given(q_start=st.integers(0, 300), seed=st.integers(0, 9))
@example(161, 0)
@example(2**31 - 200, 0)
def test_interpreted_output_and_gradients_wherever_the_queries_stand(q_start, seed):
    check_interpreted(Case(40, 200), Config(2, 64, 2, 64, 2, 2, 3), q_start, seed=seed)


@newer_jax
@settings(max_examples=2, deadline=None, phases=[Phase.generate])
@given(
    t=st.integers(16, 140),
    before=st.integers(0, 140),
    m=st.sampled_from([1, 2]),
    shares=st.integers(1, 5),
    block=st.sampled_from([64, 128]),
)
def test_interpreted_output_and_gradients_of_any_length(t, before, m, shares, block):
    check_interpreted(Case(t, before + t, m=m), Config(2, block, 2, block, 2, 2, shares), seed=t)


@newer_jax
def test_the_interpreter_sees_a_wait_that_is_left_out(monkeypatch):
    of_ring = lambda barrier: barrier.ref.shape == (3,)
    with waits_left_out(monkeypatch, kernel, [kernel.attend, kernel.gradients], of_ring):
        check_interpreted(Case(250), Config(2, 64, 3), races=True)  # more blocks than stages


@on_hopper
@pytest.mark.parametrize("config", [None, Config(2, 128, 2, 64, 2, 2, 3)], ids=str)
@pytest.mark.parametrize("name", PAPER)
def test_numbers_on_the_gpu(name, config):
    case = dataclasses.replace(PAPER[name], t=500, batch=2)
    run = with_gradients(MosaicGPU(config=config), case)
    arrays = case.draw()
    results = run(*arrays, 0)
    check_numbers(results, case, arrays, 0)
    for again, first in zip(*map(jax.tree.leaves, (run(*arrays, 0), results)), strict=True):
        np.testing.assert_array_equal(again, first)  # the same bits from run to run


@on_hopper
def test_numbers_on_the_gpu_of_queries_after_others():
    case = dataclasses.replace(PAPER["mlra_4"], t=300, s=700)
    arrays = case.draw()
    for q_start in (400, 430, 2000):
        results = with_gradients(MosaicGPU(), case)(*arrays, q_start)
        check_numbers(results, case, arrays, q_start)


# Compiled ahead of time


def compile_all():
    """Run in a process of its own, whose output holds what `ptxas` says of each kernel."""
    mesh = Mesh(np.array(gpu_devices(H100)), ("x",), axis_types=(AxisType.Explicit,))
    attend = functools.partial(causal_attention_parts, implementation="mosaic_gpu")
    with jax.set_mesh(mesh):
        for case in PAPER.values():
            whole = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))
            with_gradients(attend, case).lower(*jax.tree.map(whole, case.abstract()), 0).compile()


@compiles
def test_compiled_for_h100_next_to_nothing_spills(said_by_ptxas):
    said = said_by_ptxas(__file__)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) >= 3 * len(PAPER)  # output, gradients of queries, gradients of keys
    assert max(registers) <= 232
    *spills, most = sorted(int(n) for n in re.findall(r"stack frame, (\d+) bytes spill stores", said))
    assert spills[-1] <= 128
    assert most <= 1536  # MLA's keys with values of their own: sums of 320 features a key


@compiles
def test_compiled_for_four_h100_inside_shard_map():
    mesh = Mesh(np.array(gpu_devices(H100, 4)), ("tensor",), axis_types=(AxisType.Explicit,))
    case = PAPER["mlra_4"]
    queries, whole = P(None, None, None, "tensor"), P()  # each device has some of the heads, and every latent
    specs = [(queries, whole), (queries, whole)]
    attend = functools.partial(causal_attention_parts, implementation="mosaic_gpu", scale=case.scale)
    mapped = jax.shard_map(lambda parts: attend(parts, None), in_specs=(specs,), out_specs=queries)

    def loss(parts):
        return jnp.sum(mapped(parts).astype(jnp.float32))

    with jax.set_mesh(mesh):
        put = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        parts = jax.tree.map(put, case.abstract()[0], specs)
        program = jax.jit(jax.grad(loss)).lower(parts).compile().as_text()
    assert len(re.findall(r'custom_call_target="mosaic_gpu_v2"', program)) == 3
    assert "all-reduce" in program  # the latents' gradients, over all heads
