"""Appending to a cache: any positions, in every back end; on TPU in place, and nothing else is touched.

Numbers of the kernel for Hopper GPUs come from the interpreter, with JAX 0.11 or later, and from the GPU where there
is one (`MLRA_TEST_PLATFORM=cuda,cpu pytest tests/ops/test_append.py`).
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlra_jax.cli.configs import load_config
from mlra_jax.config import MeshConfig, ModelConfig
from mlra_jax.execution.topologies import topology_mesh
from mlra_jax.generation.engine import compile_step
from mlra_jax.ops import explain
from mlra_jax.ops.append import append, normalize_and_append
from mlra_jax.ops.append.mosaic_tpu import MosaicTPU
from mlra_jax.ops.columns import Columns, unpack
from mlra_jax.ops.norm.reference import rms_norm
from mlra_jax.ops.rotary import frequencies, rotate
from mlra_jax.sharding import decode_rules
from tests.ops.common import H100, TOPOLOGIES, assert_not_copied, interpreter, newer_jax

S = 128
POSITIONS = st.one_of(st.integers(0, S - 1), st.sampled_from([-1, -(2**31), S, S + 1, 2**31 - 1]))


def written(array, tokens, at):
    """The token-major cache [B, ..., S, W] with tokens [B, T, ..., W], in NumPy."""
    array = np.array(array)
    for (b, t), s in np.ndenumerate(np.asarray(at)):
        if 0 <= s < array.shape[-2]:
            array[b, ..., s, :] = tokens[b, t]
    return array


@functools.cache
def back_end(name, layout):
    implementation = MosaicTPU(interpret=True) if name == "mosaic_tpu" else name
    return jax.jit(functools.partial(append, implementation=implementation, layout=layout))


@settings(max_examples=8, deadline=None)
@given(
    name=st.sampled_from(["reference", "mosaic_tpu"]),
    heads=st.sampled_from([(), (2,)]),
    layout=st.sampled_from(["token_major", "feature_major"]),
    positions=st.lists(st.lists(POSITIONS, min_size=2, max_size=2, unique=True), min_size=2, max_size=2),
    t=st.integers(1, 2),
)
@example("reference", (2,), "token_major", [[-1, 3], [S, 0]], 1)
@example("reference", (), "feature_major", [[-1, 3], [-S, S - 1]], 2)
@example("mosaic_tpu", (2,), "feature_major", [[-1, 3], [S - 1, 0]], 1)
@example("mosaic_tpu", (), "feature_major", [[S, 3], [-(2**31), 0]], 1)
def test_each_token_goes_to_its_position_and_one_without_room_nowhere(name, heads, layout, positions, t):
    if name == "mosaic_tpu":
        layout, t = "feature_major", 1
    rng, at = np.random.default_rng(0), np.array(positions)[:, :t]
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    array, tokens = draw(2, *heads, S, 8), draw(2, t, *heads, 8)
    laid = lambda x: x.swapaxes(-1, -2) if layout == "feature_major" else x
    ours = back_end(name, layout)(jnp.asarray(laid(array)), jnp.asarray(tokens), jnp.asarray(at))
    np.testing.assert_array_equal(laid(np.asarray(ours)), written(array, tokens, at))


@functools.cache
def append_to_pool(name, starts, width):
    implementation = MosaicTPU(interpret=True) if name == "mosaic_tpu" else name
    return jax.jit(
        lambda pool, *args: append(Columns(pool, starts, width), *args, implementation=implementation).array
    )


@settings(max_examples=8, deadline=None)
@given(
    columns=st.sampled_from(
        [("reference", (0,), 512), ("mosaic_tpu", (0,), 512), ("reference", (0, 256), 128)]
    ),
    slots=st.lists(
        st.one_of(st.integers(0, 79), st.sampled_from([-1, -(2**31), 80, 2**31 - 1])), min_size=4, max_size=4
    ),
    t=st.integers(1, 2),
    shared=st.booleans(),
)
@example(("reference", (0, 256), 128), [79, 80, 3, -1], 2, True)
@example(("mosaic_tpu", (0,), 512), [79, -(2**31), 3, 80], 2, False)
@example(("mosaic_tpu", (0,), 512), [0, 1, 3, 80], 1, True)
def test_each_token_goes_to_its_slot_of_a_pool_and_nothing_else_is_touched(columns, slots, t, shared):
    name, starts, width = columns
    slots = np.array([s if s not in slots[:i] else -1 for i, s in enumerate(slots)]).reshape(2, 2)[:, :t]
    rng = np.random.default_rng(0)
    pool = rng.standard_normal((5, 16, 4, 1, 128)).astype(np.float32)
    tokens = rng.standard_normal((2, t, *([] if shared else [len(starts)]), width)).astype(np.float32)
    expected = pool.copy().reshape(80, 512)
    for at, slot in np.ndenumerate(slots):
        for head, start in enumerate(starts if 0 <= slot < 80 else ()):
            expected[slot, start : start + width] = tokens[at] if shared else tokens[at][head]
    ours = append_to_pool(name, starts, width)(pool, tokens, slots)
    np.testing.assert_array_equal(ours.reshape(80, 512), expected)


B, A, U, C, R = 3, 512, 2, 128, 64
EPS, Q_SCALE, KV_SCALE, BASE = ModelConfig().norm_eps, 1.5, 2.5, 1e4
SCALES = {
    "eps": EPS,
    "q_scale": Q_SCALE,
    "kv_scale": KV_SCALE,
    "frequencies": frequencies(R, BASE)._replace(magnitude=1.25),
}


def arguments(dtype=jnp.bfloat16, rank=A, positions=(5, S - 1, S), t=1):
    keys = iter(jax.random.split(jax.random.key(0), 5))
    a = jax.random.normal(next(keys), (B, t, rank + U * C + R), dtype)
    gains = 1 + jax.random.normal(next(keys), (rank,)), 1 + jax.random.normal(next(keys), (U, C))
    caches = (
        jax.random.normal(next(keys), (B, U, S, C), dtype),
        jax.random.normal(next(keys), (B, S, R), dtype),
    )
    position = jnp.array([[3], [77], [2**21 - 1]]) + jnp.arange(t)
    return a, *gains, position, jnp.array(positions)[:, None] + jnp.arange(t), *caches


def in_a_pool(kv_latent, k_rope, at):
    """The same cache as columns of one pool [B, S, 2 * U, 128], each row a page; and each token's slot."""
    pool = jnp.zeros((*k_rope.shape[:2], 2 * U, C), kv_latent.dtype)
    pool = pool.at[:, :, ::2].set(kv_latent.swapaxes(1, 2)).at[:, :, 1::2, :R].set(k_rope[:, :, None])
    slot = jnp.where((at >= 0) & (at < S), at + S * jnp.arange(B)[:, None], jnp.where(at < 0, at, 2**31 - 1))
    return Columns(pool, (0, 2 * C), C), Columns(pool, (C, 3 * C), R), slot


@pytest.mark.parametrize("positions", [(5, S - 1, S), (-1, 0, 2**31 - 1)], ids=str)
@pytest.mark.parametrize(
    "t", [None, 1, 2]
)  # None: a cache of two arrays; others: tokens of each row, into a pool
@pytest.mark.parametrize(
    "name", ["reference", pytest.param("mosaic_gpu", marks=[newer_jax, pytest.mark.gpu])]
)
def test_a_token_is_normalised_rotated_and_written_where_it_belongs_and_nowhere_else(name, t, positions):
    a, q_gain, kv_gain, position, at, kv_latent, k_rope = args = arguments(positions=positions, t=t or 1)
    if name == "mosaic_gpu":
        from mlra_jax.ops.append.mosaic_gpu import MosaicGPU

        name = MosaicGPU(interpret=None if jax.default_backend() == "gpu" else interpreter())

    def run(a, q_gain, kv_gain, position, at, *caches):
        if t:
            *caches, at = in_a_pool(*caches, at)
        given = (a, q_gain, kv_gain, position, at, *caches)
        q, *caches = normalize_and_append(*given, **SCALES, implementation=name)
        if t:
            assert caches[0].array is caches[1].array
            keys = unpack(caches[1])
            return q, unpack(caches[0]), keys[:, 0], keys[:, 1]
        return q, *caches

    q, *caches = jax.jit(run)(*args)
    norm = lambda x, gain, scale: (rms_norm(x, gain, EPS) * scale).astype(jnp.bfloat16)
    latents = norm(a[..., A : A + U * C].reshape(B, -1, U, C), kv_gain, KV_SCALE)
    keys = rotate(a[..., A + U * C :], position, SCALES["frequencies"])
    expected = (
        norm(a[..., :A], q_gain, Q_SCALE),
        written(np.float32(kv_latent), np.float32(latents), at),
        *[written(np.float32(k_rope), np.float32(keys), at)] * (2 if t else 1),
    )
    for x, y in zip((q, *caches), expected, strict=True):
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=1e-2, atol=1e-2)
    for row, s in enumerate(positions):
        if not (0 <= s < S or (t == 2 and s == -1)):
            np.testing.assert_array_equal(np.float32(caches[0][row]), np.float32(kv_latent[row]))


@newer_jax
@pytest.mark.parametrize(
    ("change", "layout", "message"),
    [
        ({"dtype": jnp.float32}, "token_major", "takes bfloat16"),
        ({"rank": 96}, "token_major", "got 96, 128 and 64"),
        ({"t": 2}, "token_major", "one token of each row; got 2"),
        ({}, "feature_major", "token-major caches, not feature_major"),
    ],
)
def test_what_the_kernels_do_not_take_is_declined_and_left_to_the_reference(
    compiled_for, change, layout, message
):
    *args, kv_latent, k_rope = arguments(**change)
    if layout == "feature_major":
        kv_latent, k_rope = (x[..., :100, :].swapaxes(-1, -2) for x in (kv_latent, k_rope))
    op = functools.partial(normalize_and_append, **SCALES, layout=layout)
    compiled_for(H100)
    why = explain(op, *args, kv_latent, k_rope)
    assert message in why["normalize_and_append"]["mosaic_gpu"]
    assert why["normalize_and_append"]["reference"] is None
    compiled_for("TPU v5e", "tpu")
    why = explain(op, *args, kv_latent, k_rope)
    tiles = "needs a cache for a multiple of 128 tokens; got 100"
    assert (tiles if layout == "feature_major" else "feature_major") in why["append"]["mosaic_tpu"]
    assert why["append"]["reference"] is None


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_decode_step_on_tpu_copies_no_cache(topology):
    mesh = topology_mesh(topology, MeshConfig(data=1, fsdp=1, tensor=4, context=-1))
    config = dataclasses.replace(load_config("mlra_4").model, n_layers=1)
    batch, length = 16, 131072  # the rotary keys alone are larger than any weight
    with jax.set_mesh(mesh):
        split = decode_rules(False).size("cache_length")
    compiled = compile_step(config, decode_rules(False), mesh, batch=batch, max_len=length)
    smallest = batch * length // split * config.attention.d_rope
    if (moved := assert_not_copied(compiled, smallest)) is None:
        return
    assert len([name for name, _ in moved if name.startswith("append_column")]) == 2
    assert len(re.findall(r"%decode_attention\S* = ", compiled.as_text())) == 1


def test_columns_of_two_pools_or_of_other_sizes_are_refused():
    *args, kv_latent, k_rope = arguments()
    latents, keys, _ = in_a_pool(kv_latent, k_rope, args[-1])
    run = functools.partial(jax.eval_shape, functools.partial(normalize_and_append, **SCALES))
    with pytest.raises(
        ValueError, match="columns of one and the same pool"
    ):  # `jit` passes each on by itself
        run(*args, latents, keys)
    run = lambda kv_latent, k_rope: normalize_and_append(*args, kv_latent, k_rope, **SCALES)
    with pytest.raises(ValueError, match="columns of one and the same pool"):
        run(latents, k_rope)
    with pytest.raises(ValueError, match="columns for 2 heads of 128, as kv_gain has them; got 1 of 128"):
        run(dataclasses.replace(latents, starts=(0,)), keys)
    with pytest.raises(ValueError, match=r"k_rope .* has 512 for each token; got 64 from each of \[480\] on"):
        run(latents, dataclasses.replace(keys, starts=(480,)))
    with pytest.raises(ValueError, match="layout must be token_major, not feature_major"):
        append(latents, jnp.zeros((1, 1, 2, 128)), jnp.zeros((1, 1), jnp.int32), layout="feature_major")
