"""Products of few rows with a large matrix, and the gated product of the MLP."""

from mlra_jax.ops.product.api import has_kernel, product, swiglu

__all__ = ["has_kernel", "product", "swiglu"]
