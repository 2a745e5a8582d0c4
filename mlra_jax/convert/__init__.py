"""The paper's PyTorch weights, in and out.

`official.py` says which official tensor is which part of which parameter; `files.py` reads and writes tensors one at a
time. Both directions exchange a mapping from official names to tensors that need not be in memory.
"""

from mlra_jax.convert.files import LazyTensor, open_safetensors, write_safetensors
from mlra_jax.convert.official import (
    ConvertError,
    model_config_from_official,
    official_from_model_config,
    official_from_params,
    params_from_official,
)

__all__ = [
    "ConvertError",
    "LazyTensor",
    "model_config_from_official",
    "official_from_model_config",
    "official_from_params",
    "open_safetensors",
    "params_from_official",
    "write_safetensors",
]
