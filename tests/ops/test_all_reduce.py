"""Sums over devices: specification, workspaces, what the kernels decline, their protocol, and their compiled code.

The kernels themselves run on GPUs alone (`MLRA_TEST_PLATFORM=cuda,cpu pytest tests/ops/test_all_reduce.py`): the
interpreter of Mosaic GPU has no memory of other devices and takes no PTX, in which the words are written and read.
What can go wrong between devices is therefore tested of a model of the protocol, in any order of events.
"""

import dataclasses
import functools
import importlib.util
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from benchmarks.tensor_parallel import greedy
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.config import MeshConfig, ModelConfig
from mlra_jax.execution.topologies import described_devices, gpu_devices
from mlra_jax.generation.engine import Engine
from mlra_jax.model import Transformer, to_decode
from mlra_jax.ops import device
from mlra_jax.ops.all_reduce import Workspace, all_reduce, all_reduce_add_rms_norm
from mlra_jax.ops.dispatch import choose, explain
from mlra_jax.sharding import MESH_AXES, AxisRules, decode_rules, make_mesh

H100 = "NVIDIA H100 80GB HBM3"
newer_jax = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs JAX 0.11 or later")
compiles = pytest.mark.skipif(
    jax.__version_info__ < (0, 11) or not importlib.util.find_spec("jax_cuda13_plugin"),
    reason="needs JAX 0.11 or later and its CUDA 13 plugin",
)


def two_gpus(test):
    """Needs two GPUs of one host."""
    there = [d for d in jax.devices() if d.platform == "gpu"]
    return pytest.mark.gpu(pytest.mark.skipif(len(there) < 2, reason="needs two GPUs")(test))


def on_devices(devices, op, *args, **options):
    """`op` of arguments [P, ...], of each device its own; its results, the same."""

    def on_one(*args):
        return jax.tree.map(lambda a: a[None], op(*(a[0] for a in args), axis="x", **options))

    with jax.set_mesh(Mesh(np.array(devices), ("x",))):
        return jax.jit(jax.shard_map(on_one, in_specs=jax.P("x"), out_specs=jax.P("x"), check_vma=False))(
            *args
        )


# The specification


@settings(max_examples=8, deadline=None)
@given(
    devices=st.sampled_from([1, 2, 8]),
    rows=st.lists(st.integers(1, 3), max_size=2),
    width=st.integers(1, 20),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    seed=st.integers(0, 99),
)
def test_the_reference_sums_over_devices_adds_and_normalises(devices, rows, width, dtype, seed):
    rng, shape = np.random.default_rng(seed), (*rows, width)
    y = rng.integers(-8, 9, (devices, *shape)).astype(np.float32)  # whose sums are exact
    x, gain = rng.normal(size=shape).astype(np.float32), rng.normal(size=width).astype(np.float32)
    same = lambda a: np.broadcast_to(a, (devices, *a.shape))
    run = functools.partial(on_devices, jax.devices()[:devices])
    np.testing.assert_array_equal(run(all_reduce, y), same(y.sum(axis=0)))
    total, h = run(all_reduce_add_rms_norm, same(x), y, same(gain), eps=1e-5, dtype=dtype)
    assert (total.dtype, h.dtype) == (jnp.float32, dtype)
    sums = x + np.float64(y.sum(axis=0).astype(dtype))
    np.testing.assert_allclose(total, same(sums), rtol=1e-6, atol=1e-6)
    normed = sums / np.sqrt((sums**2).mean(axis=-1, keepdims=True) + 1e-5) * gain
    np.testing.assert_allclose(
        np.float32(h), same(normed), rtol={4: 1e-5, 2: 8e-3}[h.dtype.itemsize], atol=1e-6
    )


# Where there is a workspace


@dataclasses.dataclass(frozen=True)
class Gpu:
    """As much of a device as a workspace looks at."""

    id: int
    process_index: int = 0
    platform: str = "gpu"


def mesh_of(devices, data=1, context=1):
    return Mesh(np.array(devices, object).reshape(data, 1, -1, context), MESH_AXES)


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        (mesh_of([Gpu(0, platform="cpu"), Gpu(1, platform="cpu")]), decode_rules()),
        (mesh_of([Gpu(0)]), decode_rules()),
        (mesh_of([Gpu(i) for i in range(16)]), decode_rules()),
        (mesh_of([Gpu(0), Gpu(1, process_index=1)]), decode_rules()),
        (mesh_of([Gpu(1), Gpu(0)]), decode_rules()),
        (mesh_of([Gpu(0), Gpu(1)], context=2), decode_rules()),
        (mesh_of([Gpu(0), Gpu(1)]), AxisRules()),
        # Sums over other devices than those that the workspace connects.
        (mesh_of([Gpu(0), Gpu(1)]), AxisRules.of(kv_head_shards="tensor", mlp="context", vocab="tensor")),
        (mesh_of([Gpu(0), Gpu(1)]), AxisRules.of(kv_head_shards="tensor", mlp="tensor")),
        (mesh_of([Gpu(0), Gpu(1)]), decode_rules(split_heads=False, split_tokens=True)),  # W_o is whole
        (
            mesh_of([Gpu(0), Gpu(1)]),
            AxisRules.of(kv_head_shards="tensor", mlp="tensor", vocab="tensor", heads="context"),
        ),
    ],
)
def test_there_is_no_workspace_where_no_kernel_could_use_it(mesh, rules):
    assert Workspace.shapes(mesh, rules, 3072) is None


@compiles
def test_a_workspace_is_for_the_gpus_of_one_host():
    mesh = make_mesh(MeshConfig(1, 1, 2, 1), described_devices("h100:2"))
    for rules in (decode_rules(), decode_rules(split_heads=False), decode_rules(split_tokens=True)):
        workspace = Workspace.shapes(mesh, rules, 3072)
        assert (workspace.rows, workspace.width) == (64, 3072)
        assert workspace.epochs.shape == (2, 64)
        assert workspace.words.shape == (2, 2, 2, 64, 2 * 3072)
        on_each = [a.sharding.shard_shape(a.shape)[0] for a in jax.tree.leaves(workspace)]
        assert on_each == [1, 1]
    mesh = make_mesh(MeshConfig(2, 1, 2, 1), described_devices("h100:4"))
    assert Workspace.shapes(mesh, decode_rules(), 3072).epochs.shape == (2, 64)
    mesh = make_mesh(MeshConfig(2, 1, 4, 1), described_devices("h100:2x4"))
    assert Workspace.shapes(mesh, decode_rules(), 3072) is None


def test_where_there_is_none_none_is_made():
    mesh = make_mesh(MeshConfig(1, 1, 2, 1), jax.devices()[:2])
    assert Workspace.create(mesh, decode_rules(), 256) is None


# What the kernels decline

WORKSPACE = Workspace(np.zeros((1, 64), np.int32), np.zeros((1, 2, 2, 64, 2 * 3072), np.int32))


@pytest.mark.parametrize(
    ("shape", "dtype", "workspace", "message"),
    [
        ((1, 3072), jnp.float32, None, "exchanges through a workspace, and there is none"),
        ((1, 3080), jnp.float32, WORKSPACE, "up to 8192 elements, a multiple of 256; got 3080"),
        ((1, 8448), jnp.float32, WORKSPACE, "up to 8192 elements, a multiple of 256; got 8448"),
        ((1, 3328), jnp.float32, WORKSPACE, "for 64 rows of 3072 elements; got 1 of 3328"),
        ((13, 5, 3072), jnp.float32, WORKSPACE, "for 64 rows of 3072 elements; got 65 of 3072"),
        ((1, 3072), jnp.bfloat16, WORKSPACE, "sums float32; got bfloat16"),
        ((8, 8, 3072), jnp.float32, WORKSPACE, None),
    ],
)
@newer_jax
def test_they_say_why_they_decline_a_call(monkeypatch, shape, dtype, workspace, message):
    from mlra_jax.ops.all_reduce import mosaic_gpu

    ran = lambda out_type, **_: lambda *_: jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), out_type)
    monkeypatch.setattr(device, "current_device", lambda: ("gpu", H100))
    monkeypatch.setattr(mosaic_gpu.plgpu, "kernel", lambda kernel, out_type, **_: ran(out_type))
    y, gain = jnp.zeros(shape, dtype), jnp.ones(shape[-1], jnp.float32)
    options = {"eps": 1e-6, "dtype": jnp.bfloat16, "axis": "x"}
    call = lambda y: all_reduce_add_rms_norm(y, y, gain, workspace, **options)
    with jax.set_mesh(Mesh(np.array(jax.devices()[:1]), ("x",))):
        mapped = jax.shard_map(call, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
        reason = explain(mapped, y)["all_reduce_add_rms_norm"]["mosaic_gpu"]
    assert reason is None if message is None else re.search(message, reason)


def test_they_are_for_hopper_alone_and_narrow_rows_are_padded(monkeypatch):
    call = lambda y: all_reduce(y, WORKSPACE, axis="x", implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="runs on Hopper GPUs; this is a cpu"):
        call(jnp.zeros((1, 4)))
    if jax.__version_info__ >= (0, 11):
        from mlra_jax.ops.all_reduce import mosaic_gpu

        monkeypatch.setattr(device, "current_device", lambda: ("gpu", H100))
        monkeypatch.setattr(mosaic_gpu.AllReduce, "launch", lambda self, kernel, name, out_type, y, *_: y)
        np.testing.assert_array_equal(call(jnp.arange(8.0).reshape(2, 4)), jnp.arange(8.0).reshape(2, 4))


# The protocol


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Devices that exchange words as the kernels do, and what it would be with a part left out.

    A state is (devices, memory, in flight). A device is at a call, has or has not sent its words, and has read some.
    Memory is what lies at (device, half, from, word): a value and a tag, each the number of a call. What is sent is
    in flight until it lands, in any order, but for what goes to the same place.
    """

    widths: tuple[int, ...]
    """Words of each call."""
    devices: int = 2
    halves: int = 2
    tagged: bool = True
    """Whether a word has to carry the number of the call; else anything there will do."""
    atomic: bool = True
    """Whether value and tag land at once."""

    def start(self):
        places = itertools.product(
            range(self.devices), range(self.halves), range(self.devices), range(max(self.widths))
        )
        return ((0, False, 0),) * self.devices, tuple((place, (0, 0)) for place in places), ()

    def ended(self, state):
        return all(call == len(self.widths) for call, *_ in state[0]) and not state[2]

    def moves(self, state):
        """States that may follow.

        Raises:
          AssertionError: a device takes a word that is not of its call.
        """
        devices, memory, flying = state
        for me, (call, sent, read) in enumerate(devices):
            if call == len(self.widths):
                continue
            width, epoch = self.widths[call], call + 1
            half = epoch % self.halves
            at = lambda now, me=me: (*devices[:me], now, *devices[me + 1 :])
            if not sent:
                places = itertools.product(range(self.devices), (half,), (me,), range(width))
                parts = ((epoch, epoch),) if self.atomic else ((epoch, None), (None, epoch))
                new = tuple((place, part) for place in places for part in parts)
                yield at((call, True, 0)), memory, flying + new
                continue
            source, word = divmod(read, width)
            value, tag = dict(memory)[me, half, source, word]
            if tag == epoch if self.tagged else tag:
                assert value == epoch, f"call {epoch} took a word of call {value}"
                last = read + 1 == self.devices * width
                yield at((call + 1, False, 0) if last else (call, True, read + 1)), memory, flying
            elif word:  # looks again at all that this source has sent
                yield at((call, True, source * width)), memory, flying
        seen = set()
        for i, (place, (value, tag)) in enumerate(flying):
            kind = place if self.atomic else (place, value is None)
            if kind in seen:
                continue
            seen.add(kind)
            old = dict(memory)[place]
            landed = tuple(n if n is not None else o for n, o in zip((value, tag), old, strict=True))
            now = tuple((p, landed if p == place else w) for p, w in memory)
            yield devices, now, flying[:i] + flying[i + 1 :]

    def check(self):
        """Follows every order of events.

        Raises:
          AssertionError: a device takes a word that is not of its call, or waits for ever.
        """
        before, new = {self.start(): []}, [self.start()]
        while new:
            state = new.pop()
            for after in self.moves(state):
                if after not in before:
                    before[after] = []
                    new.append(after)
                before[after].append(state)
        good = {state for state in before if self.ended(state)}
        new = list(good)
        while new:
            for state in before[new.pop()]:
                if state not in good:
                    good.add(state)
                    new.append(state)
        assert len(good) == len(before), "a device waits for ever"
        return len(before)


def test_in_no_order_of_events_a_device_takes_a_wrong_word_or_waits_for_ever():
    assert Protocol((2, 2, 2)).check() > 1000
    assert Protocol((1, 2, 1, 2)).check() > 1000  # the choice of a token is narrower than a row


@pytest.mark.parametrize(
    ("without", "fault"),
    [
        ({"halves": 1}, "waits for ever"),
        ({"tagged": False}, "took a word of call 1"),
        ({"atomic": False}, "took a word of call"),
    ],
)
def test_without_any_part_of_the_protocol_some_order_breaks_it(without, fault):
    with pytest.raises(AssertionError, match=fault):
        Protocol((2, 2, 2), **without).check()


@settings(max_examples=10, deadline=None)
@given(
    devices=st.integers(3, 4), widths=st.lists(st.integers(1, 2), min_size=3, max_size=4), random=st.randoms()
)
def test_more_devices_too_take_only_words_of_their_call(devices, widths, random):
    protocol = Protocol(tuple(widths), devices)
    state = protocol.start()
    while moves := list(protocol.moves(state)):
        state = random.choice(moves)
    assert protocol.ended(state)


# Compiled ahead of time


def compile_all():
    """Run in a process of its own, whose output holds what `ptxas` says of each kernel."""
    for n in (2, 4, 8):
        mesh = make_mesh(MeshConfig(1, 1, n, 1), gpu_devices(H100, n))
        new = lambda *shape, mesh=mesh: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("tensor"))
        )
        for width in (3072, 8192):
            workspace = Workspace.shapes(mesh, decode_rules(), width)
            split = jax.tree.map(lambda _: jax.P("tensor"), workspace)

            def run(y, gain, workspace):
                options = {"axis": "tensor", "implementation": "mosaic_gpu"}
                total, h = all_reduce_add_rms_norm(
                    y[0], y[0], gain[0], workspace, eps=1e-6, dtype=jnp.bfloat16, **options
                )
                return total[None], h[None], all_reduce(y[0], workspace, **options)[None]

            with jax.set_mesh(mesh):
                mapped = jax.shard_map(
                    run,
                    in_specs=(jax.P("tensor"), jax.P("tensor"), split),
                    out_specs=jax.P("tensor"),
                    check_vma=False,
                )
                hlo = jax.jit(mapped).lower(new(n, 8, width), new(n, width), workspace).compile().as_text()
            print(f"{n} devices", *re.findall(r" all-\w+\(| copy\(.*words", hlo))


@compiles
def test_compiled_for_2_4_and_8_h100s_nothing_spills_and_the_workspace_is_not_copied(said_by_ptxas):
    said = said_by_ptxas(__file__)
    assert re.findall(r"^\d devices.*", said, re.MULTILINE) == [f"{n} devices" for n in (2, 2, 4, 4, 8, 8)]
    assert len(re.findall(r"Used (\d+) registers", said)) >= 12
    assert set(re.findall(r"(\d+) bytes spill", said)) == {"0"}


# On GPUs


@two_gpus
def test_on_two_gpus_the_kernels_give_what_psum_gives_call_after_call():
    mesh = make_mesh(MeshConfig(1, 1, 2, 1), jax.devices("gpu")[:2])
    width, split = 3072, jax.P("tensor")
    workspace = Workspace.create(mesh, decode_rules(), width)
    specs = jax.tree.map(lambda _: split, workspace)

    def call(y, x, gain, workspace):
        options = {"axis": "tensor"}
        norm = all_reduce_add_rms_norm(x, y[0], gain, workspace, eps=1e-6, dtype=jnp.bfloat16, **options)
        return jax.tree.map(lambda a: a[None], (*norm, all_reduce(y[0, :, :4], workspace, **options)))

    def compiled(implementation):
        def run(*args):
            with choose(all_reduce=implementation, all_reduce_add_rms_norm=implementation):
                return jax.shard_map(
                    call, in_specs=(split, jax.P(), jax.P(), specs), out_specs=split, check_vma=False
                )(*args)

        return jax.jit(run)

    rng, kernel, psum = np.random.default_rng(0), compiled("mosaic_gpu"), compiled("reference")
    gain = rng.normal(size=width).astype(np.float32)
    with jax.set_mesh(mesh):
        for i in range(200):
            rows = (1, 8, 3, 64)[i % 4]
            y = jax.device_put(
                rng.normal(size=(2, rows, width)).astype(np.float32), jax.NamedSharding(mesh, split)
            )
            x = rng.normal(size=(rows, width)).astype(np.float32)
            found, expected = kernel(y, x, gain, workspace), psum(y, x, gain, workspace)
            for k in (0, 2):  # the sums
                np.testing.assert_array_equal(found[k], expected[k])
            # The norm sums squares in another order, which may round the other way.
            np.testing.assert_allclose(np.float32(found[1]), np.float32(expected[1]), rtol=2**-7)
    assert np.asarray(workspace.epochs).min(axis=0)[0] == 400


@two_gpus
def test_on_two_gpus_greedy_tokens_are_those_of_psum_and_of_one_gpu():
    attention = LatentAttentionConfig(4, 4, q_lora_rank=64, kv_lora_rank=256, d_nope=32, d_rope=16)
    config = ModelConfig(
        vocab_size=512,
        n_layers=2,
        d_model=256,
        n_heads=8,
        d_ff=512,
        attention=attention,
        output_init="normal",
        init_std=0.2,
        compute_dtype="float32",
    )
    made = jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(made, nnx.Param)))
    prompts = np.random.default_rng(0).integers(0, 512, (3, 20)).tolist()

    def tokens(n, implementation):
        mesh = make_mesh(MeshConfig(1, 1, n, 1), jax.devices("gpu")[:n])
        with choose(all_reduce=implementation, all_reduce_add_rms_norm=implementation):
            with jax.set_mesh(mesh):
                model = to_decode(config, params, decode_rules(False))
            return greedy(Engine(model, mesh, config.vocab_size), prompts, 100)

    expected = tokens(1, "reference")
    assert len(np.unique(expected)) > 20  # a model that repeats itself would prove little
    np.testing.assert_array_equal(tokens(2, "reference"), expected)
    np.testing.assert_array_equal(tokens(2, ("mosaic_gpu", "reference")), expected)
