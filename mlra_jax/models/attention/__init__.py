"""Attention modules: `LatentAttention` is MLA, GLA and MLRA; `GroupedAttention` is MHA, GQA and MQA."""

from mlra_jax.models.attention.grouped import GroupedAttention
from mlra_jax.models.attention.latent import LatentAttention

Attention = LatentAttention | GroupedAttention

__all__ = ["Attention", "GroupedAttention", "LatentAttention"]
