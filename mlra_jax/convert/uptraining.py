"""Turns an MLA (or any latent attention) into one with more latent heads, as a starting point for training.

The latent of an MLA is a vector in an arbitrary basis. A latent head split into P pieces in a good basis gives P latent
heads, each with its own part of W_KVA, W_UK and W_UV. docs/conversion.md derives what is exact, what is not, and the
choice of scales; letters are those of docs/notation.md, with a 0 for the original model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.attention.registry import attention_name
from mlra_jax.config import ConfigError, ModelConfig
from mlra_jax.lazy_arrays import LazyStack, LazyTensor

_AT = "layers.attention."
_CHANGED = ("w_kva", "kv_norm.gain", "w_uk", "w_uv")


def split_config(config: ModelConfig, n_latent_heads: int, n_branches: int) -> ModelConfig:
    """The model with its latent heads split into `n_latent_heads`, of which each query head reads `n_branches`.

    Raises:
      ConfigError: the attention is not latent, or its heads cannot be split so.
    """
    split = dataclasses.replace(config, attention=_latent(config).split(n_latent_heads, n_branches))
    split.validate()
    return split


def _latent(config: ModelConfig) -> LatentAttentionConfig:
    """The model's attention, whose parameters this module knows."""
    if type(config.attention) is not LatentAttentionConfig:
        raise ConfigError(
            [
                f"Only latent attention (MLA, GLA, MLRA) can be split; the model's is "
                f"{attention_name(type(config.attention))}."
            ]
        )
    return config.attention


def split_latents(
    params: Mapping[str, Any],
    config: ModelConfig,
    n_latent_heads: int,
    n_branches: int,
    *,
    key_scale: float | None = None,
    seed: int | None = 0,
) -> tuple[dict[str, Any], ModelConfig]:
    """Splits a model's latent heads into pieces; returns parameters and configuration of the new model.

    Args:
      params: nested dictionary, in the training layout, of arrays or lazy arrays. Those that change are computed layer
        by layer on demand; all others are passed through.
      config: the original model.
      n_latent_heads: L; a multiple of the original L0.
      n_branches: J; a multiple of the original J0. With J = J0 * L / L0 every query head still reads all that it read
        before; with fewer, it reads the part that its group of heads needs most.
      key_scale: scale of W_UK; None: J / J0, so that a branch's score from its piece estimates the whole score.
      seed: seed of the rotation that mixes the pieces; None: no mixing, an MLA's latent is split in its own basis.

    Raises:
      ConfigError: see `split_config`.
    """
    split = split_config(config, n_latent_heads, n_branches)
    after = _latent(split)
    flat: dict[str, Any] = nnx.traversals.flatten_mapping(params, sep=".")

    changed = {name: flat[_AT + name] for name in _CHANGED}

    @functools.cache
    def layer(i: int) -> dict[str, np.ndarray]:
        given = {name: np.asarray(stack[i], np.float64) for name, stack in changed.items()}
        rng = None if seed is None else np.random.default_rng([seed, i])
        return _split_layer(given, config, split, key_scale, rng)

    c, h, heads = after.d_latent, after.d_nope, config.n_heads
    shapes = {
        "w_kva": (config.d_model, n_latent_heads, c),
        "kv_norm.gain": (n_latent_heads, c),
        "w_uk": (n_branches, heads, c, h),
        "w_uv": (n_branches, heads, c, h),
    }
    for name, shape in shapes.items():
        dtype = np.dtype(flat[_AT + name].dtype)
        read = lambda i, name=name, dtype=dtype: layer(i)[name].astype(dtype)
        layers = (LazyTensor(shape, dtype, functools.partial(read, i)) for i in range(config.n_layers))
        flat[_AT + name] = LazyStack(tuple(layers))
    return nnx.traversals.unflatten_mapping(flat, sep="."), split


def _split_layer(
    given: Mapping[str, np.ndarray],
    config: ModelConfig,
    split: ModelConfig,
    key_scale: float | None,
    rng: np.random.Generator | None,
) -> dict[str, np.ndarray]:
    """The changed parameters of one layer."""
    before, after = _latent(config), _latent(split)
    c, groups = after.d_latent, after.n_groups
    pieces = after.n_branches // before.n_branches  # that a query head reads of a latent head that it read
    per_group = groups // before.n_groups  # groups of query heads that one becomes
    m = split.heads_per_latent

    # The two models' scales: kv_scale on the latent, and that of the sum over branches.
    latent_scale = branch_scale = 1.0
    if after.scale_latents:
        latent_scale = math.sqrt(c / before.d_latent)
        branch_scale = math.sqrt(pieces)
    k_scale = latent_scale * (pieces if key_scale is None else key_scale)
    v_scale = latent_scale * branch_scale

    d, heads, h = config.d_model, config.n_heads, after.d_nope
    w_kva = np.empty((d, after.n_latent_heads, c))
    w_uk, w_uv = (np.empty((after.n_branches, heads, c, h)) for _ in range(2))
    for j0 in range(before.n_branches):
        for g in range(groups):
            l0 = j0 * before.n_groups + g // per_group
            mine = slice(g * m, (g + 1) * m)
            gain = given["kv_norm.gain"][l0][:, None]
            w_k, w_v = (gain * given[name][j0, mine] for name in ("w_uk", "w_uv"))  # [M, C0, H]
            basis = _basis(w_k, w_v, pieces * c)
            if rng is not None:
                basis = basis @ _rotation(pieces * c, rng)
            for p in range(pieces):
                piece = basis[:, p * c : (p + 1) * c]
                j = j0 * pieces + p
                w_kva[:, j * groups + g] = given["w_kva"][:, l0] @ piece
                w_uk[j, mine] = k_scale * (piece.T @ w_k)
                w_uv[j, mine] = v_scale * (piece.T @ w_v)
    return {
        "w_kva": w_kva,
        "kv_norm.gain": np.ones((after.n_latent_heads, c)),
        "w_uk": w_uk,
        "w_uv": w_uv,
    }


def _basis(w_k: np.ndarray, w_v: np.ndarray, width: int) -> np.ndarray:
    """An orthonormal basis [C0, width] of the part of the latent that keys and values [M, C0, H] need most, equally."""
    if width == w_k.shape[1]:
        return np.eye(width)
    gram = sum(np.einsum("MCH,MEH->CE", w, w) / max(np.sum(w * w), np.finfo(float).tiny) for w in (w_k, w_v))
    return np.linalg.eigh(gram)[1][:, : -width - 1 : -1]


def _rotation(width: int, rng: np.random.Generator) -> np.ndarray:
    """A random orthogonal matrix."""
    q, r = np.linalg.qr(rng.standard_normal((width, width)))
    return q * np.sign(np.diag(r))
