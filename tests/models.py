"""Models that are small enough to train or decode in a test."""

from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.config import ModelConfig

SMALL = ModelConfig(
    vocab_size=264,
    n_layers=2,
    d_model=32,
    n_heads=4,
    d_ff=64,
    attention=LatentAttentionConfig(4, 4, q_lora_rank=16, kv_lora_rank=32, d_nope=8, d_rope=8),
    compute_dtype="float32",
)
