"""Multi-Head Low-Rank Attention (MLRA, arXiv 2603.02188) in JAX and Flax.

`import mlra_jax as mlra` offers all that docs/api.md describes. Each name is imported when it is first used, so that
importing the package is cheap; what the names are, and where they are defined, says `__init__.pyi`.
"""

import ast as _ast
import importlib as _importlib
import pathlib as _pathlib

__version__ = "0.1.0"

_STUB = _ast.parse(_pathlib.Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_PLACES = {s.names[0].name: s.module for s in _STUB.body if isinstance(s, _ast.ImportFrom)}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> object:
    if (place := _PLACES.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(_importlib.import_module(place), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
