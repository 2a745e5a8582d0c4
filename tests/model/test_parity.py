"""The models against the paper's official PyTorch implementation (tests/parity)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlra_jax.attention.kv_cache import Cache
from mlra_jax.convert import official_from_params
from mlra_jax.model import from_params, to_decode
from mlra_jax.sharding import decode_rules
from tests.definitions import cross_entropy

VARIANTS = ("mlra_4", "mlra_2", "mla", "gqa", "mha", "mlra_4_gated")
variants = pytest.mark.parametrize(
    "variant", [pytest.param("mlra_4", marks=pytest.mark.smoke), *VARIANTS[1:]]
)


@variants
def test_logits_losses_and_every_gradient_equal_the_official_ones(parity, variant):
    case = parity(variant)
    expected = case.expected

    @jax.jit
    def run(params, tokens, targets, masked):
        def loss(params):
            logits = from_params(case.config, params)(tokens)
            mean = lambda targets: jnp.divide(*cross_entropy(logits, targets))
            return mean(targets), (mean(masked), logits)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, (loss_masked, logits)), grads = run(
        case.params, expected["input_ids"], expected["targets"], expected["targets_masked"]
    )
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(loss, expected["loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss_masked, expected["loss_masked"], rtol=0, atol=1e-5)

    official = {f"grad/{name}": np.asarray(g) for name, g in official_from_params(grads, case.config).items()}
    assert set(official) == {name for name in expected if name.startswith("grad/")}
    off = {k: np.linalg.norm(g - expected[k]) / np.linalg.norm(expected[k]) for k, g in official.items()}
    assert {k: v for k, v in off.items() if not v < 1e-5} == {}


@variants
def test_output_of_every_attention_and_layer_equals_the_official_one(parity, variant):
    case = parity(variant)
    model = from_params(case.config, case.params)
    graph, stacked = nnx.split(model.layers)

    @jax.jit
    def run(layer, x):
        block = nnx.merge(graph, layer)
        return block.attention(block.attention_norm(x)), sum(block(x))

    x = case.params["embedding"]["table"][case.expected["input_ids"]]
    for i in range(case.config.n_layers):
        attention_out, block_out = run(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), x)
        x = case.expected[f"act/block_out/{i}"]
        np.testing.assert_allclose(attention_out, case.expected[f"act/attn_out/{i}"], rtol=0, atol=2e-5)
        np.testing.assert_allclose(block_out, x, rtol=0, atol=2e-5)


@variants
def test_cached_decoding_gives_the_official_greedy_ids_and_the_logits_of_the_full_forward_pass(
    parity, variant
):
    case = parity(variant)
    expected, config, rules = case.expected, case.config, decode_rules()
    model = to_decode(config, case.params, rules)
    prompt, ids = expected["prompt_ids"], expected["full_gen_ids"]
    batch, n_prompt = prompt.shape
    step = jax.jit(lambda model, tokens, cache, n_new: model.decode(tokens, cache, n_new))
    ones = np.ones(batch, np.int32)

    # Greedy: eight tokens of the prompt at once, the rest of it and what is generated one at a time.
    cache = Cache.create(config, rules, batch, 40, page_size=8)
    _, cache = step(model, prompt[:, :8], cache, 8 * ones)
    tokens, generated, from_logits = prompt[:, 8:9], [], []
    for position in range(8, n_prompt - 1 + ids.shape[1]):
        logits, cache = step(model, tokens, cache, ones)
        if position < n_prompt - 1:
            tokens = prompt[:, position + 1 : position + 2]
        else:
            tokens = np.argmax(logits, axis=-1).astype(np.int32)
            generated.append(tokens[:, 0])
            from_logits.append(logits[:, 0])
    assert np.stack(generated, axis=1).tolist() == ids.tolist()
    np.testing.assert_allclose(np.stack(from_logits, axis=1), expected["full_gen_logits"], rtol=0, atol=2e-5)
    if "gen_ids" in expected:
        assert ids.tolist() == expected["gen_ids"].tolist()
        np.testing.assert_allclose(np.stack(from_logits, axis=1), expected["gen_logits"], rtol=0, atol=2e-5)

    # A whole sequence in chunks of up to eight tokens, another number in each row and chunk.
    inputs, logits = expected["input_ids"], expected["logits"]
    length = inputs.shape[1]
    padded = np.pad(inputs, ((0, 0), (0, 8)))
    sizes = np.array([[8, 1], [5, 8], [0, 7], [8, 0], [7, 8], [2, 3], [3, 6]], np.int32)
    assert sizes.sum(axis=0).tolist() == [length] * batch
    cache, done = Cache.create(config, rules, batch, length, page_size=8), np.zeros(batch, np.int32)
    for n_new in sizes:
        chunk = np.stack([padded[row, done[row] : done[row] + 8] for row in range(batch)])
        chunk_logits, cache = step(model, chunk, cache, n_new)
        for row, n in enumerate(n_new):
            want = logits[row, done[row] : done[row] + n]
            np.testing.assert_allclose(chunk_logits[row, :n], want, rtol=0, atol=2e-5)
        done += n_new
    assert np.asarray(cache.lengths).tolist() == done.tolist()
