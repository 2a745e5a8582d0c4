"""Causal attention over whole sequences: training and full forward passes."""

from mlra_jax.ops.attention.api import causal_attention, causal_attention_parts

__all__ = ["causal_attention", "causal_attention_parts"]
