"""Products of few rows with a large matrix, and the gated product of the MLP."""

from mlra_jax.ops.product.api import product, swiglu

__all__ = ["product", "swiglu"]
