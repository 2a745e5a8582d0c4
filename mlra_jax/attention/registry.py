"""The attention families by the name that `config.json` holds."""

from __future__ import annotations

import importlib
import os
import sys

from mlra_jax.config import AttentionConfig, ConfigError

BUILT_IN = {
    "latent": "mlra_jax.attention.latent:LatentAttentionConfig",
    "grouped": "mlra_jax.attention.grouped:GroupedAttentionConfig",
    "tied": "mlra_jax.attention.tied:TiedAttentionConfig",
    "tensor_product": "mlra_jax.attention.tensor_product:TensorProductAttentionConfig",
}
"""Where each configuration is defined. A user's own family has no entry: its name is its place, `module:Class`."""


def attention_type(name: str) -> type[AttentionConfig]:
    """The configuration class of a family.

    Args:
      name: one of `BUILT_IN`, or `module:Class` of a family defined elsewhere (docs/extending.md); the module is
        imported, from the current folder too.

    Raises:
      ConfigError: there is no such family, with the known names, or it cannot be imported, with the reason.
    """
    module, _, found = BUILT_IN.get(name, name).partition(":")
    if not found:
        raise ConfigError(f"No attention is called {name!r}; known: {', '.join(BUILT_IN)}, or module:Class.")
    try:
        cls = getattr(sys.modules.get(module) or _import(module), found)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"The attention {name} cannot be imported: {error}. Run from the folder that holds the module "
            f"{module}, or put that folder on PYTHONPATH."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, AttentionConfig)):
        raise ConfigError(f"{name} is not an attention: {found} must derive from mlra_jax.AttentionConfig.")
    return cls


def _import(module: str) -> object:
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    return importlib.import_module(module)


def attention_name(cls: type[AttentionConfig]) -> str:
    """The name under which `attention_type` finds a configuration class again.

    Raises:
      ConfigError: it would not be found again, because it is not defined at the top level of an importable module.
    """
    place = f"{cls.__module__}:{cls.__qualname__}"
    name = {place: name for name, place in BUILT_IN.items()}.get(place, place)
    if attention_type(name) is not cls:
        raise ConfigError(
            f"{place} would not be found again when a checkpoint is read: define it once, at the top level of a module."
        )
    return name
