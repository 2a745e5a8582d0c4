"""Appending new tokens to a KV cache."""

from mlra_jax.ops.append.api import append, normalize_and_append

__all__ = ["append", "normalize_and_append"]
