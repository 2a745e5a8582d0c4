"""What tests of several kernels share: marks, calls of decode attention, interpreters and their races."""

import contextlib
import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from mlra_jax.ops import hopper
from mlra_jax.ops.columns import Columns, unpack
from mlra_jax.ops.decode.arg_specs import ArgSpec, Call, abstract_call
from mlra_jax.ops.rotary import apply_rope

A100, H100, L4, T4 = "NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3", "NVIDIA L4", "Tesla T4"

TOPOLOGIES = [
    "v5e:2x2",
    *(pytest.param(t, marks=pytest.mark.slow) for t in ("v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")),
]
"""TPUs to compile for; the slow ones in CI's second stage."""

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


def make_call(spec, seed=0, dtype=jnp.bfloat16, *, scale=None, kv_len=None):
    """The call with normally distributed queries and cache, NaN for every token that no query sees.

    The pages of a paged cache are in random order; the entries of the table past a row's end are out of range.
    All of a pool that is no column of the cache is NaN too. `kv_len` [B, T] is what each query sees, any integers, in
    place of what the lengths of `spec` say.
    """
    call = abstract_call(dataclasses.replace(spec, pool=None), dtype, scale=scale)
    *arrays, _, page_table = call.args
    rng = np.random.default_rng(seed)
    if kv_len is None:
        earlier = np.arange(spec.q_len - 1, -1, -1)
        kv_len = np.maximum(np.array(spec.lengths)[:, None] - earlier, 0)
    kv_len = np.asarray(kv_len, np.int32)
    lengths = np.clip(kv_len.max(axis=1), 0, spec.capacity)
    table = np.arange(len(lengths), dtype=np.int32)[:, None]  # a contiguous cache has one page for each row
    seen = np.arange(spec.capacity) < lengths[:, None]
    if page_table is not None:
        table = rng.permutation(page_table.size).astype(np.int32).reshape(page_table.shape)
    pages, page_size = table.size, spec.capacity // table.shape[1]
    seen_in_page = np.empty((pages, page_size), bool)
    seen_in_page[table.reshape(-1)] = seen.reshape(pages, page_size)

    filled = []
    for x in arrays:
        values = rng.standard_normal(x.shape, np.float32)
        if x.ndim < 5:  # the cache
            last_two = (page_size, 1) if spec.layout == "token_major" else (1, page_size)
            visible = seen_in_page.reshape(pages, *(1,) * (x.ndim - 3), *last_two)
            values = np.where(visible, values, np.nan)
        filled.append(jnp.asarray(values, x.dtype))
    if spec.pool:
        pool = np.full(spec.pool_shape, np.nan, np.float32)
        by_token = pool.reshape(pages, page_size, -1)
        latents, keys = filled[2:]
        filled[2:] = spec.columns(None)
        for columns, values in zip(filled[2:], (latents, keys[:, None]), strict=True):
            for head, start in enumerate(columns.starts):
                by_token[:, :, start : start + columns.width] = values[:, head % values.shape[1]]
        filled[2:] = spec.columns(jnp.asarray(pool, dtype))
    filled.append(jnp.asarray(kv_len))
    if page_table is not None:
        past_the_end = np.arange(table.shape[1]) * page_size >= lengths[:, None]
        table[past_the_end] = rng.choice([-1, pages, 2**30], past_the_end.sum())
    return Call(call.op, (*filled, None if page_table is None else jnp.asarray(table)), call.static)


def in_arrays(call):
    """The same call with arrays of their own in the place of columns of a pool."""
    if not isinstance(call.args[2], Columns):
        return call
    q_nope, q_rope, latents, keys, *rest = call.args
    return dataclasses.replace(call, args=(q_nope, q_rope, unpack(latents), unpack(keys)[:, 0], *rest))


def in_float32(call):
    """The same call in float32, for exact results of the reference."""
    widen = lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return dataclasses.replace(call, args=jax.tree.map(widen, call.args))


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


VIEWS = {"parameter", "bitcast", "custom-call", "get-tuple-element", "tuple"}
"""Operations of a compiled program that do not move what they are given; kernels among them."""


def assert_not_copied(compiled, elements, donated=(), itemsize=2, allowed=VIEWS):
    """That a compiled program copies, gathers or transposes no array of so many elements: such as a cache, or a pool.

    Args:
      compiled: a compiled program.
      elements: of the smallest array that must not be copied, on one device: a pool's rotary keys, not all of it.
      donated: elements of arrays that must be changed in place, on one device.
      itemsize: bytes of an element.
      allowed: operations that may give an array of that size.

    Returns:
      Names and operations of what gives one; None where XLA cannot show the program.
    """
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < itemsize * elements  # there is no room for a copy
    assert memory.alias_size_in_bytes >= itemsize * sum(donated)
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as e:  # XLA cannot read back some programs for tpu7x
        if "async-update" in str(e):
            return None
        raise
    moved = []
    for line in text.splitlines():
        if found := re.match(r"\s*(?:ROOT )?%?(\S+) = \w+\[([\d,]+)\]\S* ([\w-]+)\(", line):
            name, sizes, operation = found.groups()
            if np.prod([int(n) for n in sizes.split(",")], dtype=np.int64) >= elements:
                moved.append((name, operation))
    assert {operation for _, operation in moved} <= set(allowed), moved
    return moved


EDGES = {
    "nothing": ArgSpec((0, 0), max_len=70, rows=16),
    "tiny": ArgSpec((1, 2, 0, 17), rows=16),
    "ragged": ArgSpec((300, 1, 0, 129), rows=16, max_len=320),
    "off by one": ArgSpec((63, 64, 65, 127, 128, 129), rows=16, max_len=192),
    "several latents": ArgSpec((100, 257), heads=4, rows=16, width=64, rope=32),
    "no rope": ArgSpec((70, 200), heads=2, rows=32, rope=0),
    "wide": ArgSpec((65, 130), rows=16, width=512),
    "half wide": ArgSpec((130, 64), rows=32, width=256),
    "odd rows": ArgSpec((65, 130), heads=2, rows=3),
    "one row": ArgSpec((65, 130), rows=1, width=64),
    "many rows": ArgSpec((130, 200), rows=96),
    "causal": ArgSpec((1, 3, 0, 129), q_len=4, rows=8),
    "eight causal queries": ArgSpec((5, 64, 200), q_len=8, heads=2, rows=16, width=64),
    "pages": ArgSpec((63, 64, 0, 300), rows=16, page_size=64),
    "long pages": ArgSpec((127, 257, 1), q_len=2, heads=2, rows=16, page_size=128),
    "one page": ArgSpec((100,), rows=16, width=64, page_size=128),
    "grouped": ArgSpec((129, 0, 300), heads=2, rows=8, rope=0, value=128),
    "grouped, other value width": ArgSpec((64, 100), q_len=3, heads=3, rows=4, width=64, rope=0, value=128),
    "grouped, pages": ArgSpec((64, 200, 1), heads=2, rows=8, rope=0, value=64, page_size=64),
}
"""Small calls at the limits of blocks, pages, tiles and lengths, for tests."""

POOLS = {
    "small pages of a pool": ArgSpec((63, 16, 0, 300), rows=16, page_size=16, pool="packed"),
    "pool of an engine": ArgSpec((33, 200), q_len=2, heads=2, rows=8, page_size=32, pool="engine"),
    "contiguous pool": ArgSpec((130, 5), heads=2, rows=4, width=64, rope=32, max_len=192, pool="packed"),
}
"""The same, of caches that are columns of a pool."""
