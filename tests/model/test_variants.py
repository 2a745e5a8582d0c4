"""Every attention of the paper against float64 formulas over the official weights, which know nothing of the models.

The formulas are those of shared conventions of the official code (tests/parity/README.md): names, [out, in] matrices,
one head and query at a time. Where there are official outputs, the formulas are held to them first.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlra_jax.attention.kv_cache import Cache
from mlra_jax.convert import (
    model_config_from_official,
    official_from_params,
    open_safetensors,
    params_from_official,
)
from mlra_jax.model import from_params, to_decode
from mlra_jax.sharding import decode_rules
from tests.definitions import cross_entropy


def rms_norm(x, gain):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * gain


def rotated(x):
    """x [T, ..., width], each element with the one half the width away, by its position."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / half)
    angle = angle.reshape(len(x), *[1] * (x.ndim - 2), half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def attend(q, k, v):
    """Causal attention of one head: q and k [T, width], v [T, H]; the scale is that of the query's width."""
    scores = q @ k.T / math.sqrt(q.shape[1])
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ v


def grouped(w, c, x):
    """MHA, MQA, GQA and MFA: the heads' outputs [T, N, H]."""
    h = c["head_dim"]
    heads = lambda y: y.reshape(len(x), -1, h)
    if "share_q_dim" in c:
        q = heads(rms_norm(x @ w["c_q.weight"].T, w["q_layernorm.weight"]) @ w["w_q.weight"].T)
    else:
        q = heads(x @ w["c_q.weight"].T)
    k, v = (heads(x @ w[f"c_{name}.weight"].T) for name in "kv")
    group = c["n_head"] // k.shape[1]
    q, k = rotated(q), rotated(k)
    return np.stack([attend(q[:, n], k[:, n // group], v[:, n // group]) for n in range(c["n_head"])], 1)


def tied(w, c, x):
    """GTA."""
    h, group = c["head_dim"], c["group_size"]
    q = (x @ w["c_q.weight"].T).reshape(len(x), -1, h)
    kv = (x @ w["kv_proj.weight"].T).reshape(len(x), -1, h)
    k_rope = rotated(x @ w["W_rope_k.weight"].T)
    outputs = []
    for n in range(c["n_head"]):
        query = np.concatenate([q[:, n, : h // 2], rotated(q[:, n, h // 2 :])], -1)
        key = np.concatenate([kv[:, n // group, : h // 2], k_rope], -1)
        outputs.append(attend(query, key, kv[:, n // group]))
    return np.stack(outputs, 1)


def tensor_product(w, c, x):
    """TPA."""

    def factors(name, rank):
        a = (x @ w[f"c_qkv.W_A_{name}.weight"].T).reshape(len(x), c["n_head"], rank)
        return a, (x @ w[f"c_qkv.W_B_{name}.weight"].T).reshape(len(x), rank, c["head_dim"])

    made = []
    for name, rank in (("q", c["q_rank"]), ("k", c["rank"]), ("v", c["rank"])):
        a, b = factors(name, rank)
        b = b if name == "v" else rotated(b)
        made.append(np.einsum("tnr,trh->tnh", a, b) / rank)
    q, k, v = made
    return np.stack([attend(q[:, n], k[:, n], v[:, n]) for n in range(c["n_head"])], 1)


def latent(w, c, x, kind):
    """MLA, GLA and MLRA."""
    n_latents = {"mla": 1, "gla_2": 2}.get(kind[:5].removesuffix("_"), 4)
    heads, nope, rope = c["n_head"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
    width = c["kv_lora_rank"] // n_latents
    scale = (lambda rank: 1.0) if kind.endswith("no_scale") else (lambda rank: math.sqrt(x.shape[1] / rank))
    q = rms_norm(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"]) * scale(c["q_lora_rank"])
    q = (q @ w["q_b_proj.weight"].T).reshape(len(x), heads, nope + rope)
    q = np.concatenate([q[..., :nope], rotated(q[..., nope:])], -1)
    down = x @ w["kv_a_proj_with_mqa.weight"].T
    k_rope = rotated(down[:, c["kv_lora_rank"] :])
    y = np.zeros((len(x), heads, nope))
    for i in range(n_latents):
        norm = {1: "kv_a_layernorm", 2: f"kv_a_layernorm_{i + 1}"}.get(n_latents, f"kv_a_layernorms.{i}")
        read = rms_norm(down[:, i * width : (i + 1) * width], w[f"{norm}.weight"]) * scale(width)
        if n_latents > 2:
            up = read @ w["kv_b_proj"][i]
        else:
            up = read @ w["kv_b_proj.weight" if n_latents == 1 else f"kv_b_proj_{i + 1}.weight"].T
        up = up.reshape(len(x), -1, 2, nope)
        if kind.startswith("mlra_2"):
            first = i % 2 * (heads // 2)
        else:  # MLRA-4's and MLA's serve all heads, GLA's the i-th block
            first = i * up.shape[1] if kind.startswith("gla") else 0
        for n in range(up.shape[1]):
            key = np.concatenate([up[:, n, 0], k_rope], -1)
            y[:, first + n] += attend(q[:, first + n], key, up[:, n, 1])
    branches = {"mlra_2": 2, "mlra_4": 4}.get(kind[:6], 1)
    return y if kind.endswith("no_scale") else y / math.sqrt(branches)


ATTENTIONS = {"gta": tied, "tpa": tensor_product, "mfa": grouped, "gqa": grouped, "mha": grouped}


def formula_logits(tensors, c, kind, tokens):
    """Logits [B, T, V] of official float64 tensors by name, official configuration, model type and tokens [B, T]."""
    silu = lambda z: z / (1 + np.exp(-z))
    base, rows = kind.removesuffix("_gated"), []
    for x in tensors["transformer.wte.weight"][tokens]:
        for i in range(c["n_layer"]):
            at = f"transformer.h.{i}."
            w = {name.removeprefix(at): t for name, t in tensors.items() if name.startswith(at)}
            h = rms_norm(x, w["input_layernorm.weight"])
            of_attention = {k.removeprefix("attn."): t for k, t in w.items() if k.startswith("attn.")}
            run = ATTENTIONS.get(base)
            y = run(of_attention, c, h) if run else latent(of_attention, c, h, base)
            y = y.reshape(len(x), -1)
            for gate in {"gated_proj.weight", "c_gated.weight"} & set(of_attention):
                y = y / (1 + np.exp(-(h @ of_attention[gate].T)))
            x = x + y @ of_attention["c_proj.weight"].T
            h = rms_norm(x, w["post_attention_layernorm.weight"])
            h = silu(h @ w["mlp.c_fc1.weight"].T) * (h @ w["mlp.c_fc2.weight"].T)
            x = x + h @ w["mlp.c_proj.weight"].T
        rows.append(rms_norm(x, tensors["layernorm.weight"]) @ tensors["transformer.wte.weight"].T)
    return np.stack(rows)


def formula_loss(tensors, c, kind, tokens, targets):
    """Mean cross-entropy in nats."""
    logits = formula_logits(tensors, c, kind, tokens)
    logits = logits - logits.max(axis=-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log_p, targets[..., None], axis=-1).mean()


@pytest.mark.parametrize("variant", ["mlra_4_gated", "mlra_2", "mla", "gqa", "mha"])
def test_the_formulas_give_the_official_logits_where_there_are_any(repository, variant):
    folder = repository / "tests" / "parity"
    stored = open_safetensors(folder / f"{variant}.safetensors")
    tensors = {name: np.asarray(t, np.float64) for name, t in stored.items()}
    config = json.loads((folder / f"{variant}.json").read_text())["config"]
    expected = np.load(folder / f"{variant}.npz")
    logits = formula_logits(tensors, config, variant, expected["input_ids"])
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=5e-6)


SIZES = {"n_layer": 1, "n_head": 4, "n_embd": 24, "intermediate_size": 20, "vocab_size": 32}
RANKS = {"q_lora_rank": 10, "kv_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4}
VARIANTS = {
    "gqa_gated": {"head_dim": 8, "group_size": 4},  # of one KV head: MQA
    "mfa": {"head_dim": 12, "share_q_dim": 10},
    "gta": {"head_dim": 8, "group_size": 2},
    "tpa": {"head_dim": 8, "rank": 2, "q_rank": 3},
    "gla_2_gated": RANKS,
    "gla_4": RANKS,
    "mlra_2_no_scale": RANKS,
}


def official_shapes(c, kind):
    """Shapes by official name, of models of one layer."""
    d, f, n = c["n_embd"], c["intermediate_size"], c["n_head"]
    kind, gated = kind.removesuffix("_gated"), kind.endswith("_gated")
    if kind in ATTENTIONS:
        h = c["head_dim"]
        heads, gate, width = n * h, "c_gated", h
        group = c.get("group_size", n)
        shapes = {"c_q": (c.get("share_q_dim", heads), d)}
        if kind == "gta":
            shapes |= {"kv_proj": (heads // group, d), "W_rope_k": (h // 2, d)}
        elif kind == "tpa":
            ranks = {"q": c["q_rank"], "k": c["rank"], "v": c["rank"]}
            shapes = {f"c_qkv.W_A_{x}": (n * r, d) for x, r in ranks.items()}
            shapes |= {f"c_qkv.W_B_{x}": (r * h, d) for x, r in ranks.items()}
        else:
            shapes |= {"c_k": (heads // group, d), "c_v": (heads // group, d)}
        if kind == "mfa":
            shapes |= {"q_layernorm": (c["share_q_dim"],), "w_q": (heads, c["share_q_dim"])}
    else:
        a, kv, h, r = (c[name] for name in RANKS)
        gate, width = "gated_proj", h
        shapes = {"q_a_proj": (a, d), "q_a_layernorm": (a,), "q_b_proj": (n * (h + r), a)}
        shapes["kv_a_proj_with_mqa"] = (kv + r, d)
        if kind.startswith("gla_2"):
            shapes |= {f"kv_a_layernorm_{i}": (kv // 2,) for i in (1, 2)}
            shapes |= {f"kv_b_proj_{i}": (n // 2 * 2 * h, kv // 2) for i in (1, 2)}
        else:
            shapes |= {f"kv_a_layernorms.{i}": (kv // 4,) for i in range(4)}
    shapes["c_proj"] = (d, n * width)
    if gated:
        shapes[gate] = (n * width, d)
    named = {f"transformer.h.0.attn.{name}.weight": shape for name, shape in shapes.items()}
    if kind in ("gla_4", "mlra_2_no_scale"):  # a bare array, not transposed
        served = n // 4 if kind == "gla_4" else n // 2
        named["transformer.h.0.attn.kv_b_proj"] = (4, c["kv_lora_rank"] // 4, served * 2 * h)
    named |= {"transformer.wte.weight": (c["vocab_size"], d), "layernorm.weight": (d,)}
    for name in ("input_layernorm", "post_attention_layernorm"):
        named[f"transformer.h.0.{name}.weight"] = (d,)
    for name, shape in {"c_fc1": (f, d), "c_fc2": (f, d), "c_proj": (d, f)}.items():
        named[f"transformer.h.0.mlp.{name}.weight"] = shape
    return named


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_gradients_and_cached_decoding_are_those_of_the_formulas(variant):
    official, rng = {**SIZES, **VARIANTS[variant]}, np.random.default_rng(0)
    config = model_config_from_official(official, variant)
    config = dataclasses.replace(config, compute_dtype="float32")
    tensors = {
        name: rng.standard_normal(shape) * (0.3 if "norm" in name else 0.25) + ("norm" in name)
        for name, shape in official_shapes(official, variant).items()
    }
    batch, length = 2, 9
    tokens, targets = rng.integers(0, 32, (2, batch, length), dtype=np.int32)
    expected = formula_logits(tensors, official, variant, tokens)
    assert np.std(expected) > 0.3

    params = params_from_official({name: t.astype(np.float32) for name, t in tensors.items()}, config)

    def loss(params):
        logits = from_params(config, params)(tokens)
        return jnp.divide(*cross_entropy(logits, targets)), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)

    # Gradients: of every tensor along a random direction, by central differences.
    step = 1e-5
    for name, grad in official_from_params(grads, config).items():
        direction = rng.standard_normal(grad.shape)
        at = lambda sign, name=name, direction=direction: formula_loss(
            tensors | {name: tensors[name] + sign * step * direction}, official, variant, tokens, targets
        )
        slope = (at(1) - at(-1)) / (2 * step)
        norms = np.linalg.norm(np.asarray(grad)) * np.linalg.norm(direction)
        assert norms > 1e-4, name
        assert abs(np.sum(np.asarray(grad) * direction) - slope) < 1e-5 * norms, name

    # Cached decoding: a few tokens of each row in one call, the rest in the next ones.
    rules = decode_rules()
    decode = jax.jit(lambda model, *args: model.decode(*args))
    model, cache = to_decode(config, params, rules), Cache.create(config, rules, batch, length, page_size=4)
    done = np.zeros(batch, np.int32)
    for n_new in (np.array([4, 1]), np.array([1, 4]), np.array([4, 4])):
        chunk = np.stack([np.resize(row[i:], 4) for row, i in zip(tokens, done, strict=True)])
        out, cache = decode(model, chunk, cache, n_new)
        for row, (i, n) in enumerate(zip(done, n_new, strict=True)):
            np.testing.assert_allclose(out[row, :n], expected[row, i : i + n], rtol=0, atol=2e-5)
        done += n_new
    assert done.tolist() == [length, length]
