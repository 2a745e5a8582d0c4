"""An MLA turned into an MLRA: what is exact, and what is best."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.config import ConfigError
from mlra_jax.convert import LazyStack, split_config, split_latents
from mlra_jax.model import Transformer, from_params
from tests.definitions import SMALL

MLA = LatentAttentionConfig(1, 1, q_lora_rank=12, kv_lora_rank=16, d_nope=4, d_rope=2)


def model(attention, **options):
    return dataclasses.replace(SMALL, d_model=24, n_heads=8, attention=attention, **options)


def random_params(config):
    rng = np.random.default_rng(0)
    state = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), nnx.Param)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), nnx.to_pure_dict(state))


def made(params):
    return jax.tree.map(np.asarray, params)


def logits(config, params):
    tokens = jnp.arange(14).reshape(2, 7)
    return jax.jit(lambda params: from_params(config, params)(tokens))(made(params))


@pytest.mark.parametrize(
    ("before", "after", "scale_latents", "seed"),
    [
        ((1, 1), (4, 4), True, 0),
        ((1, 1), (2, 2), False, None),
        ((2, 1), (4, 2), True, None),
        ((2, 2), (8, 8), False, 0),
    ],
)
def test_nothing_changes_where_neither_the_softmax_nor_the_norm_sees_the_content(
    before, after, scale_latents, seed
):
    # An epsilon that outweighs the latent makes its norm a constant; without W_UK, scores are the rotary key's alone.
    attention = dataclasses.replace(
        MLA, n_latent_heads=before[0], n_branches=before[1], scale_latents=scale_latents
    )
    config = model(attention, norm_eps=1e4)
    params = random_params(config)
    params["layers"]["attention"]["w_uk"][...] = 0
    split, new = split_latents(params, config, *after, seed=seed)
    assert (new.attention.n_latent_heads, new.attention.n_branches) == after
    assert new.attention.q_lora_rank == config.attention.q_lora_rank
    expected = logits(config, params)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits(new, split), expected, rtol=1e-3, atol=2e-5)


def products(config, params):
    """For each query head the product of W_KVA, gain and W_UK or W_UV, with the scales that the model gives them."""
    a, p = config.attention, made(params)["layers"]["attention"]
    m = config.heads_per_latent
    kv_scale = np.sqrt(config.d_model / a.d_latent)

    def product(w, n):
        latents = [(j, j * a.n_groups + n // m) for j in range(a.n_branches)]
        return sum(
            np.einsum(
                "idc,ic,ich->idh",
                p["w_kva"][:, :, head],
                kv_scale * p["kv_norm"]["gain"][:, head],
                w[:, j, n],
            )
            for j, head in latents
        )

    heads = range(config.n_heads)
    keys = np.stack([product(p["w_uk"], n) for n in heads])
    values = np.stack([product(p["w_uv"], n) for n in heads]) / np.sqrt(a.n_branches)
    return keys, values


def test_branches_together_have_the_keys_and_values_of_the_whole():
    config = model(MLA)
    params = random_params(config)
    keys, values = products(config, params)
    for key_scale in (None, 3.0):
        split, new = split_latents(params, config, 4, 4, key_scale=key_scale)
        new_keys, new_values = products(new, split)
        # Each branch sees a quarter of the score: its keys are as much longer as there are pieces.
        np.testing.assert_allclose(new_keys, (key_scale or 4) * keys, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(new_values, values, rtol=1e-4, atol=1e-3)
    assert np.all(made(split)["layers"]["attention"]["kv_norm"]["gain"] == 1)


@pytest.mark.parametrize("after", [(2, 1), (4, 2), (4, 1)])
def test_a_group_that_reads_a_part_reads_the_part_that_it_needs_most(after):
    config = model(MLA)
    params = random_params(config)
    attention = params["layers"]["attention"]
    # The heads of each group need their own directions of the latent, none of them along its axes.
    rng, groups = np.random.default_rng(1), after[0] // after[1]
    width, m = 16 // groups, 8 // groups
    needed = np.linalg.qr(rng.standard_normal((16, 16)))[0].reshape(16, groups, width)
    attention["kv_norm"]["gain"][...] = 1
    for name in ("w_uk", "w_uv"):
        for n in range(8):
            attention[name][:, 0, n] = needed[:, n // m] @ rng.standard_normal((width, 4))
    keys, values = products(config, params)
    split, new = split_latents(params, config, *after)
    new_keys, new_values = products(new, split)
    np.testing.assert_allclose(new_keys, after[1] * keys, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(new_values, values, rtol=1e-4, atol=1e-3)


def test_changed_parameters_are_made_layer_by_layer_and_all_others_passed_on():
    config = model(MLA)
    params = random_params(config)
    split, _ = split_latents(params, config, 4, 4)
    attention = split["layers"]["attention"]
    assert {k for k, v in attention.items() if isinstance(v, LazyStack)} == {"w_kva", "w_uk", "w_uv"}
    assert split["layers"]["mlp"]["w_up"] is params["layers"]["mlp"]["w_up"]
    again, _ = split_latents(params, config, 4, 4)
    np.testing.assert_array_equal(
        np.asarray(attention["w_uk"][1]), made(again)["layers"]["attention"]["w_uk"][1]
    )
    other, _ = split_latents(params, config, 4, 4, seed=1)
    assert not np.allclose(
        made(other)["layers"]["attention"]["w_uk"], made(again)["layers"]["attention"]["w_uk"]
    )


@pytest.mark.parametrize(
    ("attention", "after", "said"),
    [
        (GroupedAttentionConfig(2, 4), (4, 4), "Only latent attention"),
        (MLA, (1, 1), "n_latent_heads=1 must be twice, or another multiple of, the 1 of the model"),
        (dataclasses.replace(MLA, n_latent_heads=4), (2, 1), "n_latent_heads=2 must be twice"),
        (
            dataclasses.replace(MLA, n_latent_heads=2, n_branches=2),
            (4, 1),
            "n_branches=1 must be a multiple of the 2",
        ),
        (
            dataclasses.replace(MLA, n_latent_heads=4, n_branches=1),
            (8, 8),
            "n_latent_heads/n_branches=1 of its 4",
        ),
        (MLA, (3, 3), "kv_lora_rank=16 is not divisible by n_latent_heads=3"),
        (MLA, (16, 1), "n_heads=8 is not divisible"),
    ],
)
def test_what_cannot_be_split_so_is_refused(attention, after, said):
    with pytest.raises(ConfigError, match=said):
        split_config(model(attention), *after)
