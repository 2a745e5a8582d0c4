"""The paper's attentions as equations: no sharding, no cache, no kernels (docs/attention.md, docs/notation.md).

Each family makes the queries of N heads, and the keys and values that each head reads in each of its J branches (one,
except in MLRA); `attention` is what all families share. Functions take the parameters `p` of one layer in the training
layout (`nnx.to_pure_dict(nnx.state(layer, nnx.Param))`), the model's configuration, and the normalised input x
[B, T, D]. S counts the same positions as T, but of keys. Tests compare the modules of `mlra_jax.attention` with this.
"""

from math import sqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlra_jax.attention.registry import attention_type
from mlra_jax.config import ModelConfig
from mlra_jax.model.layers import rotary_frequencies, softmax_scale
from mlra_jax.ops.rotary import rotate

Params = dict[str, Any]


class Heads(NamedTuple):
    """Queries, keys and values of the query heads; queries and keys are E wide."""

    q_BTNE: jax.Array
    k_JBSNE: jax.Array
    v_JBSNH: jax.Array
    branch_scale: float = 1.0


def latent(p: Params, config: ModelConfig, x_BTD: jax.Array) -> Heads:
    """MLA (L = J = 1), GLA (J = 1) and MLRA: in branch j query head n reads latent head l = j*G + n // M."""
    a: Any = config.attention
    d, n, m = config.d_model, config.n_heads, config.heads_per_latent
    scale = lambda ratio: sqrt(ratio) if a.scale_latents else 1.0  # preserves the variance
    q_BTA = scale(d / a.q_lora_rank) * rms_norm(x_BTD @ p["w_qa"], p["q_norm"], config)
    q_BTNE = jnp.einsum("BTA,ANE->BTNE", q_BTA, p["w_qb"])
    q_nope, q_rope = q_BTNE[..., : a.d_nope], q_BTNE[..., a.d_nope :]
    kv_BSLC = jnp.einsum("BSD,DLC->BSLC", x_BTD, p["w_kva"])
    kv_latent = scale(d / a.d_latent) * rms_norm(kv_BSLC, p["kv_norm"], config)
    l_JN = a.n_groups * jnp.arange(a.n_branches)[:, None] + jnp.arange(n) // m
    kv_BSJNC = kv_latent[:, :, l_JN]
    k_nope = jnp.einsum("BSJNC,JNCH->JBSNH", kv_BSJNC, p["w_uk"])
    v = jnp.einsum("BSJNC,JNCH->JBSNH", kv_BSJNC, p["w_uv"])
    k_rope = rope(x_BTD @ p["w_kr"], config)[:, :, None]  # one for all heads and branches
    return Heads(beside(q_nope, rope(q_rope, config)), beside(k_nope, k_rope), v, scale(1 / a.n_branches))


def grouped(p: Params, config: ModelConfig, x_BTD: jax.Array) -> Heads:
    """MHA (K = N), GQA, MQA (K = 1), and MFA (K = 1, and queries made from a compressed one)."""
    q_in = rms_norm(x_BTD @ p["w_qa"], p["q_norm"], config) if "w_qa" in p else x_BTD
    q = rope(jnp.einsum("BTD,DNH->BTNH", q_in, p["w_q"]), config)
    k = rope(jnp.einsum("BSD,DKH->BSKH", x_BTD, p["w_k"]), config)
    v = jnp.einsum("BSD,DKH->BSKH", x_BTD, p["w_v"])
    return Heads(q, by_query_head(k, config), by_query_head(v, config))


def tied(p: Params, config: ModelConfig, x_BTD: jax.Array) -> Heads:
    """GTA: the first half of a KV head is in the key, all of it is the value; heads share the key's rotary half."""
    r = p["w_kr"].shape[-1]
    q = jnp.einsum("BTD,DNH->BTNH", x_BTD, p["w_q"])
    kv = by_query_head(jnp.einsum("BSD,DKH->BSKH", x_BTD, p["w_kv"]), config)
    k_rope = rope(x_BTD @ p["w_kr"], config)[:, :, None]
    return Heads(beside(q[..., :r], rope(q[..., r:], config)), beside(kv[..., :r], k_rope), kv)


def tensor_product(p: Params, config: ModelConfig, x_BTD: jax.Array) -> Heads:
    """TPA: q, k and v are each the mean of r products of a head's factor and a vector that all heads share."""

    def mean(name: str) -> jax.Array:
        a_BTNr = jnp.einsum("BTD,DNr->BTNr", x_BTD, p[f"w_a{name}"])
        b_BTrH = jnp.einsum("BTD,DrH->BTrH", x_BTD, p[f"w_b{name}"])
        b_BTrH = b_BTrH if name == "v" else rope(b_BTrH, config)
        return jnp.einsum("BTNr,BTrH->BTNH", a_BTNr, b_BTrH) / a_BTNr.shape[-1]

    return Heads(mean("q"), mean("k")[None], mean("v")[None])


def softmax_weights(heads: Heads, config: ModelConfig) -> jax.Array:
    """How much each query attends to each position, by a causal softmax in each branch: [J, B, N, T, S]."""
    scores = jnp.einsum("BTNE,JBSNE->JBNTS", heads.q_BTNE, heads.k_JBSNE)
    scores *= softmax_scale(config, heads.q_BTNE.shape[-1])
    return jax.nn.softmax(jnp.where(jnp.tri(scores.shape[-1], dtype=bool), scores, -jnp.inf), axis=-1)


def attention(p: Params, config: ModelConfig, x_BTD: jax.Array) -> jax.Array:
    """A layer of any family, [B, T, D]: softmax, sum over branches, gate if there is one, output projection."""
    heads = heads_of(p, config, x_BTD)
    weights_JBNTS = heads.branch_scale * softmax_weights(heads, config)
    y_BTNH = jnp.einsum("JBNTS,JBSNH->BTNH", weights_JBNTS, heads.v_JBSNH)
    if config.gated_attention:
        y_BTNH = y_BTNH * jax.nn.sigmoid(jnp.einsum("BTD,DNH->BTNH", x_BTD, p["output"]["w_gate"]))
    return jnp.einsum("BTNH,NHD->BTD", y_BTNH, p["output"]["w_o"])


def rms_norm(x: jax.Array, p: Params, config: ModelConfig) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * p["gain"]


def rope(x: jax.Array, config: ModelConfig) -> jax.Array:
    return rotate(x, jnp.arange(x.shape[1]), rotary_frequencies(config, x.shape[-1]))


def by_query_head(kv_BSKH: jax.Array, config: ModelConfig) -> jax.Array:
    return jnp.repeat(kv_BSKH, config.heads_per_latent, axis=2)[None]


def beside(nope: jax.Array, rope: jax.Array) -> jax.Array:
    return jnp.concatenate([nope, jnp.broadcast_to(rope, (*nope.shape[:-1], rope.shape[-1]))], axis=-1)


FAMILIES = {attention_type(f.__name__): f for f in (latent, grouped, tied, tensor_product)}


def heads_of(p: Params, config: ModelConfig, x_BTD: jax.Array) -> Heads:
    """The heads of the layer's family; raises `NotImplementedError` if it is not in `FAMILIES`."""
    if (kind := type(config.attention)) not in FAMILIES:
        raise NotImplementedError(f"mlra_jax.reference does not know {kind.__name__}: add it to FAMILIES.")
    return FAMILIES[kind](p, config, x_BTD)
