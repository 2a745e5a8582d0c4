"""Ragged batches over a paged cache give the logits of each request alone over the library's own cache."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlra_jax.attention.head_shards import HeadShards
from mlra_jax.attention.kv_cache import Cache
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.config import MeshConfig
from mlra_jax.errors import UserError
from mlra_jax.execution.topologies import topology_mesh
from mlra_jax.model import Transformer, to_decode
from mlra_jax.serving.step import RaggedBatch, TokenLayout, compile_ahead, hidden_states, logits
from mlra_jax.sharding import decode_rules, make_mesh
from tests.definitions import SMALL

PAGE, PAGES = 4, 24
MLA = dataclasses.replace(SMALL, attention=LatentAttentionConfig(1, 1, 16, 16, 8, 8))
LENGTHS = [13, 3, 21, 6]
CHUNKS = [[9, 2, 10, 0], [3, 0, 7, 5]]
"""New tokens of each request in steps of any: chunks that end and begin inside a page, or nothing."""
DECODED = [[1, 0, 2, 0], [0, 1, 1, 1], [0, 0, 1, 0]]
"""The same in steps of one or two tokens for each request."""


@functools.cache
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, n) for n in LENGTHS]


def alone(model, config, rules, tokens):
    cache = Cache.create(config, rules, 1, 32)
    out, _ = jax.jit(model.decode)(jnp.array(tokens)[None], cache, jnp.array([len(tokens)]))
    return np.asarray(out[0])


@pytest.mark.parametrize(
    ("config", "tensor", "block", "fused"),
    [
        pytest.param(SMALL, 4, 4, False, marks=pytest.mark.smoke),
        (SMALL, 2, None, True),
        pytest.param(SMALL, 1, 2, False, marks=pytest.mark.slow),
        pytest.param(MLA, 2, 4, False, marks=pytest.mark.slow),
    ],
)
def test_a_request_in_a_ragged_batch_gets_the_logits_it_gets_alone(config, tensor, block, fused):
    a, rules = config.attention, decode_rules()
    mesh = make_mesh(MeshConfig(1, 1, tensor, 1), jax.devices()[:tensor])
    with jax.set_mesh(mesh):
        params = nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(0), rules=rules)))
        model = to_decode(config, params, rules)
        heads = HeadShards.of(config, rules).count // tensor
        if fused:
            layout = TokenLayout.of_kv_heads(a.d_latent, a.d_rope, heads, head_dim=16)
            shape = (PAGES, PAGE, tensor * heads, 2, 16)
        else:
            layout = TokenLayout.packed(a.d_latent, a.d_rope, heads)
            shape = (PAGES, PAGE, tensor * layout.width)
        names = (None, None, "kv_head_shards", *[None] * (len(shape) - 3))
        # What nobody has written may be anything.
        buffers = [rules.constrain(jnp.full(shape, jnp.nan), *names) for _ in model.layers]

        table = np.random.default_rng(1).permutation(PAGES)[: 4 * 6].reshape(4, 6)
        seen, found = np.zeros(4, int), [[] for _ in LENGTHS]

        @functools.partial(jax.jit, static_argnames="uniform", donate_argnames="buffers")
        def step(buffers, tokens, position, slot, new, table, uniform):
            batch = RaggedBatch.of_requests(position, slot, None if uniform else new, table, block=block)
            hidden, buffers = hidden_states(model, buffers, tokens, batch, layout)
            return logits(model, hidden), buffers

        def run(new, padded, uniform=False):
            nonlocal buffers
            tokens, position, slot = np.zeros(padded, int), np.zeros(padded, int), np.full(padded, -1)
            first = padded // 4 * np.arange(4) if uniform else np.cumsum(new) - new
            for r, n in enumerate(new):
                at, p = slice(first[r], first[r] + n), np.arange(seen[r], seen[r] + n)
                tokens[at], position[at] = prompts()[r][p], p
                slot[at] = table[r, p // PAGE] * PAGE + p % PAGE
            out, buffers = step(buffers, *map(jnp.array, (tokens, position, slot, new, table)), uniform)
            out = np.asarray(out)
            for r, n in enumerate(new):
                found[r].append(out[first[r] : first[r] + n])
                seen[r] += n

        for new in CHUNKS:
            run(new, 32)
        for new in DECODED:
            run(new, 4 * max(new), uniform=True)
        assert seen.tolist() == LENGTHS
        for r, tokens in enumerate(prompts()):
            expected = alone(model, config, rules, tokens)
            np.testing.assert_allclose(np.concatenate(found[r]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("prefill", [False, True])
def test_no_layer_copies_the_pool_on_a_gpu(prefill):
    try:
        mesh = topology_mesh("h100:4", MeshConfig(1, 1, 4, 1))
    except UserError as error:
        pytest.skip(str(error))
    attention = LatentAttentionConfig(4, 4, q_lora_rank=256, kv_lora_rank=512, d_nope=128, d_rope=64)
    config = dataclasses.replace(SMALL, d_model=512, n_heads=8, d_ff=512, attention=attention)
    config = dataclasses.replace(config, compute_dtype="bfloat16", param_dtype="bfloat16")
    sizes = {
        "tokens": 512 if prefill else 32,
        "requests": 32,
        "pages": 4096,
        "page_size": 64,
        "max_len": 1024,
    }
    compiled = compile_ahead(config, decode_rules(), mesh, prefill=prefill, **sizes)
    layer = 4096 * 64 * (128 + 64) * 2
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= config.n_layers * layer
    assert memory.temp_size_in_bytes < layer / 2
