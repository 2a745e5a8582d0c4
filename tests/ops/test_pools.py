"""One layer's append and attention over a serving engine's pool, compiled ahead of time: nothing copies the pool."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mlra_jax.execution.topologies import described_devices
from mlra_jax.ops.append import normalize_and_append
from mlra_jax.ops.columns import Columns
from mlra_jax.ops.decode import latent_decode_attention
from mlra_jax.ops.rotary import frequencies
from tests.ops.common import TOPOLOGIES, assert_not_copied, compiles

C, R, A, SLOT = 128, 64, 512, 256
PAGE, CONTEXT = 16, 4096


def layer(pool, a, gains, position, slot, q_nope, q_rope, kv_len, table):
    """Appends to the pool [P, S, U, 2, 128], or [P, S, 192] of one head, and attends to it."""
    token = pool.size // (pool.shape[0] * pool.shape[1])
    latents, keys = (
        Columns(pool, tuple(range(first, token, SLOT)), width) for first, width in ((0, C), (C, R))
    )
    options = {"eps": 1e-5, "q_scale": 1.0, "kv_scale": 1.0, "frequencies": frequencies(R, 1e4)}
    q, latents, keys = normalize_and_append(a, *gains, position, slot, latents, keys, **options)
    out, _ = latent_decode_attention(q_nope, q_rope, latents, keys, kv_len, scale=0.1, page_table=table)
    return latents.array, q, out


def compile_layer(devices, token, batch, q_len):
    """The layer for devices that share latent heads, a pool of 1 GiB for each."""
    mesh = Mesh(np.array(devices), ("tensor",), axis_types=(AxisType.Explicit,))
    u, pages = len(devices), 2**29 // (PAGE * SLOT)
    whole, heads = PartitionSpec(), PartitionSpec(None, None, "tensor")
    int32 = lambda *shape: (jax.ShapeDtypeStruct(shape, jnp.int32), whole)
    bfloat16 = lambda spec, *shape: (jax.ShapeDtypeStruct(shape, jnp.bfloat16), spec)
    pool_spec = heads if token == (2, 128) else whole
    arguments = (
        bfloat16(pool_spec, pages, PAGE, *((u, *token) if token == (2, 128) else token)),
        bfloat16(whole, batch, q_len, A + C + R),
        (bfloat16(whole, A), bfloat16(PartitionSpec("tensor"), u, C)),
        int32(batch, q_len),
        int32(batch, q_len),
        bfloat16(heads, batch, q_len, u, 16, C),
        bfloat16(heads, batch, q_len, u, 16, R),
        int32(batch, q_len),
        int32(batch, CONTEXT // PAGE),
    )
    is_pair = lambda x: isinstance(x, tuple) and isinstance(x[0], jax.ShapeDtypeStruct)
    specs = jax.tree.map(lambda x: x[1], arguments, is_leaf=is_pair)
    place = lambda x: jax.ShapeDtypeStruct(x[0].shape, x[0].dtype, sharding=NamedSharding(mesh, x[1]))
    with jax.set_mesh(mesh):
        run = jax.shard_map(layer, in_specs=specs, out_specs=(pool_spec, whole, heads), check_vma=False)
        placed = jax.tree.map(place, arguments, is_leaf=is_pair)
        compiled = jax.jit(run, donate_argnums=0).lower(*placed).compile()
    return compiled, pages * PAGE * (SLOT if token == (2, 128) else token[0])


def check(devices, token, batch, q_len, kernels):
    compiled, elements = compile_layer(devices, token, batch, q_len)
    assert_not_copied(compiled, elements // SLOT * R, donated=[elements])  # nor its rotary keys alone
    text = compiled.as_text()
    assert all(kernel in text for kernel in kernels)


@compiles
@pytest.mark.parametrize(("token", "q_len"), [((2, 128), 1), ((192,), 1), ((2, 128), 64)], ids=str)
def test_on_h100_the_pool_is_read_and_written_where_it_is(token, q_len):
    devices = described_devices("h100:4")[: 4 if token == (2, 128) else 1]
    check(devices, token, 16 if q_len == 1 else 2, q_len, ["mosaic_gpu_v2"])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.usefixtures("as_users_compile")
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("q_len", [1, pytest.param(64, marks=pytest.mark.slow)])
def test_on_tpu_the_pool_is_read_and_written_where_it_is(topology, q_len):
    check(described_devices(topology)[:4], (2, 128), 16, q_len, ["append_tokens", "decode_attention"])
