"""The training loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlra_jax.data.pipeline import IGNORED


def cross_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of the cross-entropies of all counted positions, in nats, and their number.

    The vocabulary may be split over devices: the target's logit is picked by comparing ids and summing, which crosses
    devices as a scalar per position, where an index would gather the logits.

    Args:
      logits: [..., V] float32. All V ids are in the softmax, those past the tokenizer's own too (as in the paper).
      targets: [...] int32 in [0, V), or `IGNORED`.

    Returns:
      The sum (float32) and the count (int32) as scalars.
    """
    counted = targets != IGNORED
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    target_logit = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    nats = jax.nn.logsumexp(logits, axis=-1) - target_logit
    return jnp.sum(jnp.where(counted, nats, 0)), jnp.sum(counted)
