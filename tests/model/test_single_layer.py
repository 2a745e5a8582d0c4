"""One attention layer in a model of one's own: laid out for decoding, with a cache, by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.attention.tensor_product import TensorProductAttentionConfig
from mlra_jax.attention.tied import TiedAttentionConfig
from mlra_jax.config import ModelConfig
from mlra_jax.model import Transformer

SIZES = {"d_model": 16, "n_heads": 4, "compute_dtype": "float32", "output_init": "normal", "init_std": 0.3}
LATENT = LatentAttentionConfig(4, 2, q_lora_rank=8, kv_lora_rank=16, d_nope=4, d_rope=4)
X_BTD = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)


def layer(attention, **options):
    config = ModelConfig(attention=attention, **SIZES)
    return attention.module()(config, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize(
    "attention",
    [
        pytest.param(LATENT, marks=pytest.mark.smoke),
        GroupedAttentionConfig(2, 8),
        TiedAttentionConfig(2, 8),
        TensorProductAttentionConfig(2, 3, 8),
    ],
    ids=lambda attention: type(attention).__name__,
)
def test_decoding_token_by_token_without_a_mesh_gives_the_whole_sequence(attention):
    whole = layer(attention)
    expected = jax.jit(lambda layer, x: layer(x))(whole, X_BTD)
    decoder = whole.to_decode()
    step = jax.jit(lambda decoder, *args: decoder.decode(*args))
    cache, outputs = decoder.init_cache(batch=2, max_len=5), []
    for t in range(5):
        start, new = jnp.full(2, t), jnp.ones(2, jnp.int32)
        y_B1D, cache = step(decoder, X_BTD[:, t : t + 1], cache, start, new)
        outputs.append(np.asarray(y_B1D))
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), expected, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="already in the decode layout"):
        decoder.to_decode()


def test_a_training_state_in_a_decode_module_is_refused():
    config = ModelConfig(vocab_size=8, n_layers=2, d_ff=8, attention=LATENT, **SIZES)
    trained, decoder = (
        Transformer(config, rngs=nnx.Rngs(0), layout=layout) for layout in ("train", "decode")
    )
    with pytest.raises(
        ValueError, match=r"has stacked layers, this model a list of them; convert .* `to_decode`"
    ):
        nnx.update(decoder, nnx.state(trained, nnx.Param))
    attention, whole = decoder.layers[0].attention, layer(LATENT)
    nnx.update(attention.output, nnx.state(whole.output, nnx.Param))
    cache = attention.init_cache(batch=2, max_len=5)
    with pytest.raises(ValueError, match=r"Output.w_o holds a parameter of another layout.*to_decode"):
        attention.decode(X_BTD[:, :1], cache, jnp.zeros(2, jnp.int32), jnp.ones(2, jnp.int32))


@pytest.mark.parametrize("pure", [True, False], ids=["arrays", "variables"])
def test_parameters_of_another_layout_are_refused_where_they_would_be_used(pure):
    trained, decoder = layer(LATENT), layer(LATENT, layout="decode")
    state = nnx.state(trained, nnx.Param)
    if pure:
        nnx.replace_by_pure_dict(mine := nnx.state(decoder, nnx.Param), {"w_qb": state["w_qb"].get_value()})
        state = mine
    else:
        state = nnx.State({"w_qb": state["w_qb"]})
    nnx.update(decoder, state)
    cache = decoder.init_cache(batch=2, max_len=5)
    with pytest.raises(
        ValueError, match=r"LatentAttention.w_qb holds a parameter of another layout.*to_decode"
    ):
        decoder.decode(X_BTD[:, :1], cache, jnp.zeros(2, jnp.int32), jnp.ones(2, jnp.int32))
    with pytest.raises(NotImplementedError, match="cannot decode; convert it with `to_decode`"):
        trained.decode(X_BTD[:, :1], cache, jnp.zeros(2, jnp.int32), jnp.ones(2, jnp.int32))
