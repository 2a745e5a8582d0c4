"""Tokens: tokenizers, the shard format, the embedded corpus, and the input pipeline."""

from mlra_jax.data.pipeline import EvalBatches, TrainBatches
from mlra_jax.data.shards import DataError
from mlra_jax.data.tokenizers import Tokenizer, get_tokenizer

__all__ = ["DataError", "EvalBatches", "Tokenizer", "TrainBatches", "get_tokenizer"]
