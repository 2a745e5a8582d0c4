"""Causal attention: the specification against NumPy, the other back ends against the specification."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import TypeCheckError

from mlra_jax.model.transformer import REMAT_POLICIES
from mlra_jax.ops.attention import causal_attention, splash, xla
from mlra_jax.ops.attention.api import IMPLEMENTATIONS
from mlra_jax.ops.attention.qk_parts import Joined, Joins
from tests.ops.common import TOPOLOGIES


def by_hand(q, k, v, scale, q_start):
    """One query and head at a time, in float64."""
    b, t, n, _ = q.shape
    out = np.zeros((b, t, n, v.shape[-1]))
    for row, i, head in np.ndindex(b, t, n):
        kv, seen = head // (n // k.shape[2]), q_start + i + 1  # or all keys
        scores = scale * k[row, :seen, kv].astype(np.float64) @ q[row, i, head]
        weights = np.exp(scores - scores.max())
        out[row, i, head] = weights / weights.sum() @ v[row, :seen, kv]
    return out


def arrays(seed, b, t, s, n, k, h, v, dtype=np.float32):
    draw = np.random.default_rng(seed).standard_normal
    return (
        draw((b, t, n, h)).astype(dtype),
        draw((b, s, k, h)).astype(dtype),
        draw((b, s, k, v)).astype(dtype),
    )


def put(*arrays):
    return [jnp.asarray(x) for x in arrays]


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 99),
    b=st.integers(1, 2),
    t=st.integers(1, 5),
    q_start=st.integers(0, 9),
    s=st.integers(1, 9),
    k=st.integers(1, 2),
    m=st.integers(1, 3),
    h=st.integers(1, 5),
    v=st.integers(1, 5),
)
def test_reference_equals_the_definition(seed, b, t, q_start, s, k, m, h, v):
    q, keys, values = arrays(seed, b, t, s, k * m, k, h, v)
    run = functools.partial(causal_attention, scale=0.7, q_start=q_start, implementation="reference")
    out = jax.jit(run)(*put(q, keys, values))
    np.testing.assert_allclose(out, by_hand(q, keys, values, 0.7, q_start), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("t", "block_elements"),
    [(6, 1), (6, 200), (6, 10**9), (13, 500)],  # one query at a time, three, all six; four of thirteen
)
def test_xla_in_blocks_gives_the_reference_and_its_gradients(monkeypatch, t, block_elements):
    monkeypatch.setattr(xla, "BLOCK_ELEMENTS", block_elements)
    args = arrays(0, 2, t, t + 2, 4, 2, 8, 5)

    def run(name):
        def loss(*args):
            out = causal_attention(*args, scale=0.4, q_start=2, implementation=name)
            return jnp.sum(jnp.sin(out)), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*args)
        return out, *grads

    for ours, expected in zip(run("xla"), run("reference"), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_xla_holds_no_more_scores_than_it_says(monkeypatch):
    monkeypatch.setattr(xla, "BLOCK_ELEMENTS", 2 * 4 * 8 * 3)
    args = arrays(0, 2, 6, 8, 4, 2, 8, 5)
    program = str(jax.make_jaxpr(lambda *args: xla.causal_attention(Joined(*args, 1.0, 2)))(*args))
    assert "f32[2,2,2,3,8]" in program  # B, K, M, three of six queries, S
    assert "f32[2,2,2,6,8]" not in program


def test_bfloat16_is_as_close_to_float32_as_rounding_allows():
    args = arrays(0, 2, 6, 6, 4, 2, 8, 5)
    low = [jnp.asarray(x, jnp.bfloat16) for x in args]
    out = causal_attention(*low, scale=0.4)
    assert out.dtype == jnp.bfloat16
    exact = by_hand(*(np.asarray(x, np.float32) for x in low), 0.4, 0)
    np.testing.assert_allclose(
        np.asarray(out, np.float32), exact, rtol=0, atol=2 * 2**-8 * np.abs(exact).max()
    )


def test_a_query_sees_no_later_key_whatever_it_holds():
    q, k, v = arrays(0, 1, 3, 5, 2, 1, 4, 4)
    expected = causal_attention(*put(q, k, v), scale=1.0, q_start=1)
    k[:, 4:] = 1e4
    np.testing.assert_array_equal(causal_attention(*put(q, k, v), scale=1.0, q_start=1), expected)


def test_shapes_that_do_not_belong_together_are_refused():
    q, k, v = put(*arrays(0, 1, 3, 3, 4, 2, 4, 4))
    with pytest.raises(ValueError, match="K dividing N"):
        causal_attention(q[:, :, :3], k, v, scale=1.0)
    for wrong in ((q[..., :2], k, v), (q, k[:, :2], v), (q[:0], k, v)):
        with pytest.raises((ValueError, TypeCheckError)):
            causal_attention(*wrong, scale=1.0)


def test_shapes_and_types_of_the_public_op_are_checked_in_tests():
    q, k, v = put(*arrays(0, 1, 3, 3, 4, 2, 4, 4))
    for wrong in (q[0], q.astype(jnp.int32), np.asarray(q)):
        with pytest.raises(TypeCheckError):
            causal_attention(wrong, k, v, scale=1.0)


@pytest.fixture
def interpreted_splash(monkeypatch):
    """Splash attention, interpreted."""
    monkeypatch.setitem(IMPLEMENTATIONS, "splash", Joins(splash.Splash(interpret=True)))


def value_and_grads(name, q_start=0, wrap=lambda f: f):
    """The attention output and the gradients of a loss with unequal cotangents, compiled."""
    attend = wrap(functools.partial(causal_attention, scale=0.1, q_start=q_start, implementation=name))

    def loss(*args):
        out = attend(*args)
        return jnp.sum(jnp.sin(out)), out

    def run(*args):
        (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*args)
        return out, *grads

    return jax.jit(run)


def check_all(ours, expected, tolerance=1e-4):
    for x, y in zip(ours, expected, strict=True):
        assert np.linalg.norm(np.asarray(x) - y) < tolerance * np.linalg.norm(y)


@pytest.mark.usefixtures("interpreted_splash")
def test_splash_gives_the_reference_and_its_gradients_with_grouped_heads_and_earlier_keys():
    args = put(*arrays(0, 1, 128, 256, 4, 2, 192, 128))
    check_all(value_and_grads("splash", 128)(*args), value_and_grads("reference", 128)(*args))


@pytest.mark.usefixtures("interpreted_splash")
@pytest.mark.parametrize("sizes", [(1, 1), (2, 2)], ids=str)
def test_splash_gives_the_reference_and_its_gradients_inside_shard_map(sizes):
    mesh = jax.make_mesh(sizes, ("data", "tensor"), (AxisType.Explicit,) * 2)
    heads, shared = (
        PartitionSpec("data", None, "tensor"),
        PartitionSpec("data"),
    )  # one KV head on both devices
    specs = {"in_specs": (heads, shared, shared), "out_specs": heads}
    args = put(*arrays(0, 2, 128, 128, 2, 1, 64, 64))
    expected = value_and_grads("reference")(*args)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(args, specs["in_specs"], strict=True)
        ]
        ours = value_and_grads("splash", wrap=lambda f: jax.jit(jax.shard_map(f, **specs)))(*placed)
    check_all(ours, expected)


@pytest.mark.usefixtures("interpreted_splash")
@pytest.mark.parametrize("fused_blocks", [8, 1])
def test_splash_takes_a_position_that_is_known_at_run_time_alone(fused_blocks, monkeypatch):
    monkeypatch.setattr(splash, "BLOCKS", (128,))
    monkeypatch.setattr(splash, "FUSED_BLOCKS", fused_blocks)
    args = put(*arrays(0, 1, 256, 512, 2, 1, 64, 64))

    def run(name):
        attend = functools.partial(causal_attention, scale=0.1, implementation=name)
        loss = lambda *args: jnp.sum(jnp.sin(attend(*args[1:], q_start=args[0])))
        return jax.jit(jax.value_and_grad(loss, argnums=(1, 2, 3)))

    ours, reference = run("splash"), run("reference")
    for start in (0, 100, 128, 256, 300, 2000):
        (total, gradients), (expected, expected_gradients) = ours(start, *args), reference(start, *args)
        check_all((total, *gradients), (expected, *expected_gradients))


@pytest.mark.usefixtures("interpreted_splash")
def test_splash_attends_over_a_sequence_that_is_split_over_devices():
    mesh = jax.make_mesh((2,), ("context",), (AxisType.Explicit,))
    part, whole = PartitionSpec(None, "context"), PartitionSpec()
    q, k, v = put(*arrays(0, 1, 256, 256, 2, 1, 64, 64))

    def run(*args):
        attend = functools.partial(causal_attention, scale=0.1, implementation="splash")
        local = lambda q, k, v: attend(q, k, v, q_start=q.shape[1] * jax.lax.axis_index("context"))
        mapped = jax.shard_map(local, in_specs=(part, whole, whole), out_specs=part)
        return jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(mapped(*args))), argnums=(0, 1, 2))(*args)

    with jax.set_mesh(mesh):
        total, gradients = jax.jit(run)(
            jax.device_put(q, part), jax.device_put(k, whole), jax.device_put(v, whole)
        )
    out, *expected = value_and_grads("reference")(q, k, v)
    check_all((total, *gradients), (np.sum(np.sin(out)), *expected))


def test_splash_names_why_it_declines(monkeypatch):
    attend = functools.partial(causal_attention, scale=0.1, implementation="splash")
    with pytest.raises(NotImplementedError, match="a TPU"):
        attend(*put(*arrays(0, 1, 128, 128, 2, 1, 64, 64)))
    monkeypatch.setitem(IMPLEMENTATIONS, "splash", Joins(splash.Splash(interpret=True)))
    for match, sizes, q_start in (
        ("100 queries", (1, 100, 128, 2, 1, 64, 64), 0),
        ("got 64 and 48", (1, 128, 128, 2, 1, 64, 48), 0),
    ):
        with pytest.raises(NotImplementedError, match=match):
            attend(*put(*arrays(0, *sizes)), q_start=q_start)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_tpus_attend_with_splash_forward_and_backward(topology):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:4]
    mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    spec = PartitionSpec("data", None, "tensor")
    shapes = ((4, 2048, 24, 192), (4, 2048, 4, 192), (4, 2048, 4, 128))
    args = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for s in shapes]
    wrap = lambda f: jax.shard_map(f, in_specs=(spec,) * 3, out_specs=spec)
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        program = value_and_grads(None, wrap=wrap).lower(*args).compile().as_text()
    assert program.count("splash_mha_fwd") > 0
    assert program.count("splash_mha_dkv") > 0


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(("policy", "kernels"), [("attention", 2), ("full", 3)])
def test_a_policy_that_keeps_what_attention_gives_does_not_run_it_again(policy, kernels):
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[:2]
    mesh, spec = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Explicit,)), PartitionSpec("data")
    attend = jax.shard_map(
        functools.partial(causal_attention, scale=0.1), in_specs=(spec,) * 3, out_specs=spec
    )

    def layer(q, w):
        return q + attend(q * w, q[:, :, :1] * w, q[:, :, :1] * w), None

    def loss(q, w):
        step = jax.checkpoint(layer, policy=REMAT_POLICIES[policy], prevent_cse=False)
        return jnp.sum(jax.lax.scan(step, q, w)[0].astype(jnp.float32))

    sharding = NamedSharding(mesh, PartitionSpec("data", None, None, None))
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        q = jax.ShapeDtypeStruct((2, 256, 2, 128), jnp.bfloat16, sharding=sharding)
        program = (
            jax.jit(jax.grad(loss)).lower(q, jax.ShapeDtypeStruct((4,), jnp.bfloat16)).compile().as_text()
        )
    assert program.count("tpu_custom_call") == kernels  # forward, backward, and forward again
