"""Causal attention over whole sequences: training and full forward passes."""

from mlra_jax.ops.attention.api import causal_attention

__all__ = ["causal_attention"]
