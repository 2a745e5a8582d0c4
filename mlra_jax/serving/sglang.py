"""MLRA for sglang-jax 0.1.0rc0, none of whose files is changed.

The engine schedules requests, allocates pages and reuses prefixes; the model, what a page holds, and what happens to a
request whose logits are not finite are ours. `register` puts these in place in a process: classes of the engine are
derived from, and the derived ones take their names where the engine makes its objects. The engine starts its processes
by `spawn`, so that each has to register; `run_scheduler` and `run_detokenizer` do so in theirs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import register_pytree_node_class
from sgl_jax.srt.entrypoints import engine
from sgl_jax.srt.layers.logits_processor import LogitsMetadata, LogitsProcessor
from sgl_jax.srt.layers.sampler import Sampler
from sgl_jax.srt.managers import schedule_batch, tp_worker
from sgl_jax.srt.managers.detokenizer_manager import run_detokenizer_process
from sgl_jax.srt.managers.scheduler import run_scheduler_process
from sgl_jax.srt.mem_cache.memory_pool import GB, MHATokenToKVPool
from sgl_jax.srt.model_executor import model_runner
from sgl_jax.srt.models.registry import ModelRegistry
from sgl_jax.srt.sampling.sampling_batch_info import SamplingMetadata

from mlra_jax.attention.head_shards import HeadShards
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.generation.load import splits_heads
from mlra_jax.generation.sampling import Sampling
from mlra_jax.serving.gate import MAX_TOP_LOGPROBS
from mlra_jax.serving.hf_config import MLRAConfig, register_config
from mlra_jax.serving.huggingface import ARCHITECTURE, load
from mlra_jax.serving.step import RaggedBatch, TokenLayout, hidden_states, logits
from mlra_jax.sharding import decode_rules

UNLIKELY = -1e30
"""A logit for what must not be sampled: finite, so that it remains so divided by a temperature."""

NOT_FINITE = -1
"""The token that `OurSampler` gives where logits are NaN or infinite."""

NOT_FINITE_MESSAGE = (
    "The logits for this completion are NaN or infinite: the weights of this model are no good, or the prompt makes it "
    "overflow."
)


class Logits(LogitsProcessor):
    """The engine's choice of rows, with the tied token matrix in float32."""

    def _get_logits(self, hidden_states: jax.Array, lm_head: MLRAForCausalLM) -> jax.Array:
        logits_TV = logits(lm_head.mlra, hidden_states)
        token_V = jax.lax.broadcasted_iota(jnp.int32, (1, logits_TV.shape[1]), 1)
        return jnp.where(token_V < lm_head.n_tokens, logits_TV, UNLIKELY)


class MLRAForCausalLM(nnx.Module):
    """What the engine calls: `__init__`, `load_weights`, then `__call__` inside its compiled functions."""

    def __init__(self, config: MLRAConfig, mesh: Mesh, dtype: Any = jnp.bfloat16):
        self.config, self.mesh = config, mesh
        self.n_tokens: int = config.n_tokens  # ids from here on are padding of the vocabulary
        self.logits_processor = Logits(config.vocab_size, mesh=mesh)

    def load_weights(self, model_config: Any) -> None:
        """Loads a folder of `mlra-export` or `mlra-serve`; each device reads its own part."""
        self.max_len: int = model_config.context_len
        config, tensor = self.config.model(), self.mesh.shape["tensor"]
        # The engine's mesh has the explicit axes `data` and `tensor`, as ours.
        rules = decode_rules(splits_heads("auto", config, tensor, self.mesh.devices.flat[0].platform))
        self.mlra = load(model_config.model_path, rules, self.mesh)
        attention = config.attention
        assert isinstance(attention, LatentAttentionConfig)
        with jax.set_mesh(self.mesh):
            heads = HeadShards.of(config, rules).count // tensor
        sizes = attention.d_latent, attention.d_rope, heads
        self.packs = self.mesh.devices.flat[0].platform != "tpu"
        """Whether pages hold no padding. On TPUs they are the engine's own: its layout is what kernels read there, and
        a row of another width would be padded to as much by the hardware."""
        if self.packs:
            self.token_layout = TokenLayout.packed(*sizes)
        else:
            self.token_layout = TokenLayout.of_kv_heads(*sizes, head_dim=self.config.head_dim)

    def __call__(self, forward_batch: Any, memory_pools: Any, logits_metadata: Any) -> tuple[Any, ...]:
        pool = memory_pools.token_to_kv_pool
        batch = self._ragged(forward_batch, pool.page_size)
        # On GPUs the engine asks for the highest precision, for its own layers.
        with jax.default_matmul_precision("default"):
            hidden, buffers = hidden_states(
                self.mlra, pool.kv_buffer, forward_batch.input_ids, batch, self.token_layout
            )
            output = self.logits_processor(hidden, self, logits_metadata)
        return output, {"token_to_kv_pool": buffers}, True, None  # the last two: unused flags, experts' ids

    def _ragged(self, batch: Any, page_size: int) -> RaggedBatch:
        """The engine's batch in blocks; devices of `data` have requests and pages of their own, counted from 0."""
        n_pages = -(-self.max_len // page_size)

        def on_each(
            position_T: jax.Array,
            slot_T: jax.Array,
            cache_loc: jax.Array,
            length_B: jax.Array,
            new_B: jax.Array | None = None,
        ) -> RaggedBatch:
            # `cache_loc`: the slots of all tokens of all requests, each request from a multiple of the page size on.
            page = cache_loc[::page_size] // page_size
            count_B = -(-length_B // page_size)
            first_B = jnp.cumsum(count_B) - count_B
            table_BN = page[jnp.minimum(first_B[:, None] + jnp.arange(n_pages), len(page) - 1)]
            return RaggedBatch.of_requests(position_T, slot_T, new_B, table_BN)

        args = [batch.positions, batch.out_cache_loc, batch.cache_loc, batch.seq_lens]
        if not batch.forward_mode.is_decode():
            args.append(batch.extend_seq_lens)
        shapes = jax.eval_shape(on_each, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args))
        return jax.shard_map(
            on_each,
            in_specs=(P("data"),) * len(args),
            out_specs=shapes.specs(self.mlra.rules),
            check_vma=False,
        )(*args)


@register_pytree_node_class
class LatentPool(MHATokenToKVPool):
    """The engine's pages with latents and rotary keys in them, without its padding: [P, S, X * W] in each layer.

    Each of the X devices that split KV heads has W values of a token: its latent heads and one rotary key.
    """

    def __init__(self, layout: TokenLayout, **kwargs: Any):
        self.layout = layout
        super().__init__(**kwargs)

    def _create_buffers(self) -> None:
        axes = (self.attention_data_partition_axis, None, self.kv_partition_axis)
        self.kv_sharding = NamedSharding(self.mesh, P(*axes))
        pages = self.size // self.page_size + self.dp_size  # and a page of each rank for padding
        shape = (pages, self.page_size, self.mesh.shape[self.kv_partition_axis] * self.layout.width)
        with jax.set_mesh(self.mesh):
            make = jax.jit(lambda: jnp.zeros(shape, self.dtype), out_shardings=self.kv_sharding)
            self.kv_buffer = [make() for _ in range(self.layer_num)]

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes of all devices, of which the engine wants two numbers."""
        return sum(buffer.nbytes for buffer in self.kv_buffer), 0

    def _calculate_memory_usage(self) -> None:
        self.mem_usage = self.get_kv_size_bytes()[0] / GB


class Runner(model_runner.ModelRunner):
    """Makes a `LatentPool` where pages hold no padding, and counts what they hold for a token."""

    def _compute_cell_size(self) -> int:
        values = self.model.token_layout.width * self._kv_pool_layer_count()
        return values * np.dtype(self.kv_cache_dtype).itemsize

    def _maybe_wrap_hybrid_kv_pool(self, token_to_kv_pool_class: type, **kwargs: Any) -> MHATokenToKVPool:
        if not self.model.packs:
            return super()._maybe_wrap_hybrid_kv_pool(token_to_kv_pool_class, **kwargs)
        return LatentPool(
            self.model.token_layout,
            size=self.max_total_num_tokens,
            page_size=self.page_size,
            dtype=self.kv_cache_dtype,
            layer_num=self._kv_pool_layer_count(),
            mesh=self.mesh,
            **kwargs,
        )


class OurSampler(Sampler):
    """Samples as `mlra_jax.generation.sampling` does: min-p of probabilities, and a random number of each token's own.

    Gives `NOT_FINITE` for rows whose logits are not finite; the engine's own would go on with any token.
    """

    def __call__(self, logits_output: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        tokens_B, *rest = super().__call__(logits_output, *args, **kwargs)
        finite_B = jnp.isfinite(logits_output.next_token_logits.max(axis=-1))
        finite_B = jax.sharding.reshard(finite_B, jax.typeof(tokens_B).sharding)
        return jnp.where(finite_B, tokens_B, NOT_FINITE), *rest

    def _regular_sampling(self, operands: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        logits_BV, metadata, rng, _ = operands
        seed_B = metadata.sampling_seeds
        if seed_B is None:  # without --enable-deterministic-sampling
            of_row = NamedSharding(self.mesh, P("data"))
            seed_B = jax.sharding.reshard(jax.random.randint(rng, logits_BV.shape[:1], 0, 2**31 - 1), of_row)
        keep = (metadata.top_ks, metadata.top_ps, metadata.min_ps)

        def one(
            logits_V: jax.Array,
            temperature: Any,
            seed: jax.Array,
            position: jax.Array,
            top_k: Any = 0,
            top_p: Any = 1.0,
            min_p: Any = 0.0,
        ) -> jax.Array:
            kept_V = Sampling(
                temperature=temperature[0], top_k=top_k, top_p=top_p, min_p=min_p
            ).filtered_logits(logits_V)
            key = jax.random.fold_in(jax.random.key(seed), position)
            return jnp.where(top_k == 1, logits_V.argmax(), jax.random.categorical(key, kept_V))

        def on_each(logits_BV: jax.Array, *rows: jax.Array) -> jax.Array:
            *first, top_k, top_p, min_p = logits_BV, *rows
            filtered = jnp.any(top_k < logits_BV.shape[1]) | jnp.any(top_p < 1) | jnp.any(min_p > 0)
            sample: Any = jax.vmap(one)
            # Sorting a vocabulary takes longer than all the rest.
            return jax.lax.cond(filtered, lambda: sample(*first, top_k, top_p, min_p), lambda: sample(*first))

        args = (
            jax.sharding.reshard(logits_BV, NamedSharding(self.mesh, P("data", None))),
            metadata.temperatures,
            seed_B,
            metadata.positions,
            *keep,
        )
        specs = tuple(P("data", *[None] * (x.ndim - 1)) for x in args)
        mapped = jax.shard_map(on_each, mesh=self.mesh, in_specs=specs, out_specs=P("data"), check_vma=False)
        return mapped(*args).astype(jnp.int32), jax.nn.log_softmax(logits_BV, axis=-1)


def _end_if_not_finite(check_finished: Any) -> Any:
    """`Req.check_finished` that ends a request with an error where `OurSampler` says so."""

    @functools.wraps(check_finished)
    def check(self: Any, new_accepted_len: int = 1) -> None:
        if self.output_ids and self.output_ids[-1] == NOT_FINITE and not self.finished():
            self.output_ids[-1] = next(iter(self.eos_token_ids or [0]))  # the detokenizer takes tokens alone
            self.finished_reason = schedule_batch.FINISH_ABORT(NOT_FINITE_MESSAGE, 500, "InternalServerError")
            return
        check_finished(self, new_accepted_len)

    return check


def _copied(merge_cache_loc: Any) -> Any:
    """`ScheduleBatch._merge_cache_loc` whose result stays as it is.

    The engine's own is a view of one buffer, which the overlap scheduler writes for the next batch while JAX may still
    read it for this one (issue 1503 of sglang-jax).
    """

    @functools.wraps(merge_cache_loc)
    def merge(*args: Any, **kwargs: Any) -> np.ndarray:
        return merge_cache_loc(*args, **kwargs).copy()

    return merge


def _with_own_logprobs(change: Any) -> Any:
    """`ScheduleBatch.filter_batch` or `merge_batch` with lists of log-probabilities that belong to its requests.

    The engine keeps what each wants in lists beside the requests, forgets to change them where a batch that wants some
    meets one that wants none, and fails on the lengths later.
    """

    def renew(batch: Any) -> None:
        for info in batch.reqs_info:
            wanted = info.reqs and any(req.return_logprob for req in info.reqs)
            info.top_logprobs_nums = [req.top_logprobs_num for req in info.reqs] if wanted else None
            info.token_ids_logprobs = [req.token_ids_logprob for req in info.reqs] if wanted else None

    @functools.wraps(change)
    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        renew(self)
        for other in args:
            if isinstance(other, schedule_batch.ScheduleBatch):
                renew(other)
        result = change(self, *args, **kwargs)
        renew(self)
        return result

    return changed


def _of_few_shapes(metadata: Any) -> Any:
    """`from_model_worker_batch` of the engine's metadata, without what would compile a program for each batch.

    The engine gives compiled functions, as constants, which request wants how many log-probabilities, and how long the
    prompts are for which it wants some. Only the greatest number matters, and each request gets its own in the end.
    """
    make = metadata.from_model_worker_batch.__func__

    @functools.wraps(make)
    def make_uniform(cls: Any, *args: Any, **kwargs: Any) -> Any:
        made = make(cls, *args, **kwargs)
        if not getattr(made, "extend_return_logprob", False):  # of prompts' tokens
            wanted = any(number > 0 for number in made.top_logprobs_nums or ())
            made.top_logprobs_nums = [MAX_TOP_LOGPROBS] if wanted else None
            if all(ids is None for ids in made.token_ids_logprobs or ()):
                made.token_ids_logprobs = None
            for name in ("seq", "logprob_start", "logprob_pruned"):
                if hasattr(made, field := f"extend_{name}_lens_cpu"):
                    setattr(made, field, None)
        return made

    return classmethod(make_uniform)


def register() -> None:
    """Makes the model known to the engine in this process. It may be called again."""
    register_config()
    ModelRegistry.models[ARCHITECTURE] = MLRAForCausalLM
    tp_worker.ModelRunner = Runner
    model_runner.Sampler = OurSampler
    if not hasattr(schedule_batch.Req.check_finished, "__wrapped__"):
        schedule_batch.Req.check_finished = _end_if_not_finite(schedule_batch.Req.check_finished)
        for name in ("filter_batch", "merge_batch"):
            change = getattr(schedule_batch.ScheduleBatch, name)
            setattr(schedule_batch.ScheduleBatch, name, _with_own_logprobs(change))
        for metadata in (LogitsMetadata, SamplingMetadata):
            metadata.from_model_worker_batch = _of_few_shapes(metadata)
        schedule_batch.ScheduleBatch._merge_cache_loc = _copied(schedule_batch.ScheduleBatch._merge_cache_loc)
    engine.run_scheduler_process = run_scheduler
    engine.run_detokenizer_process = run_detokenizer


def run_scheduler(*args: Any) -> None:
    """The engine's process that holds the model."""
    register()
    run_scheduler_process(*args)


def run_detokenizer(*args: Any) -> None:
    """The engine's process that makes text of tokens."""
    register_config()
    run_detokenizer_process(*args)
