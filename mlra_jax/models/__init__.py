"""The transformer, its layers and attentions."""

from mlra_jax.models.attention import (
    GroupedAttention,
    LatentAttention,
    TensorProductAttention,
    TiedAttention,
)
from mlra_jax.models.transformer import (
    Transformer,
    cast_weights,
    from_params,
    stack_layers,
    to_decode,
    unstack_layers,
)

__all__ = [
    "GroupedAttention",
    "LatentAttention",
    "TensorProductAttention",
    "TiedAttention",
    "Transformer",
    "cast_weights",
    "from_params",
    "stack_layers",
    "to_decode",
    "unstack_layers",
]
