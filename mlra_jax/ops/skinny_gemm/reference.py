"""The specification of skinny GEMM and of its gated form; XLA compiles both well enough for any size."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def skinny_gemm(x: jax.Array, w: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """See `mlra_jax.ops.skinny_gemm.skinny_gemm`."""
    return jnp.einsum("nk,fk->nf", x, w, preferred_element_type=jnp.float32).astype(dtype)


def swiglu(x: jax.Array, w: jax.Array) -> jax.Array:
    """See `mlra_jax.ops.skinny_gemm.swiglu`."""
    gate, up = (skinny_gemm(x, one, dtype=jnp.dtype(jnp.float32)) for one in w)
    return (jax.nn.silu(gate) * up).astype(x.dtype)
