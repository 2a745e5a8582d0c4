"""The names that earlier versions had here; each use says where they are now."""

import importlib
import warnings

_PLACES = {
    "GroupedAttention": "mlra_jax",
    "LatentAttention": "mlra_jax",
    "TensorProductAttention": "mlra_jax",
    "TiedAttention": "mlra_jax",
    "Transformer": "mlra_jax",
    "cast_weights": "mlra_jax.model",
    "from_params": "mlra_jax.model",
    "stack_layers": "mlra_jax.model",
    "to_decode": "mlra_jax.model",
    "unstack_layers": "mlra_jax.model",
}


def __getattr__(name: str) -> object:
    if (place := _PLACES.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"mlra_jax.models.{name} is now {place}.{name}.", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(place), name)
