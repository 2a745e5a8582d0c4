"""Import and export of the paper's PyTorch weights.

`official.py` maps official tensors to parameters; `files.py` and `torch_files.py` read and write files of tensors. Both
directions pass a mapping from official names to tensors that need not be in memory. `uptraining.py` turns an MLA into
an MLRA.
"""

from mlra_jax.convert.files import open_safetensors, open_weights, write_safetensors, write_weights
from mlra_jax.convert.official import (
    ConvertError,
    lazy_params_from_official,
    model_config_from_official,
    official_from_model_config,
    official_from_params,
    params_from_official,
)
from mlra_jax.convert.torch_files import open_torch
from mlra_jax.convert.uptraining import split_config, split_latents
from mlra_jax.lazy_arrays import LazyStack, LazyTensor

__all__ = [
    "ConvertError",
    "LazyStack",
    "LazyTensor",
    "lazy_params_from_official",
    "model_config_from_official",
    "official_from_model_config",
    "official_from_params",
    "open_safetensors",
    "open_torch",
    "open_weights",
    "params_from_official",
    "split_config",
    "split_latents",
    "write_safetensors",
    "write_weights",
]
