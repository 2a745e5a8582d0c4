"""Serving MLRA models with engines that schedule requests (docs/serving.md).

`step` is what every engine runs: a ragged batch of new tokens over a paged cache. `sglang` makes a model known to
sglang-jax, which `mlra-serve` launches.
"""
