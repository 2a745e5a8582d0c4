"""The transformer, its layers and attentions."""

from mlra_jax.models.attention import (
    GroupedAttention,
    LatentAttention,
    TensorProductAttention,
    TiedAttention,
)
from mlra_jax.models.transformer import Transformer, cast_weights, from_params, to_decode

__all__ = [
    "GroupedAttention",
    "LatentAttention",
    "TensorProductAttention",
    "TiedAttention",
    "Transformer",
    "cast_weights",
    "from_params",
    "to_decode",
]
