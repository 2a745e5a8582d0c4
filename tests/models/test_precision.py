"""bfloat16 compute against a plain bfloat16 model written here, with float32 as the truth."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlra_jax.config import LatentAttentionConfig
from mlra_jax.convert import params_from_official
from mlra_jax.decoding.cache import Cache
from mlra_jax.models import from_params, to_decode
from mlra_jax.sharding import TRAIN_RULES, AxisRules, decode_rules
from mlra_jax.training.losses import cross_entropy


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

    def grouped_attention(p, x):
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, p[w]) for w in ("w_q", "w_k", "w_v"))
        spread = lambda x: jnp.repeat(x, config.heads_per_latent, axis=2)
        return attend(rope(q), spread(rope(k)), spread(v))

    attention = latent_attention if isinstance(a, LatentAttentionConfig) else grouped_attention
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


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [("mlra_4_gated", ()), ("mla", ()), ("gqa", ()), ("mlra_4", (1, 1, 4, 1))],
    ids=str,
)
def test_bfloat16_compute_is_no_further_from_float32_than_twice_a_plain_bfloat16_model(
    parity, on_mesh, variant, sizes
):
    case = parity(variant)
    tokens, targets, truth = (case.expected[name] for name in ("input_ids", "targets", "logits"))
    config = dataclasses.replace(case.config, compute_dtype="bfloat16")
    official = {k.removeprefix("grad/"): g for k, g in case.expected.items() if k.startswith("grad/")}
    true_grads = params_from_official(official, case.config)
    exact = jax.jit(lambda params: plain_logits(config, params, tokens, jnp.float32))(case.params)
    np.testing.assert_allclose(exact, truth, rtol=0, atol=2e-5)  # or the plain model is another one

    def errors(model):
        def loss(params):
            logits = model(params)
            return jnp.divide(*cross_entropy(logits, targets)), logits

        (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(case.params)
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
        model = to_decode(config, case.params, rules)
        cache = Cache.create(config, rules, batch, length)
        assert {x.dtype for x in cache.layers[0].arrays.values()} == {jnp.dtype("bfloat16")}
        decoded, _ = jax.jit(lambda *args: model.decode(*args))(tokens, cache, jnp.full(batch, length))
    assert np.all(distances(decoded) <= 2 * plain), (distances(decoded), plain)
