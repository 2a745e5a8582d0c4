"""Attention weights, for looking at what a model attends to."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from mlra_jax import reference
from mlra_jax.model.transformer import Transformer
from mlra_jax.sharding import AxisRules

if TYPE_CHECKING:
    from mlra_jax.attention.base import Attention


def attention_weights(
    model: Transformer | Attention, inputs: jax.Array, *, layer: int | None = None
) -> jax.Array:
    """The softmax weights of each branch: how much each query head attends to each token.

    They are computed by `mlra_jax.reference`, unsplit on every device: T * T values per sequence, head and branch.

    Args:
      model: a model or one attention layer, in the training layout.
      inputs: token ids [B, T] for a model; for an attention layer its normalised input [B, T, D].
      layer: the only layer of a model to compute them for; None: all layers.

    Returns:
      Float32 [J, B, N, T, S] for one layer, or [layers, J, B, N, T, S]: branches, sequences, query heads, queries,
      keys. Branch j of query head n reads latent head j*G + n // M; J is 1 in all but MLRA.

    Raises:
      NotImplementedError: the model is in the decode layout, or its attention is not one of the package's own.
      ValueError: the model has no such layer.
    """
    model.require_layout("train")
    if isinstance(model, Transformer) and layer is not None and not 0 <= layer < model.config.n_layers:
        raise ValueError(f"layer={layer} is not one of the model's layers, 0 to {model.config.n_layers - 1}.")
    return _attention_weights(model, jnp.asarray(inputs), layer)


@functools.partial(jax.jit, static_argnums=2)
def _attention_weights(model: Transformer | Attention, inputs: jax.Array, layer: int | None) -> jax.Array:
    if not isinstance(model, Transformer):
        whole = lambda x: AxisRules().constrain(x.astype(jnp.float32), *[None] * x.ndim)
        params = jax.tree.map(whole, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        return reference.softmax_weights(
            reference.heads_of(params, model.config, whole(inputs)), model.config
        )
    x_BTD, found = model.embedding.encode(inputs), []
    for i, block in enumerate(model.blocks()):
        if layer in (None, i):
            found.append(_attention_weights(block.attention, block.attention_norm(x_BTD), None))
        if layer == i:
            return found[0]
        x_BTD, y_BTD = block(x_BTD)
        x_BTD = x_BTD + y_BTD
    return jnp.stack(found)
