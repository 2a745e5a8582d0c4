"""Skinny GEMM: few rows times a large matrix, and the same with the gate of the MLP."""

from mlra_jax.ops.skinny_gemm.api import has_kernel, skinny_gemm, swiglu

__all__ = ["has_kernel", "skinny_gemm", "swiglu"]
