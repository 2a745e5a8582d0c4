"""The modules as a library: no mesh, an Auto mesh, or a mesh and a table of the caller's; inside and outside `jit`."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.attention.kv_cache import Cache
from mlra_jax.attention.tensor_product import TensorProductAttentionConfig
from mlra_jax.attention.tied import TiedAttentionConfig
from mlra_jax.model import Transformer, from_params, to_decode
from mlra_jax.sharding import TRAIN_RULES, AxisRules, decode_rules
from tests.definitions import TINY

LATENT = dataclasses.replace(TINY, n_layers=1, output_init="normal", init_std=0.3)
TOKENS = np.random.default_rng(0).integers(0, 32, (4, 8), dtype=np.int32)

OTHER = AxisRules.of(
    batch="rows", heads="columns", kv_heads="columns", mlp="columns", vocab="columns", length="depth"
)
COLUMNS = dict.fromkeys(("heads", "kv_head_shards", "mlp", "vocab"), "columns")
OTHER_DECODE = AxisRules.of(batch="rows", cache_length="depth", **COLUMNS)
MINE, EXPLICIT, AUTO = ("data", "fsdp", "tensor", "context"), AxisType.Explicit, AxisType.Auto
SETTINGS = {
    # axis names, sizes, type; training and decoding table
    "no mesh": (None, TRAIN_RULES, decode_rules()),
    "Auto mesh": ((MINE, (2, 1, 2, 2), AUTO), TRAIN_RULES, decode_rules()),
    "other axis names": ((("rows", "columns", "depth"), (2, 2, 2), EXPLICIT), OTHER, OTHER_DECODE),
    "a table that splits nothing": ((("i", "j"), (4, 2), EXPLICIT), AxisRules(), AxisRules()),
    "our table, other axis names": ((("i", "j"), (4, 2), EXPLICIT), TRAIN_RULES, decode_rules()),
}


def enter(mesh):
    if mesh is None:
        return contextlib.nullcontext()
    names, sizes, kind = mesh
    return jax.set_mesh(
        jax.make_mesh(sizes, names, (kind,) * len(names), devices=jax.devices()[: np.prod(sizes)])
    )


def logits_and_gradients(config, rules, params, tokens):
    def loss(params):
        logits = from_params(config, params, rules=rules)(tokens)
        return jnp.mean(logits**2), logits

    (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return logits, grads


def decoded(config, rules, params, tokens, jit):
    """Logits of cached decoding, in two chunks."""
    model = to_decode(config, params, rules)
    step = jit(lambda model, tokens, cache: model.decode(tokens, cache, jnp.full(4, 4)))
    first, cache = step(model, tokens[:, :4], Cache.create(config, rules, 4, 8, page_size=2))
    second, cache = step(model, tokens[:, 4:], cache)
    return np.concatenate([first, second], axis=1)


@pytest.fixture(scope="module")
def plain():
    """`plain(config)`: parameters, and logits and gradients without a mesh."""

    @functools.cache
    def compute(config):
        params = jax.jit(
            lambda: nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(0)), nnx.Param))
        )()
        result = jax.jit(functools.partial(logits_and_gradients, config, TRAIN_RULES))(params, TOKENS)
        return jax.tree.map(np.asarray, (params, *result))

    return compute


def check(plain, setting, config, jit):
    mesh, rules, decoding = SETTINGS[setting]
    params, logits, grads = plain(config)
    with enter(mesh):
        params, tokens = jax.tree.map(jnp.asarray, (params, TOKENS))
        got, got_grads = jit(functools.partial(logits_and_gradients, config, rules))(params, tokens)
        got_decoded = decoded(config, decoding, params, tokens, jit)
    np.testing.assert_allclose(got, logits, rtol=0, atol=2e-5)
    np.testing.assert_allclose(got_decoded, logits, rtol=0, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got_grads, grads)


@pytest.mark.parametrize("setting", SETTINGS)
def test_forward_gradient_and_decode_agree_inside_jit(plain, setting):
    check(plain, setting, LATENT, jax.jit)


@pytest.mark.parametrize(
    "setting",
    ["no mesh", *(pytest.param(s, marks=pytest.mark.slow) for s in ("Auto mesh", "other axis names"))],
)
def test_forward_gradient_and_decode_agree_outside_jit(plain, setting):
    check(plain, setting, LATENT, lambda f: f)


@pytest.mark.parametrize(
    ("setting", "attention"),
    [
        ("other axis names", GroupedAttentionConfig(2, 4)),
        ("Auto mesh", GroupedAttentionConfig(1, 4, q_lora_rank=6)),
        ("Auto mesh", TiedAttentionConfig(2, 8)),
        ("other axis names", TensorProductAttentionConfig(2, 3, 4)),
    ],
    ids=str,
)
def test_the_other_attentions_agree_as_well(plain, setting, attention):
    check(plain, setting, dataclasses.replace(LATENT, attention=attention), jax.jit)


def test_arrays_split_by_the_caller_run_under_jit_without_a_current_mesh(plain):
    params, logits, grads = plain(LATENT)
    mesh = jax.make_mesh((2, 4), ("rows", "columns"), (AUTO, AUTO))
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("rows"))
    split = lambda x: NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "columns"))
    params = jax.tree.map(lambda x: jax.device_put(x, split(x)), params)
    run = jax.jit(functools.partial(logits_and_gradients, LATENT, TRAIN_RULES), out_shardings=whole)
    got, got_grads = run(params, jax.device_put(TOKENS, rows))
    np.testing.assert_allclose(got, logits, rtol=0, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got_grads, grads)


@pytest.mark.parametrize("setting", ["Auto mesh", "other axis names"])
def test_a_model_built_outside_jit_is_split_as_the_table_says_and_runs_compiled(setting):
    mesh, rules, _ = SETTINGS[setting]
    with enter(mesh):
        model = Transformer(LATENT, rngs=nnx.Rngs(0), rules=rules)
        assert jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(TOKENS)).shape == (4, 8, 32)
    w_qb = model.layers.attention.w_qb[...]  # half of the four heads on each device
    assert w_qb.addressable_shards[0].data.shape == (1, 8, 2, 8)
