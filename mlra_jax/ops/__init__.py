"""Kernels and their references: arrays in, arrays out, with no knowledge of modules, configurations or meshes.

Each op has a folder: `api.py` (the public function and its back ends), `reference.py` (the specification), and a file
or folder for each back end. `back_end.py` is the protocol that all back ends follow (docs/kernels.md).
"""

from mlra_jax.ops.dispatch import explain

__all__ = ["explain"]
