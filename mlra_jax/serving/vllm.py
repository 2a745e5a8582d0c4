"""MLRA for vLLM's JAX back end (tpu-inference), which is not modified: docs/vllm.md.

The engine schedules, allocates and shares pages, samples and answers. It asks a model for a step: the last hidden
states of a batch's tokens over its pages, and the logits of some of them. Both are `mlra_jax.serving.step`; here is how
the engine says what it wants.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mlra_jax.attention.head_shards import HeadShards
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.config import ConfigError
from mlra_jax.serving import huggingface
from mlra_jax.serving.step import RaggedBatch, TokenLayout, hidden_states, logits
from mlra_jax.sharding import AxisRules

RULES = AxisRules.of(batch="data", mlp="model", vocab="model", heads="model", kv_head_shards="model")
"""The engine's mesh has the Auto axes `data` and `model`, and others that are not used here."""


UNLIKELY = -1e30
"""A logit for what must not be sampled: finite, so that it remains so divided by a temperature."""


class MLRAForCausalLM(nnx.Module):
    """What the engine calls: `__init__` abstractly, `load_weights`, and the rest inside its compiled functions."""

    def __init__(self, vllm_config: Any, rng_key: jax.Array, mesh: Mesh):
        check(vllm_config, mesh)
        self.folder, self.mesh = vllm_config.model_config.model, mesh

    def load_weights(self, rng_key: jax.Array) -> None:
        """Reads the parameters, each device its own part."""
        self.n_tokens = huggingface.open_exported(self.folder).n_tokens
        self.mlra = huggingface.load(self.folder, RULES, self.mesh)

    def modules(self) -> Iterator[Any]:
        """vLLM looks for layers of PyTorch here."""
        return iter(())

    def __call__(
        self,
        kv_caches: list[jax.Array],
        input_ids: jax.Array,
        attention_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[list[jax.Array], jax.Array, list[jax.Array], None]:
        """Runs a batch: the layers' pages with its tokens, and their last hidden states [T, D]."""
        model = self.mlra
        a, page_size, head_dim = model.config.attention, kv_caches[0].shape[1], kv_caches[0].shape[-1]
        assert isinstance(a, LatentAttentionConfig)
        heads = HeadShards.of(model.config, RULES).count // RULES.size("kv_head_shards")
        layout = TokenLayout.of_kv_heads(a.d_latent, a.d_rope, heads, head_dim)
        batch = ragged_batch(attention_metadata, page_size)
        hidden, kv_caches = hidden_states(model, kv_caches, input_ids, batch, layout)
        return kv_caches, hidden, [], None  # nothing for a draft model, no experts

    def compute_logits(self, hidden_states: jax.Array) -> jax.Array:
        """Float32 logits [rows, V]; ids that the tokenizer lacks are never sampled."""
        values = logits(self.mlra, hidden_states)
        return jnp.where(jnp.arange(values.shape[1]) < self.n_tokens, values, UNLIKELY)


def check(vllm_config: Any, mesh: Mesh) -> None:
    """Refuses what this model does not do, before its parameters are read.

    Raises:
      ConfigError: names every option.
    """
    others = {name: size for name, size in mesh.shape.items() if name not in ("data", "model") and size > 1}
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    asked = {
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--enable-lora": vllm_config.lora_config is not None,
        "--speculative-config": vllm_config.speculative_config is not None,
        "--kv-cache-dtype": cache.cache_dtype not in ("auto", "bfloat16", "float32"),
        **{f"a mesh axis {name} of size {size}": True for name, size in others.items()},
    }
    if faults := [f"vLLM serves MLRA without {name}." for name, wanted in asked.items() if wanted]:
        raise ConfigError(faults)


def ragged_batch(metadata: Any, page_size: int) -> RaggedBatch:
    """A batch as the step wants it.

    Args:
      metadata: the engine's `AttentionMetadata`. Each device of the axis `data` has its own tokens, requests and pages:
        of T tokens and B requests `input_positions` [T], `block_tables` [B * N], `query_start_loc` [B + 1], and as the
        last of `request_distribution` [3] the number of real requests, the first ones.
      page_size: tokens of a page.
    """
    parts = RULES.size("batch")
    n_tokens, n_requests = metadata.input_positions.shape[0] // parts, metadata.seq_lens.shape[0] // parts
    # So few tokens are mostly one of each request, a row of its own.
    block = 1 if n_tokens <= n_requests else None

    def of_device(position_T: Any, table: Any, start: Any, distribution: Any) -> RaggedBatch:
        table_BN = table.reshape(n_requests, -1)
        real_B = jnp.arange(n_requests) < distribution[2]
        new_B = jnp.where(real_B, jnp.diff(start), 0)
        token_T, end_B = jnp.arange(n_tokens), jnp.cumsum(new_B)
        request_T = jnp.minimum(jnp.searchsorted(end_B, token_T, side="right"), n_requests - 1)
        page_T = table_BN[request_T, position_T // page_size]
        slot_T = jnp.where(token_T < end_B[-1], page_T * page_size + position_T % page_size, -1)
        return RaggedBatch.of_requests(position_T, slot_T, new_B, table_BN, block=block)

    given = (
        metadata.input_positions,
        metadata.block_tables,
        metadata.query_start_loc,
        metadata.request_distribution,
    )
    of_one = [jax.ShapeDtypeStruct((x.shape[0] // parts,), x.dtype) for x in given]
    specs = jax.eval_shape(of_device, *of_one).specs(RULES)
    return RULES.shard_map(of_device, (("batch",),) * len(given), specs)(*given)
