"""bfloat16 compute against a plain bfloat16 model written here, with float32 as the truth."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.attention.kv_cache import Cache
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.attention.tensor_product import TensorProductAttentionConfig
from mlra_jax.attention.tied import TiedAttentionConfig
from mlra_jax.config import ModelConfig
from mlra_jax.convert import params_from_official
from mlra_jax.model import Transformer, from_params, to_decode
from mlra_jax.sharding import TRAIN_RULES, AxisRules, decode_rules
from tests.definitions import cross_entropy


def plain_logits(config, params, tokens, dtype):
    """The model as one writes it down first: the result of every operation is rounded to `dtype`."""
    a, length = config.attention, tokens.shape[1]
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    positions = np.arange(length)

    def norm(x, gain):
        x = x.astype(jnp.float32)
        return (x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)).astype(dtype) * gain

    def rope(x):  # [B, T, heads, R]
        half = x.shape[-1] // 2
        angle = positions[:, None, None] * 10000.0 ** (-np.arange(half) / half)
        cos, sin = jnp.asarray(np.cos(angle), dtype), jnp.asarray(np.sin(angle), dtype)
        first, second = x[..., :half], x[..., half:]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def attend(q, k, v):  # [B, T, N, width]
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) * dtype(1 / math.sqrt(q.shape[-1]))
        scores = jnp.where(positions[:, None] >= positions, scores, -jnp.inf)
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(dtype)
        return jnp.einsum("bnts,bsnh->btnh", weights, v)

    def latent_attention(p, x):
        d, per_group = config.d_model, config.heads_per_latent
        q = norm(jnp.einsum("btd,da->bta", x, p["w_qa"]), p["q_norm"]["gain"]) * dtype(
            math.sqrt(d / a.q_lora_rank)
        )
        q = jnp.einsum("bta,ane->btne", q, p["w_qb"])
        q = jnp.concatenate([q[..., : a.d_nope], rope(q[..., a.d_nope :])], axis=-1)
        latent = norm(jnp.einsum("btd,dlc->btlc", x, p["w_kva"]), p["kv_norm"]["gain"])
        latent = latent * dtype(math.sqrt(d / a.d_latent))
        k_rope = rope((x @ p["w_kr"])[:, :, None])
        branches = []
        for j in range(a.n_branches):
            mine = jnp.repeat(latent[:, :, j * a.n_groups : (j + 1) * a.n_groups], per_group, axis=2)
            k, v = (jnp.einsum("btnc,nch->btnh", mine, p[w][j]) for w in ("w_uk", "w_uv"))
            k = jnp.concatenate([k, jnp.broadcast_to(k_rope, (*k.shape[:3], a.d_rope))], axis=-1)
            branches.append(attend(q, k, v))
        return sum(branches) * dtype(1 / math.sqrt(a.n_branches))

    spread = lambda x: jnp.repeat(x, config.heads_per_latent, axis=2)
    product = lambda x, w: jnp.einsum("btd,dnh->btnh", x, w)

    def grouped_attention(p, x):
        k, v = product(x, p["w_k"]), product(x, p["w_v"])
        q_in = norm(x @ p["w_qa"], p["q_norm"]["gain"]) if "w_qa" in p else x
        return attend(rope(product(q_in, p["w_q"])), spread(rope(k)), spread(v))

    def tied_attention(p, x):
        half = a.d_head // 2
        q, kv, k_rope = product(x, p["w_q"]), product(x, p["w_kv"]), rope((x @ p["w_kr"])[:, :, None])
        q = jnp.concatenate([q[..., :half], rope(q[..., half:])], axis=-1)
        k_rope = jnp.broadcast_to(k_rope, (*kv.shape[:3], half))
        return attend(q, spread(jnp.concatenate([kv[..., :half], k_rope], axis=-1)), spread(kv))

    def tensor_product_attention(p, x):
        def made(name, r, turn):
            left, right = product(x, p[f"w_a{name}"]), turn(product(x, p[f"w_b{name}"]))
            return jnp.einsum("btnr,btrh->btnh", left, right) * dtype(1 / r)

        return attend(
            made("q", a.q_rank, rope), made("k", a.rank, rope), made("v", a.rank, lambda right: right)
        )

    attention = {
        LatentAttentionConfig: latent_attention,
        GroupedAttentionConfig: grouped_attention,
        TiedAttentionConfig: tied_attention,
        TensorProductAttentionConfig: tensor_product_attention,
    }[type(a)]
    x = params["embedding"]["table"][tokens]
    for i in range(config.n_layers):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        h = norm(x, p["attention_norm"]["gain"])
        y = attention(p["attention"], h)
        if config.gated_attention:
            y = y * jax.nn.sigmoid(jnp.einsum("btd,dnh->btnh", h, p["attention"]["output"]["w_gate"]))
        x = x + jnp.einsum("btnh,nhd->btd", y, p["attention"]["output"]["w_o"])
        h, mlp = norm(x, p["mlp_norm"]["gain"]), p["mlp"]
        x = x + (jax.nn.silu(h @ mlp["w_gate"]) * (h @ mlp["w_up"])) @ mlp["w_down"]
    return (norm(x, params["final_norm"]["gain"]) @ params["embedding"]["table"].T).astype(jnp.float32)


def whole_vocabulary(rules):
    """`rules` without the split of the vocabulary: the 257 ids of the official models are divisible by nothing."""
    return AxisRules(tuple(rule for rule in rules.table if rule[0] != "vocab"))


OTHERS = {
    "mfa": GroupedAttentionConfig(1, 24, q_lora_rank=20),
    "gta": TiedAttentionConfig(2, 16),
    "tpa": TensorProductAttentionConfig(2, 3, 16),
}


@pytest.fixture
def case_of(parity):
    """`case_of(variant)`: configuration, parameters, tokens, targets, and exact logits and gradients.

    Exact is what the official code gave; where there is nothing, the plain model in float32.
    """

    def official(case):
        expected = case.expected
        named = {k.removeprefix("grad/"): g for k, g in expected.items() if k.startswith("grad/")}
        grads = params_from_official(named, case.config)
        tokens, targets, logits = (expected[name] for name in ("input_ids", "targets", "logits"))
        exact = jax.jit(lambda params: plain_logits(case.config, params, tokens, jnp.float32))(case.params)
        np.testing.assert_allclose(exact, logits, rtol=0, atol=2e-5)  # or the plain model is another one
        return case.config, case.params, tokens, targets, logits, grads

    def make(variant):
        if variant not in OTHERS:
            return official(parity(variant))
        config = ModelConfig(257, 1, 48, 4, 80, OTHERS[variant], compute_dtype="float32")
        rng = np.random.default_rng(0)
        state = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), nnx.Param)
        mean = lambda path: np.float32(path[-1].key == "gain")
        random = lambda path, x: mean(path) + 0.15 * rng.standard_normal(x.shape, np.float32)
        params = jax.tree_util.tree_map_with_path(random, nnx.to_pure_dict(state))
        tokens, targets = rng.integers(0, 257, (2, 2, 33), dtype=np.int32)

        def loss(params):
            logits = plain_logits(config, params, tokens, jnp.float32)
            return jnp.divide(*cross_entropy(logits, targets)), logits

        (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return config, params, tokens, targets, logits, grads

    return make


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [
        *(("gqa", ()), ("mlra_4", (1, 1, 4, 1))),
        *(pytest.param(variant, (), marks=pytest.mark.slow) for variant in ("mlra_4_gated", "mla")),
        *((variant, ()) for variant in OTHERS),
    ],
    ids=str,
)
def test_bfloat16_compute_is_no_further_from_float32_than_twice_a_plain_bfloat16_model(
    case_of, on_mesh, variant, sizes
):
    exact_config, params, tokens, targets, truth, true_grads = case_of(variant)
    config = dataclasses.replace(exact_config, compute_dtype="bfloat16")

    def errors(model):
        def loss(params):
            logits = model(params)
            return jnp.divide(*cross_entropy(logits, targets)), logits

        (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        off = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b)), grads, true_grads)
        return distances(logits), nnx.traversals.flatten_mapping(off, sep=".")

    distances = lambda logits: np.array(
        [np.abs(logits - truth).max(), np.sqrt(np.mean((logits - truth) ** 2))]
    )
    plain, plain_grads = errors(lambda params: plain_logits(config, params, tokens, jnp.bfloat16))
    with on_mesh(*sizes):
        ours, our_grads = errors(
            lambda params: from_params(config, params, rules=whole_vocabulary(TRAIN_RULES))(tokens)
        )
    assert np.all(ours <= 2 * plain), (ours, plain)
    assert ours[1] > 1e-4  # or it was not bfloat16
    assert {k: (e, plain_grads[k]) for k, e in our_grads.items() if e > 2 * plain_grads[k]} == {}

    rules, (batch, length) = whole_vocabulary(decode_rules()), tokens.shape
    with on_mesh(*sizes):
        model = to_decode(config, params, rules)
        cache = Cache.create(config, rules, batch, length)
        assert {x.dtype for x in cache.layers[0].arrays.values()} == {jnp.dtype("bfloat16")}
        decoded, _ = jax.jit(lambda *args: model.decode(*args))(tokens, cache, jnp.full(batch, length))
    assert np.all(distances(decoded) <= 2 * plain), (distances(decoded), plain)
