"""A model gives the same on any mesh: forward pass, gradients, cached decoding."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.attention.kv_cache import Cache
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.attention.tensor_product import TensorProductAttentionConfig
from mlra_jax.attention.tied import TiedAttentionConfig
from mlra_jax.config import ExecutionConfig, ModelConfig
from mlra_jax.execution.collectives import executed_collectives
from mlra_jax.model import Transformer, from_params, to_decode
from mlra_jax.ops.dispatch import choose
from mlra_jax.sharding import TRAIN_RULES, ZIGZAG_RULES, decode_rules
from tests.definitions import YARN, cross_entropy

latent = functools.partial(LatentAttentionConfig, q_lora_rank=20, kv_lora_rank=64, d_nope=16, d_rope=8)
BASE = ModelConfig(vocab_size=256, n_layers=2, d_model=48, n_heads=8, d_ff=80, compute_dtype="float32")
MODELS = {
    "mlra_4": dataclasses.replace(BASE, attention=latent(4, 4)),
    "mlra_2_gated": dataclasses.replace(
        BASE, attention=latent(4, 2), gated_attention=True, rotary_scaling=YARN
    ),
    "mlra_8_2": dataclasses.replace(BASE, attention=latent(8, 2)),
    "mla": dataclasses.replace(BASE, attention=latent(1, 1)),
    "gla_2": dataclasses.replace(BASE, attention=latent(2, 1)),
    "gqa": dataclasses.replace(BASE, attention=GroupedAttentionConfig(2, 16), rotary_scaling=YARN),
    "mqa_gated": dataclasses.replace(BASE, attention=GroupedAttentionConfig(1, 16), gated_attention=True),
    "mha": dataclasses.replace(BASE, attention=GroupedAttentionConfig(8, 16)),
    "mfa": dataclasses.replace(BASE, attention=GroupedAttentionConfig(1, 24, q_lora_rank=20)),
    "gta": dataclasses.replace(BASE, attention=TiedAttentionConfig(2, 16), rotary_scaling=YARN),
    "tpa_gated": dataclasses.replace(
        BASE, attention=TensorProductAttentionConfig(2, 3, 16), gated_attention=True, rotary_scaling=YARN
    ),
}
REMAT = {"mlra_8_2": "attention", "mla": "full", "gla_2": "dots", "gqa": "mlp"}
"""What some of them recompute on a mesh; the others nothing."""
BATCH, LENGTH = 8, 32
TOKENS = np.random.default_rng(0).integers(0, 256, (BATCH, LENGTH + 1), dtype=np.int32)


def run(config, remat, params, tokens, targets, rules=TRAIN_RULES):
    """Loss, logits, gradients."""
    tokens, targets = rules.in_order(tokens, 1), rules.in_order(targets, 1)

    def loss(params):
        logits = from_params(config, params, rules=rules, execution=ExecutionConfig(remat=remat))(tokens)
        return jnp.divide(*cross_entropy(logits, targets)), logits

    (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, logits, grads


@pytest.fixture(scope="module")
def whole():
    """`whole(name)`: parameters of a model, all random, and what it gives without a mesh or rematerialisation."""

    @functools.cache
    def compute(name):
        config, rng = MODELS[name], np.random.default_rng(1)
        state = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), nnx.Param)
        mean = lambda path: np.float32(path[-1].key == "gain")
        random = lambda path, x: mean(path) + 0.15 * rng.standard_normal(x.shape, np.float32)
        params = jax.tree_util.tree_map_with_path(random, nnx.to_pure_dict(state))
        result = jax.jit(functools.partial(run, config, "none"))(params, TOKENS[:, :-1], TOKENS[:, 1:])
        return params, jax.tree.map(np.asarray, result)

    return compute


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mlra_4", (1, 1, 1, 1)),
        pytest.param("mlra_4", (1, 1, 2, 1), marks=pytest.mark.smoke),
        ("mlra_4", (1, 2, 1, 2)),
        ("mlra_4", (1, 1, 8, 1)),
        ("mlra_4", (2, 2, 2, 1)),
        ("mlra_2_gated", (1, 2, 4, 1)),
        ("mlra_8_2", (1, 1, 4, 2)),
        ("mla", (1, 2, 2, 2)),
        ("gla_2", (1, 1, 4, 1)),
        ("gqa", (1, 1, 8, 1)),
        ("gqa", (1, 2, 2, 2)),
        ("mqa_gated", (2, 1, 4, 1)),
        ("mha", (2, 2, 1, 2)),
        ("mfa", (1, 2, 4, 1)),
        ("gta", (1, 2, 2, 2)),
        ("tpa_gated", (1, 2, 2, 2)),
    ],
    ids=str,
)
def test_logits_loss_and_gradients_on_a_mesh_equal_those_without_one(whole, on_mesh, name, sizes):
    params, (loss, logits, grads) = whole(name)
    config = MODELS[name]
    with on_mesh(*sizes):
        place = lambda x, spec: jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), spec))
        state = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), nnx.Param)
        placed = jax.tree.map(lambda x, a: place(x, a.sharding.spec), params, nnx.to_pure_dict(state))
        rows = TRAIN_RULES.spec("batch", "length")
        tokens, targets = place(TOKENS[:, :-1], rows), place(TOKENS[:, 1:], rows)
        remat = REMAT.get(name, "none")
        rules = TRAIN_RULES if name == "gqa" else ZIGZAG_RULES
        run_on_mesh = jax.jit(functools.partial(run, config, remat, rules=rules))
        logits = rules.in_order(logits, 1)
        mesh_loss, mesh_logits, mesh_grads = run_on_mesh(placed, tokens, targets)
    np.testing.assert_allclose(mesh_loss, loss, rtol=1e-5)
    np.testing.assert_allclose(mesh_logits, logits, rtol=0, atol=2e-5)
    off = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b)), mesh_grads, grads)
    assert max(jax.tree.leaves(off)) < 1e-5, off
    assert jax.tree.map(lambda x: x.sharding, mesh_grads) == jax.tree.map(lambda x: x.sharding, placed)


@pytest.mark.parametrize("name", ["mlra_4", "mha", "gta"])
def test_context_parallelism_moves_latents_of_all_tokens_and_nothing_larger(on_mesh, name):
    config = MODELS[name]
    with on_mesh(1, 1, 1, 2):
        model = jax.eval_shape(lambda: nnx.split(Transformer(config, rngs=nnx.Rngs(0), rules=ZIGZAG_RULES)))
        forward = jax.jit(lambda model, tokens: nnx.merge(*model).hidden(tokens))
        tokens = jax.device_put(
            TOKENS[:, :-1], NamedSharding(jax.sharding.get_mesh(), TRAIN_RULES.spec(None, "length"))
        )
        program = forward.lower(model, tokens).compile().as_text()
    moved = executed_collectives(program)
    values = sum(
        math.prod(shape) * n for c, n in moved.items() for _, shape in c.arrays if c.kind == "all-gather"
    )
    assert values == config.n_layers * config.attention.gathered_values(config.n_heads, 1) * BATCH * LENGTH
    assert {c.kind for c in moved} == {"all-gather"}


@pytest.mark.parametrize(
    ("name", "sizes", "split_heads"),
    [
        ("mlra_4", (), True),
        *(("mlra_4", (1, 1, *rest), split) for rest in ((4, 1), (8, 1), (4, 2)) for split in (True, False)),
        ("mlra_4", (1, 1, 1, 1), False),
        ("mlra_4", (2, 1, 2, 2), True),
        ("mlra_2_gated", (1, 1, 2, 1), True),
        ("mlra_2_gated", (1, 1, 4, 2), False),
        ("mlra_2_gated", (1, 1, 8, 1), True),
        ("mlra_2_gated", (1, 1, 8, 1), False),
        ("mlra_8_2", (1, 1, 4, 1), False),
        ("mla", (1, 1, 4, 1), True),
        ("mla", (2, 1, 4, 1), False),
        ("gla_2", (1, 1, 4, 2), True),
        ("gqa", (1, 1, 8, 1), True),
        ("gqa", (2, 1, 2, 2), False),
        ("mqa_gated", (1, 1, 2, 4), True),
        ("mha", (1, 1, 8, 1), True),
        ("mfa", (1, 1, 4, 2), True),
        ("gta", (1, 1, 8, 1), True),
        ("gta", (2, 1, 2, 2), False),
        ("tpa_gated", (1, 1, 8, 1), True),
        ("tpa_gated", (2, 1, 2, 2), False),
    ],
    ids=str,
)
def test_decoding_in_ragged_chunks_on_a_mesh_gives_the_logits_of_the_full_forward_pass(
    whole, on_mesh, name, sizes, split_heads
):
    check_decoding(*whole(name), on_mesh, MODELS[name], sizes, split_heads)


@pytest.mark.parametrize(("sizes", "split_heads"), [((1, 1, 4, 1), False), ((2, 1, 2, 2), True)], ids=str)
def test_decoding_with_products_made_on_each_device_gives_the_same(whole, on_mesh, sizes, split_heads):
    with choose(skinny_gemm="reference", swiglu="reference"):
        check_decoding(*whole("mlra_4"), on_mesh, MODELS["mlra_4"], sizes, split_heads)


def check_decoding(params, expected, on_mesh, config, sizes, split_heads):
    _, logits, _ = expected
    rules = decode_rules(split_heads)
    chunk = 6
    padded = np.pad(TOKENS, ((0, 0), (0, chunk)))
    with on_mesh(*sizes):
        model = jax.jit(functools.partial(to_decode, config, rules=rules))(params)
        step = jax.jit(lambda model, tokens, cache, n_new: model.decode(tokens, cache, n_new))
        cache = Cache.create(config, rules, BATCH, 20, page_size=4)
        # What was never written must not matter.
        poison = lambda x: jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x
        cache = jax.tree.map(poison, cache)
        layouts = jax.tree.map(lambda x: x.sharding, cache)
        done = np.zeros(BATCH, np.int32)
        for n_new in ([5, 3, 6, 1, 6, 2, 0, 4], [6, 6, 6, 5, 0, 6, 3, 1], [1, 6, 2, 6, 5, 6, 6, 6]):
            new = np.stack([row[i : i + chunk] for row, i in zip(padded, done, strict=True)])
            out, cache = step(model, new, cache, np.array(n_new, np.int32))
            out = np.asarray(out)
            for row, n in enumerate(n_new):
                expected = logits[row, done[row] : done[row] + n]
                np.testing.assert_allclose(out[row, :n], expected, rtol=0, atol=2e-5)
            done += n_new
        assert np.asarray(cache.lengths).tolist() == done.tolist()
        assert jax.tree.map(lambda x: x.sharding, cache) == layouts
