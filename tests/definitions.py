"""Definitions that the package's own, faster or sharded code is compared with."""

import jax
import jax.numpy as jnp

from mlra_jax.data.pipeline import IGNORED


def cross_entropy(logits, targets):
    """Sum of the cross-entropies of all positions whose target is not `IGNORED`, in nats, and their number.

    The target's logit is picked by comparing ids, so that the vocabulary of `logits` [..., V] may be split.
    """
    counted = targets != IGNORED
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    target_logit = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    nats = jax.nn.logsumexp(logits, axis=-1) - target_logit
    return jnp.sum(jnp.where(counted, nats, 0)), jnp.sum(counted)
