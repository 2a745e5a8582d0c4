"""Tokens: tokenizers, the shard format, the embedded corpus, and the input pipeline.

The names below are imported when they are first used: the processes of `mlra-prepare` need no JAX.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlra_jax.data.pipeline import EvalBatches, TrainBatches
    from mlra_jax.data.shards import DataError
    from mlra_jax.data.tokenizers import Tokenizer, get_tokenizer

__all__ = ["DataError", "EvalBatches", "Tokenizer", "TrainBatches", "get_tokenizer"]


def __getattr__(name: str) -> Any:
    import importlib

    for module in ("shards", "tokenizers", "pipeline"):
        if name in __all__ and hasattr(found := importlib.import_module(f"{__name__}.{module}"), name):
            return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
