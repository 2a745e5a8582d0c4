"""The specification of causal attention: short, float32 softmax, no tiling."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlra_jax.ops.attention.qk_parts import Joined


def causal_attention(args: Joined) -> jax.Array:
    """See `mlra_jax.ops.attention.causal_attention`."""
    (b, t, n, _), (s, k) = args.q.shape, args.k.shape[1:3]
    q_BTKMH = args.q.reshape(b, t, k, n // k, -1)
    scores_BKMTS = jnp.einsum("BTKMH,BSKH->BKMTS", q_BTKMH, args.k, preferred_element_type=jnp.float32)
    visible_TS = jnp.arange(s)[None, :] <= args.q_start + jnp.arange(t)[:, None]
    scores_BKMTS = jnp.where(visible_TS, scores_BKMTS * args.scale, -jnp.inf)
    p_BKMTS = jax.nn.softmax(scores_BKMTS, axis=-1).astype(args.v.dtype)
    out_BTKMV = jnp.einsum("BKMTS,BSKV->BTKMV", p_BKMTS, args.v, preferred_element_type=jnp.float32)
    return out_BTKMV.reshape(b, t, n, -1).astype(args.q.dtype)
