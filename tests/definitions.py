"""The models that tests run, and definitions that the package's own, faster or sharded code is compared with."""

import jax
import jax.numpy as jnp

from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.config import ModelConfig
from mlra_jax.data.pipeline import IGNORED

# Vocabulary, layers, D, N, F; L, J, A, L*C, H, R.
TINY = ModelConfig(32, 2, 16, 4, 24, LatentAttentionConfig(4, 2, 8, 16, 4, 4), compute_dtype="float32")
SMALL = ModelConfig(264, 2, 32, 4, 64, LatentAttentionConfig(4, 4, 16, 32, 8, 8), compute_dtype="float32")
"""The vocabulary has room for a byte tokenizer's."""


def cross_entropy(logits, targets):
    """Sum of the cross-entropies of all positions whose target is not `IGNORED`, in nats, and their number.

    The target's logit is picked by comparing ids, so that the vocabulary of `logits` [..., V] may be split.
    """
    counted = targets != IGNORED
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    target_logit = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    nats = jax.nn.logsumexp(logits, axis=-1) - target_logit
    return jnp.sum(jnp.where(counted, nats, 0)), jnp.sum(counted)
