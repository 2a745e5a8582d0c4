"""The kernel that takes a token into a latent cache on Hopper GPUs, in the interpreter and on the GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlra_jax.config import ModelConfig
from mlra_jax.ops.append import mosaic_gpu
from mlra_jax.ops.norm.reference import rms_norm
from mlra_jax.ops.rotary import frequencies, rotary_tables, rotate

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs JAX 0.11 or later")

B, A, U, C, R, S = 3, 512, 2, 128, 64, 128
EPS, Q_SCALE, KV_SCALE, BASE = ModelConfig().norm_eps, 1.5, 2.5, 1e4


def arguments(dtype=jnp.bfloat16, rank=A):
    keys = iter(jax.random.split(jax.random.key(0), 5))
    a_BE = jax.random.normal(next(keys), (B, rank + U * C + R), dtype)
    gains = 1 + jax.random.normal(next(keys), (rank,)), 1 + jax.random.normal(next(keys), (U, C))
    caches = (
        jax.random.normal(next(keys), (B, U, S, C), dtype),
        jax.random.normal(next(keys), (B, S, R), dtype),
    )
    return a_BE, *gains, jnp.array([3, 77, 5000]), jnp.array([5, S - 1, S]), caches


def append(a_BE, q_gain, kv_gain, token_B, position_B, caches, interpret):
    rotary = rotary_tables(token_B[:, None], frequencies(R, BASE))
    options = {"eps": EPS, "q_scale": Q_SCALE, "kv_scale": KV_SCALE, "layout": "token_major"}
    q, *caches = mosaic_gpu.normalize_and_append(
        a_BE[:, None], q_gain, kv_gain, rotary, position_B[:, None], *caches, **options, interpret=interpret
    )
    return q[:, 0], *caches


def test_a_token_is_normalised_rotated_and_written_where_it_belongs_and_nowhere_else():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    a_BE, q_gain, kv_gain, token_B, position_B, (kv_latent, k_rope) = args = arguments()
    interpret = None if jax.default_backend() == "gpu" else plgpu.InterpretGPUParams(detect_races=True)
    q_BA, *caches = jax.jit(lambda *args: append(*args, interpret))(*args)
    norm = lambda x, gain, scale: (rms_norm(x, gain, EPS) * scale).astype(jnp.bfloat16)
    latents = norm(a_BE[:, A : A + U * C].reshape(B, U, C), kv_gain, KV_SCALE)
    keys = rotate(a_BE[:, None, A + U * C :], token_B[:, None], frequencies(R, BASE))[:, 0]
    rows = jnp.arange(B)
    expected = (
        norm(a_BE[:, :A], q_gain, Q_SCALE),
        kv_latent.at[rows, :, position_B].set(latents, mode="drop"),
        k_rope.at[rows, position_B].set(keys, mode="drop"),
    )
    for x, y in zip((q_BA, *caches), expected, strict=True):
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=1e-2, atol=1e-2)
    np.testing.assert_array_equal(np.float32(caches[0][2]), np.float32(kv_latent[2]))


@pytest.mark.parametrize(
    ("change", "message"), [({"dtype": jnp.float32}, "takes bfloat16"), ({"rank": 96}, "got 96, 128 and 64")]
)
def test_what_the_kernel_does_not_take_is_declined(change, message):
    with pytest.raises(NotImplementedError, match=message):
        append(*arguments(**change), interpret=True)
