"""Latent attention against its formulas, for any legal sizes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax.attention.kv_cache import Cache
from mlra_jax.attention.latent import LatentAttention, LatentAttentionConfig
from mlra_jax.config import ExecutionConfig, ModelConfig
from mlra_jax.model import from_params
from mlra_jax.sharding import AxisRules


def rms_norm(x, gain):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * gain


def rotated(x, position):
    half = len(x) // 2
    angle = position * 10000.0 ** (-np.arange(half) / half) if half else np.zeros(0)
    a, b = x[:half], x[half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])


def latent_attention(p, a, x):
    """The formulas of the module's docstring for one sequence x [T, D], one query, head and branch at a time."""
    (length, d), n_heads = x.shape, p["w_qb"].shape[1]
    scale = lambda width: math.sqrt(d / width) if a.scale_latents else 1.0
    q = np.einsum(
        "TA,ANE->TNE", rms_norm(x @ p["w_qa"], p["q_norm"]["gain"]) * scale(a.q_lora_rank), p["w_qb"]
    )
    latent = rms_norm(np.einsum("TD,DLC->TLC", x, p["w_kva"]), p["kv_norm"]["gain"]) * scale(a.d_latent)
    k_rope = np.array([rotated(k, t) for t, k in enumerate(x @ p["w_kr"])]).reshape(length, a.d_rope)
    heads_per_group = n_heads // a.n_groups
    y = np.zeros((length, n_heads, a.d_nope))
    for n in range(n_heads):
        for j in range(a.n_branches):
            read = latent[:, j * a.n_groups + n // heads_per_group]
            k, v = read @ p["w_uk"][j, n], read @ p["w_uv"][j, n]
            for t in range(length):
                q_rope = rotated(q[t, n, a.d_nope :], t)
                scores = (k[: t + 1] @ q[t, n, : a.d_nope] + k_rope[: t + 1] @ q_rope) / math.sqrt(
                    a.d_nope + a.d_rope
                )
                weights = np.exp(scores - scores.max())
                y[t, n] += weights / weights.sum() @ v[: t + 1]
    y *= 1 / math.sqrt(a.n_branches) if a.scale_latents else 1.0
    if "w_gate" in p["output"]:
        y /= 1 + np.exp(-np.einsum("TD,DNH->TNH", x, p["output"]["w_gate"]))
    return np.einsum("TNH,NHD->TD", y, p["output"]["w_o"])


@st.composite
def model_configs(draw):
    branches, groups = draw(st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2)]))
    heads = branches * groups
    attention = LatentAttentionConfig(
        n_latent_heads=heads,
        n_branches=branches,
        q_lora_rank=draw(st.integers(1, 9)),
        kv_lora_rank=heads * draw(st.integers(1, 9)),
        d_nope=draw(st.integers(1, 9)),
        d_rope=2 * draw(st.integers(0, 4)),
        scale_latents=draw(st.booleans()),
    )
    return ModelConfig(
        n_layers=1,
        d_model=draw(st.integers(1, 20)),
        n_heads=groups * draw(st.integers(1, 4)),
        attention=attention,
        gated_attention=draw(st.booleans()),
        output_init="normal",
        init_std=0.5,
        compute_dtype="float32",
    )


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    config=model_configs(),
    form=st.sampled_from(["auto", "expanded", "absorbed"]),
    length=st.integers(2, 7),
    seed=st.integers(0, 99),
)
def test_forward_and_decoding_equal_the_formulas_for_any_legal_sizes(config, form, length, seed):
    assert config.faults() == []
    rng, batch, rules = np.random.default_rng(seed), 2, AxisRules()
    execution = ExecutionConfig(attention_form=form)
    make = lambda layout: LatentAttention(
        config, rngs=nnx.Rngs(0), rules=rules, layout=layout, execution=execution
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: make("train")))
    shapes = nnx.to_pure_dict(state)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape) / math.sqrt(x.shape[0]), shapes)
    x = rng.standard_normal((batch, length, config.d_model))
    expected = np.stack([latent_attention(params, config.attention, row) for row in x])
    to_float32 = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(leaf, jnp.float32))

    def merged(graph, state, values):
        nnx.replace_by_pure_dict(state, values)
        return nnx.merge(graph, state)

    x32 = jnp.asarray(x, jnp.float32)
    forward = jax.jit(lambda values, x: merged(graph, state, values)(x))(to_float32(params), x32)
    # Normalising a latent that is nearly zero, as one of width 1 easily is, magnifies rounding; mistakes are larger.
    tolerance = 1e-3 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(forward, expected, rtol=0, atol=tolerance)

    # Decoding: the same values, laid out by slot; the first rows of each sequence in one call, the rest in another.
    graph, state = nnx.split(nnx.eval_shape(lambda: make("decode")))
    flat = nnx.traversals.flatten_mapping(to_float32(params))
    given = {".".join(path): leaf for path, leaf in flat.items()}
    made = {k: (v.sources, v.make) for k, v in LatentAttention.decode_leaves(config, rules).items()}
    for path, _ in nnx.to_flat_state(state):
        name = ".".join(path)
        sources, make = made.get(name, ((name,), lambda leaf: leaf))
        flat[path] = make(*(given[source] for source in sources))
    decoded = {path for path, _ in nnx.to_flat_state(state)}
    values = nnx.traversals.unflatten_mapping({k: v for k, v in flat.items() if k in decoded})
    step = jax.jit(lambda values, *args: merged(graph, state, values).decode(*args))
    cache = Cache.create(config, rules, batch, length, page_size=2).layers[0]
    first, start = np.array([1, length - 1]), np.zeros(batch, np.int32)
    outputs = np.zeros_like(expected)
    for n_new in (first, length - first):
        chunk = np.stack(
            [np.resize(row[i : i + n], row.shape) for row, i, n in zip(x, start, n_new, strict=True)]
        )
        y, cache = step(
            values, jnp.asarray(chunk, jnp.float32), cache, jnp.asarray(start), jnp.asarray(n_new)
        )
        for row, (i, n) in enumerate(zip(start, n_new, strict=True)):
            outputs[row, i : i + n] = y[row, :n]
        start = start + n_new
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant", ["mlra_2", "mla"])
def test_expanded_and_absorbed_give_the_same_logits_and_gradients(parity, variant):
    case = parity(variant)
    tokens = case.expected["input_ids"]

    def run(form):
        execution = ExecutionConfig(attention_form=form, remat="none")

        def loss(params):
            logits = from_params(case.config, params, execution=execution)(tokens)
            return jnp.mean(logits**2), logits

        (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(case.params)
        return logits, grads

    (logits, grads), (other_logits, other_grads) = run("expanded"), run("absorbed")
    np.testing.assert_allclose(logits, other_logits, rtol=0, atol=2e-5)
    off = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b)), grads, other_grads)
    assert max(jax.tree.leaves(off)) < 1e-5, off


@pytest.mark.parametrize(
    ("kv_lora_rank", "absorbs"),
    [(64, True), (68, False), (60, True)],  # C = 16, 17, 15
)
def test_auto_takes_the_form_with_fewer_flops(kv_lora_rank, absorbs):
    attention = LatentAttentionConfig(4, 4, q_lora_rank=8, kv_lora_rank=kv_lora_rank, d_nope=16, d_rope=8)
    config = ModelConfig(n_layers=1, d_model=8, n_heads=4, attention=attention)
    assert nnx.eval_shape(lambda: LatentAttention(config, rngs=nnx.Rngs(0))).absorbs is absorbs


def test_a_layout_refuses_the_other_layouts_call():
    attention = LatentAttentionConfig(1, 1, q_lora_rank=4, kv_lora_rank=4, d_nope=4, d_rope=4)
    config = ModelConfig(n_layers=1, d_model=8, n_heads=2, vocab_size=16, d_ff=8, attention=attention)
    train = LatentAttention(config, rngs=nnx.Rngs(0))
    decode = LatentAttention(config, rngs=nnx.Rngs(0), layout="decode")
    cache = Cache.create(config, AxisRules(), 1, 4).layers[0]
    with pytest.raises(NotImplementedError, match="to_decode"):
        train.decode(jnp.zeros((1, 1, 8)), cache, jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32))
    with pytest.raises(NotImplementedError, match="layout='train'"):
        decode(jnp.zeros((1, 1, 8)))
