"""Attention of a few new queries over a KV cache: decoding and chunked prefill."""

from mlra_jax.ops.decode.api import (
    IMPLEMENTATIONS,
    factored_decode_attention,
    grouped_decode_attention,
    latent_decode_attention,
)

__all__ = [
    "IMPLEMENTATIONS",
    "factored_decode_attention",
    "grouped_decode_attention",
    "latent_decode_attention",
]
