"""Attention modules.

`LatentAttention` is MLA, GLA and MLRA; `GroupedAttention` is MHA, GQA, MQA and MFA; `TiedAttention` is GTA;
`TensorProductAttention` is TPA (docs/attention.md).
"""

from mlra_jax.config import (
    GroupedAttentionConfig,
    LatentAttentionConfig,
    ModelConfig,
    TensorProductAttentionConfig,
    TiedAttentionConfig,
)
from mlra_jax.models.attention.grouped import GroupedAttention
from mlra_jax.models.attention.latent import LatentAttention
from mlra_jax.models.attention.tensor_product import TensorProductAttention
from mlra_jax.models.attention.tied import TiedAttention

Attention = LatentAttention | GroupedAttention | TiedAttention | TensorProductAttention

_CLASSES: dict[type, type[Attention]] = {
    LatentAttentionConfig: LatentAttention,
    GroupedAttentionConfig: GroupedAttention,
    TiedAttentionConfig: TiedAttention,
    TensorProductAttentionConfig: TensorProductAttention,
}


def attention_class(config: ModelConfig) -> type[Attention]:
    """The module that `config.attention` describes."""
    return _CLASSES[type(config.attention)]


__all__ = [
    "Attention",
    "GroupedAttention",
    "LatentAttention",
    "TensorProductAttention",
    "TiedAttention",
    "attention_class",
]
