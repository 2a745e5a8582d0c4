"""config.json of an exported model for the library transformers, through which engines read it."""

from __future__ import annotations

from transformers import AutoConfig, PretrainedConfig

from mlra_jax.config import ModelConfig, from_dict
from mlra_jax.serving.huggingface import MODEL_TYPE, OWN


class MLRAConfig(PretrainedConfig):
    """What engines read as attributes, and as `mlra_jax` what this package does (serving/huggingface.py)."""

    model_type = MODEL_TYPE

    def model(self) -> ModelConfig:
        """The model's sizes and options."""
        return from_dict(getattr(self, OWN)).model


def register_config() -> None:
    """Lets transformers, and so the engines, read config.json. It may be called again."""
    AutoConfig.register(MODEL_TYPE, MLRAConfig, exist_ok=True)
