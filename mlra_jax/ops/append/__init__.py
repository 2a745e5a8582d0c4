"""New tokens on their way into a KV cache."""

from mlra_jax.ops.append.api import append_latents, append_tokens

__all__ = ["append_latents", "append_tokens"]
