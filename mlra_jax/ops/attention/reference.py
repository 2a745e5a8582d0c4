"""The specification of causal attention: short, float32 softmax, no tiling."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def causal_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKV: jax.Array, *, scale: float, q_start: jax.Array | int
) -> jax.Array:
    """See `mlra_jax.ops.attention.causal_attention`."""
    b, t, n, _ = q_BTNH.shape
    s, k = k_BSKH.shape[1:3]
    q_BTKMH = q_BTNH.reshape(b, t, k, n // k, -1)
    scores_BKMTS = jnp.einsum("BTKMH,BSKH->BKMTS", q_BTKMH, k_BSKH, preferred_element_type=jnp.float32)
    visible_TS = jnp.arange(s)[None, :] <= q_start + jnp.arange(t)[:, None]
    scores_BKMTS = jnp.where(visible_TS, scores_BKMTS * scale, -jnp.inf)
    p_BKMTS = jax.nn.softmax(scores_BKMTS, axis=-1).astype(v_BSKV.dtype)
    out_BTKMV = jnp.einsum("BKMTS,BSKV->BTKMV", p_BKMTS, v_BSKV, preferred_element_type=jnp.float32)
    return out_BTKMV.reshape(b, t, n, -1).astype(q_BTNH.dtype)
