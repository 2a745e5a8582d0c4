"""The residual sum with its norm: the kernel for Hopper GPUs, in the interpreter and on the GPU, against plain XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlra_jax.ops.norm import add_rms_norm
from mlra_jax.ops.norm.mosaic_gpu import MosaicGPU
from tests.ops.common import interpreter, newer_jax

EPS = 1e-3


def arguments(rows=(3, 1), width=1536, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), 3)
    x = 0.1 * jax.random.normal(keys[0], (*rows, width))  # so small that eps counts
    return x, 0.1 * jax.random.normal(keys[1], x.shape, dtype), 1 + jax.random.normal(keys[2], (width,))


def test_the_reference_adds_and_normalises_in_float32():
    args = arguments()
    x, y, gain = (np.asarray(a, np.float64) for a in args)
    total, h = add_rms_norm(*args, eps=EPS, implementation="reference")
    assert (total.dtype, h.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(total, x + y, rtol=1e-5, atol=1e-6)
    exact = (x + y) / np.sqrt(np.mean((x + y) ** 2, axis=-1, keepdims=True) + EPS) * gain
    np.testing.assert_allclose(np.float32(h), exact, rtol=2**-8, atol=1e-6)


@newer_jax
@pytest.mark.parametrize("rows", [(2, 1), (2, 5)])
def test_the_kernels_give_what_the_reference_gives(rows, monkeypatch):
    monkeypatch.setattr(MosaicGPU, "target", lambda _: 1)  # programs have several rows
    kernels = MosaicGPU(interpret=None if jax.default_backend() == "gpu" else interpreter())
    args = arguments(rows)
    keys = jax.random.split(jax.random.key(1), 2)
    d = jax.random.normal(keys[0], args[0].shape), jax.random.normal(keys[1], args[1].shape, jnp.bfloat16)

    def run(f):
        out, pullback = jax.vjp(f, *args)
        return *out, *pullback(d)

    op = functools.partial(add_rms_norm, eps=EPS)
    total, h, d_x, d_y, d_gain = jax.jit(lambda: run(functools.partial(op, implementation=kernels)))()
    expected = run(functools.partial(op, implementation="reference"))
    np.testing.assert_array_equal(total, expected[0])
    np.testing.assert_allclose(np.float32(h), np.float32(expected[1]), rtol=2**-7)
    np.testing.assert_allclose(d_x, expected[2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.float32(d_y), np.float32(expected[3]), rtol=2**-7, atol=1e-4)
    np.testing.assert_allclose(d_gain, expected[4], rtol=1e-4, atol=1e-4)
    assert [a.dtype for a in (d_x, d_y, d_gain)] == [a.dtype for a in args]


@newer_jax
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.float32}, "add bfloat16 to float32; got float32 and float32"),
        ({"width": 96}, "a multiple of 512; got 96"),
        ({"width": 8704}, "up to 8192 elements, .* got 8704"),
    ],
)
def test_what_the_kernel_does_not_take_is_declined(change, message):
    with pytest.raises(NotImplementedError, match=message):
        add_rms_norm(*arguments(**change), eps=EPS, implementation=MosaicGPU(interpret=True))
