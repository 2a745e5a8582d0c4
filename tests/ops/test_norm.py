"""The residual sum with its norm: the kernel for Hopper GPUs, in the interpreter and on the GPU, against plain XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlra_jax.ops.norm import add_rms_norm, mosaic_gpu

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


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs JAX 0.11 or later")
def test_the_kernel_gives_what_the_reference_gives():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpret = None if jax.default_backend() == "gpu" else plgpu.InterpretGPUParams(detect_races=True)
    run = jax.jit(lambda *args: mosaic_gpu.add_rms_norm(*args, eps=EPS, interpret=interpret))
    (total, h), args = run(*arguments()), arguments()
    expected_total, expected_h = add_rms_norm(*args, eps=EPS, implementation="reference")
    np.testing.assert_array_equal(total, expected_total)
    np.testing.assert_allclose(np.float32(h), np.float32(expected_h), rtol=2**-7)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs JAX 0.11 or later")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.float32}, "adds bfloat16 to float32; got float32 and float32"),
        ({"width": 96}, "got 3 of 96"),
        ({"rows": (2, 500)}, "up to 256 rows .* got 1000 of 1536"),
    ],
)
def test_what_the_kernel_does_not_take_is_declined(change, message):
    with pytest.raises(NotImplementedError, match=message):
        mosaic_gpu.add_rms_norm(*arguments(**change), eps=EPS, interpret=True)
