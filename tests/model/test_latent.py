"""Latent attention against its equations (`mlra_jax.reference`), for any legal sizes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax import reference
from mlra_jax.attention.kv_cache import Cache
from mlra_jax.attention.latent import LatentAttention, LatentAttentionConfig
from mlra_jax.config import ExecutionConfig, ModelConfig, RotaryScalingConfig
from mlra_jax.model import from_params
from mlra_jax.sharding import AxisRules
from tests.definitions import YARN


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
        rotary_scaling=draw(st.sampled_from([RotaryScalingConfig(), YARN])),
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
def test_forward_and_decoding_equal_the_equations_for_any_legal_sizes(config, form, length, seed):
    assert config.faults() == []
    rng, batch, rules = np.random.default_rng(seed), 2, AxisRules()
    execution = ExecutionConfig(attention_form=form)
    make = lambda layout: LatentAttention(
        config, rngs=nnx.Rngs(0), rules=rules, layout=layout, execution=execution
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: make("train")))
    shapes = nnx.to_pure_dict(state)
    draw = lambda shape: rng.standard_normal(shape).astype(np.float32)
    params = jax.tree.map(lambda x: draw(x.shape) / math.sqrt(x.shape[0]), shapes)
    x = draw((batch, length, config.d_model))
    expected = np.asarray(jax.jit(reference.attention, static_argnums=1)(params, config, x))

    def merged(graph, state, values):
        nnx.replace_by_pure_dict(state, values)
        return nnx.merge(graph, state)

    forward = jax.jit(lambda values, x: merged(graph, state, values)(x))(params, x)
    # Normalising a latent that is nearly zero, as one of width 1 easily is, magnifies rounding; mistakes are larger.
    tolerance = 1e-3 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(forward, expected, rtol=0, atol=tolerance)

    # Decoding: the same values, laid out by slot; the first rows of each sequence in one call, the rest in another.
    graph, state = nnx.split(nnx.eval_shape(lambda: make("decode")))
    made = {k: (v.sources, v.make) for k, v in LatentAttention.decode_leaves(config, rules).items()}

    @jax.jit
    def laid_out(params):
        flat = nnx.traversals.flatten_mapping(params)
        given = {".".join(path): leaf for path, leaf in flat.items()}
        values = {}
        for path, _ in nnx.to_flat_state(state):
            name = ".".join(path)
            sources, make = made.get(name, ((name,), lambda leaf: leaf))
            values[path] = make(*(given[source] for source in sources))
        return nnx.traversals.unflatten_mapping(values)

    values = laid_out(params)
    step = jax.jit(lambda values, *args: merged(graph, state, values).decode(*args))
    cache = jax.jit(lambda: Cache.create(config, rules, batch, length, page_size=2))().layers[0]
    first, start = np.array([1, length - 1]), np.zeros(batch, np.int32)
    outputs = np.zeros_like(expected)
    for n_new in (first, length - first):
        chunk = np.stack(
            [np.resize(row[i : i + n], row.shape) for row, i, n in zip(x, start, n_new, strict=True)]
        )
        y, cache = step(values, chunk, cache, start, n_new)
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
