"""The models that tests run, and definitions that the package's own, faster or sharded code is compared with."""

import jax
import jax.numpy as jnp
import numpy as np

from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.config import ModelConfig, RotaryScalingConfig
from mlra_jax.data.pipeline import IGNORED

# Vocabulary, layers, D, N, F; L, J, A, L*C, H, R.
TINY = ModelConfig(32, 2, 16, 4, 24, LatentAttentionConfig(4, 2, 8, 16, 4, 4), compute_dtype="float32")
SMALL = ModelConfig(264, 2, 32, 4, 64, LatentAttentionConfig(4, 4, 16, 32, 8, 8), compute_dtype="float32")
"""The vocabulary has room for a byte tokenizer's."""
YARN = RotaryScalingConfig(
    "yarn", 4.0, original_max_position=8, beta_fast=1.0, beta_slow=0.01, mscale=1.5, mscale_all_dim=0.5
)
"""For few positions: keeps, divides and mixes frequencies of short rotary vectors, changes magnitude and scores."""


def cross_entropy(logits, targets):
    """Sum of the cross-entropies of all positions whose target is not `IGNORED`, in nats, and their number.

    The target's logit is picked by comparing ids, so that the vocabulary of `logits` [..., V] may be split.
    """
    counted = targets != IGNORED
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    target_logit = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    nats = jax.nn.logsumexp(logits, axis=-1) - target_logit
    return jnp.sum(jnp.where(counted, nats, 0)), jnp.sum(counted)


def deepseek_yarn(width, base, factor, length, beta_fast, beta_slow):
    """The frequencies of `DeepseekV2YarnRotaryEmbedding`, in float64."""
    kept = 1 / base ** (np.arange(0, width, 2) / width)
    dimension = lambda turns: width * np.log(length / (turns * 2 * np.pi)) / (2 * np.log(base))
    low, high = max(np.floor(dimension(beta_fast)), 0), min(np.ceil(dimension(beta_slow)), width - 1)
    mask = 1 - np.clip((np.arange(width // 2) - low) / (max(high - low, 0.001)), 0, 1)
    return kept / factor * (1 - mask) + kept * mask
