"""What vLLM finds in each of its processes: an entry point of the group `vllm.general_plugins` (pyproject.toml)."""

from __future__ import annotations

import importlib.util


def register() -> None:
    """Makes MLRA known to vLLM's JAX back end; does nothing where that is not installed. It may be called again."""
    if importlib.util.find_spec("tpu_inference") is None:
        return
    from tpu_inference.models.common.model_loader import register_model

    from mlra_jax.serving.hf_config import register_config
    from mlra_jax.serving.huggingface import ARCHITECTURE
    from mlra_jax.serving.vllm import MLRAForCausalLM

    register_config()
    register_model(ARCHITECTURE, MLRAForCausalLM)
