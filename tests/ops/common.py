"""What tests of several kernels share: marks, drawn lengths, interpreters and their races."""

import contextlib
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

from mlra_jax.ops import hopper
from mlra_jax.ops.decode.arg_specs import Call
from mlra_jax.ops.rotary import apply_rope

A100, H100, L4, T4 = "NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3", "NVIDIA L4", "Tesla T4"

newer_jax = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs JAX 0.11 or later")
compiles = pytest.mark.skipif(
    jax.__version_info__ < (0, 11) or not importlib.util.find_spec("jax_cuda13_plugin"),
    reason="needs JAX 0.11 or later and its CUDA 13 plugin",
)


def on_hopper(test):
    """Marks a test that needs a Hopper GPU."""
    available = jax.default_backend() == "gpu" and hopper.find_processors(jax.devices()[0].device_kind)
    return pytest.mark.gpu(pytest.mark.skipif(not available, reason="needs a Hopper GPU")(test))


def kv_lens(batch, q_len, capacity):
    """Any that the decode ops take, [batch][q_len]: none, some, all and more than there is, in any order."""
    edges = [0, 1, capacity - 1, capacity, capacity + 1, capacity + 70, 2**31 - 1, -1, -(2**31)]
    query = st.one_of(st.integers(0, capacity), st.sampled_from(edges))
    of = lambda what, n: st.lists(what, min_size=n, max_size=n)
    return of(of(query, q_len), batch)


def share_queries(call, branches):
    """A latent call whose rotary queries are shared by `branches` heads, wider than the keys and not yet rotated; and
    the same call with those queries rotated and repeated for every head."""
    q_nope, q_rope, *rest = call.args
    b, t, heads, _, r = q_rope.shape
    shared = q_rope[:, :, : heads // branches]
    angles = jnp.arange(b * t * (r // 2), dtype=jnp.float32).reshape(b, t, r // 2)
    rotary = jnp.cos(angles), jnp.sin(angles)
    wide = jnp.concatenate([jnp.full((*shared.shape[:-1], 8), jnp.nan, shared.dtype), shared], axis=-1)
    rotated = jnp.tile(apply_rope(shared, *(x[:, :, None, None] for x in rotary)), (1, 1, branches, 1, 1))
    return (
        Call(call.op, (q_nope, wide, *rest), {**call.static, "rotary": rotary}),
        Call(call.op, (q_nope, rotated, *rest), call.static),
    )


def interpreter(races=True):
    """How to run a Mosaic GPU kernel on the CPU."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(detect_races=races)


def assert_no_races():
    """That the last kernel interpreted touched no memory without waiting for who else did."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    assert not interpret_pallas_call.get_races().races_found


@contextlib.contextmanager
def waits_left_out(monkeypatch, kernel, jitted, left_out=lambda barrier: True):
    """The kernels of a module without some of their consumers' waits, which the interpreter must notice."""
    library = kernel.plgpu

    class Hasty:
        def __getattr__(self, name):
            return getattr(library, name)

        def barrier_wait(self, barrier):
            if not left_out(barrier):
                library.barrier_wait(barrier)

    monkeypatch.setattr(kernel, "plgpu", Hasty())
    for f in jitted:
        f.clear_cache()
    try:
        with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
            yield
    finally:
        for f in jitted:
            f.clear_cache()
