"""Attention kernels: arrays in, arrays out; no module, configuration or mesh is known here.

One folder per kernel family: `api.py` (the public function and its dispatch), `reference.py` (the specification) and
one file per back end.
"""

from mlra_jax.ops.dispatch import explain

__all__ = ["explain"]
