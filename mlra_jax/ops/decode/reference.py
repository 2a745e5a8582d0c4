"""The specification of decode attention: short, float32 softmax, no tiling."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def decode_attention(
    parts: Sequence[tuple[jax.Array, jax.Array]],
    v_BLSV: jax.Array,
    kv_len_BT: jax.Array,
    *,
    scale: float,
    kv_start: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Attention whose scores are a sum over parts of the key, each with its own query.

    Args:
      parts: pairs of a query [B, T, L, M, W] and a key [B, L, S, W], or [B, 1, S, W] where all heads share it.
      v_BLSV: values. Slots at or past the row's largest `kv_len` may hold anything, NaN too.
      kv_len_BT: how many of the leading slots each query sees; 0: none.
      scale: multiplies the scores.
      kv_start: first slot that is seen.

    Returns:
      Output [B, T, L, M, V] in the type of the first query, zeros where nothing is seen, and the log-sum-exp of the
      scaled scores [B, T, L, M] in float32, -inf where nothing is seen.
    """
    heads = v_BLSV.shape[1]
    scores = jnp.zeros((), jnp.float32)
    for q_BTLMW, k in parts:
        k_BLSW = jnp.broadcast_to(k, (k.shape[0], heads, *k.shape[2:]))
        scores = scores + jnp.einsum("BTLMW,BLSW->BTLMS", q_BTLMW, k_BLSW, preferred_element_type=jnp.float32)
    slots = jnp.arange(v_BLSV.shape[2])
    visible = (slots >= kv_start) & (slots < kv_len_BT[..., None])  # [B, T, S]
    visible = visible[:, :, None, None, :]
    scores = jnp.where(visible, scores * scale, -jnp.inf)
    top = scores.max(axis=-1, keepdims=True)
    p = jnp.where(visible, jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
    total = p.sum(axis=-1)
    written = (slots < kv_len_BT.max(axis=1)[:, None])[:, None, :, None]  # [B, 1, S, 1]
    v_BLSV = jnp.where(written, v_BLSV, 0)  # 0 * NaN is NaN: what was never written must not be multiplied
    # Batch axes first: einsum would make of "->BTLMV" a bfloat16 product that XLA lacks on the CPU.
    out = jnp.einsum("BTLMS,BLSV->BLTMV", p.astype(v_BLSV.dtype), v_BLSV, preferred_element_type=jnp.float32)
    out = out.swapaxes(1, 2) / jnp.where(total > 0, total, 1.0)[..., None]
    lse = jnp.where(total > 0, jnp.log(total) + top[..., 0], -jnp.inf)
    return out.astype(parts[0][0].dtype), lse
