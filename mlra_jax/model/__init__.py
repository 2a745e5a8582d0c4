"""The transformer, and what is in it besides attention."""

from mlra_jax.model.transformer import (
    Transformer,
    cast_weights,
    from_params,
    stack_layers,
    to_decode,
    unstack_layers,
)

__all__ = ["Transformer", "cast_weights", "from_params", "stack_layers", "to_decode", "unstack_layers"]
