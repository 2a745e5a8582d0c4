"""One step of a serving engine: the new tokens of many requests, over a paged cache that the engine allocates.

An engine hands over flat tokens: each request's new ones side by side, of a prompt's chunk or a single one, then
padding; for each its position and the slot where it is cached, and for each request a page table. Products see flat
tokens. Attention sees *blocks*: rows of at most Q consecutive tokens of one request, so that a block reads its
request's cache once for all of its queries.

Shapes: T tokens, B requests, N pages of a request, P pages of the pool, S tokens of a page, R blocks of Q tokens, U
KV-head shards of a device, W columns of a device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mlra_jax.attention.head_shards import HeadShards
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.config import ModelConfig
from mlra_jax.model import Transformer
from mlra_jax.ops.append import normalize_and_append
from mlra_jax.ops.columns import Columns
from mlra_jax.ops.decode import latent_decode_attention
from mlra_jax.ops.rotary import Frequencies, rotary_tables
from mlra_jax.sharding import AxisRules, on_mesh

MAX_BLOCK = 128
"""Most queries of a block."""


def block_size(n_tokens: int, n_requests: int) -> int:
    """Queries of a block, a power of two: as many as leave at least as many tokens as padding, but from 8 to 128.

    Each request may leave a block partly empty, so that many requests with few tokens want small blocks.
    """
    fair = max(8, min(MAX_BLOCK, n_tokens // max(1, n_requests)))
    return 1 << (fair.bit_length() - 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RaggedBatch:
    """The tokens of a step as the layers see them; made by `of_requests` from what an engine says of a batch.

    With pages split over `data`, each device of that axis has its own requests and pages, and counts both from 0.
    """

    position_T: Any
    """In its sequence: int32."""
    slot_T: Any
    """Where the token is cached: page * S + offset; -1: it is padding. int32."""
    first_R: Any
    """The first token of each block, among the T."""
    count_R: Any
    """Tokens of each block, 0 to Q."""
    block_T: Any
    """The block of each token."""
    table_RN: Any
    """Pages of each block's request; entries past its last token may be any page."""
    block_size: int = dataclasses.field(metadata={"static": True})
    """Q."""

    @classmethod
    def of_requests(
        cls,
        position_T: jax.Array,
        slot_T: jax.Array,
        new_B: jax.Array | None,
        table_BN: jax.Array,
        *,
        block: int | None = None,
    ) -> Self:
        """Cuts the tokens of requests into blocks.

        Args:
          position_T: of each token in its sequence.
          slot_T: page * S + offset of each token; -1: padding, which must follow all tokens that are none.
          new_B: new tokens of each request; they lie side by side in this order. None: T / B for each.
          table_BN: pages of each request, from the one of its first token on.
          block: Q, if `new_B` is given; None: `block_size(T, B)`. Otherwise a block has all of a request's tokens.
        """
        n_tokens, n_requests = position_T.shape[0], table_BN.shape[0]
        if new_B is None:
            q = n_tokens // n_requests
            first_R = q * jnp.arange(n_requests)
            count_R = jnp.sum((slot_T >= 0).reshape(n_requests, q), axis=1)
            return cls(position_T, slot_T, first_R, count_R, jnp.arange(n_tokens) // q, table_BN, q)
        q = block or block_size(n_tokens, n_requests)
        # Of B requests with T tokens together, all but one token of each fill whole blocks at most.
        n_blocks = min(n_tokens, n_requests + (n_tokens - min(n_tokens, n_requests)) // q)
        end_B = jnp.cumsum(new_B)
        blocks_B = -(-new_B // q)
        end_block_B = jnp.cumsum(blocks_B)
        block_R = jnp.arange(n_blocks)
        request_R = jnp.minimum(jnp.searchsorted(end_block_B, block_R, side="right"), n_requests - 1)
        within_R = block_R - (end_block_B - blocks_B)[request_R]
        offset_R = q * within_R
        count_R = jnp.clip(new_B[request_R] - offset_R, 0, q)
        first_R = jnp.where(count_R > 0, (end_B - new_B)[request_R] + offset_R, 0)
        token_T = jnp.arange(n_tokens)
        request_T = jnp.minimum(jnp.searchsorted(end_B, token_T, side="right"), n_requests - 1)
        in_request_T = token_T - (end_B - new_B)[request_T]
        block_T = (end_block_B - blocks_B)[request_T] + in_request_T // q
        block_T = jnp.clip(block_T, 0, n_blocks - 1)
        return cls(position_T, slot_T, first_R, count_R, block_T, table_BN[request_R], q)

    def specs(self, rules: AxisRules) -> Self:
        """This batch with a `PartitionSpec` in each array's place."""
        return jax.tree.map(lambda x: rules.spec("batch", *[None] * (x.ndim - 1)), self)

    def by_block(self, x_T: jax.Array) -> jax.Array:
        """[T, ...] to [R, Q, ...]; entries past a block's tokens are any others."""
        if self.block_size == 1:
            return x_T[:, None]
        token_RQ = self.first_R[:, None] + jnp.arange(self.block_size)
        return jnp.take(x_T, token_RQ, axis=0, mode="clip")

    def by_token(self, x_RQ: jax.Array) -> jax.Array:
        """[R, Q, ...] to [T, ...]: the inverse of `by_block`."""
        if self.block_size == 1:
            return x_RQ[:, 0]
        offset_T = jnp.arange(len(self.block_T)) - self.first_R[self.block_T]
        return x_RQ.at[self.block_T, offset_T].get(mode="clip")


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Where latents and rotary key lie in the W values that a device caches for a token."""

    d_latent: int
    """C."""
    d_rope: int
    """R."""
    latents: tuple[int, ...]
    """The first column of each latent head."""
    rope: int
    """The first column of the rotary key."""
    width: int
    """W."""

    @classmethod
    def packed(cls, d_latent: int, d_rope: int, heads: int) -> Self:
        """Latent heads side by side, then one rotary key: U * C + R values, and what is missing to a multiple of 64.

        A kernel for Hopper GPUs copies columns in tiles of 64, of which a row must have whole ones.
        """
        end = heads * d_latent
        width = -(-(end + d_rope) // 64) * 64
        return cls(d_latent, d_rope, tuple(range(0, end, d_latent)), end, width)

    @classmethod
    def of_kv_heads(cls, d_latent: int, d_rope: int, heads: int, head_dim: int) -> Self:
        """As engines lay out U heads of keys and values, K0 V0 K1 V1...: latents as keys, the rotary key as values.

        The rotary key is the first head's; 2 * U * `head_dim` values, of which the rest is padding.
        """
        pair = 2 * head_dim
        return cls(d_latent, d_rope, tuple(range(0, heads * pair, pair)), head_dim, heads * pair)

    def columns(self, buffer: Any) -> tuple[Columns, Columns]:
        """The latents and the rotary key of a device's buffer [P, S, ...], for ops."""
        return Columns(buffer, self.latents, self.d_latent), Columns(buffer, (self.rope,), self.d_rope)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """One layer's pages, with the methods of `LayerCache` that latent attention calls."""

    buffer: Any
    """The engine's, [P, S, X, ...]: each device of `kv_head_shards` has its part of X, and for a token the W values
    that `layout` describes, in whatever shape."""
    batch: RaggedBatch
    rules: AxisRules = dataclasses.field(metadata={"static": True})
    layout: TokenLayout = dataclasses.field(metadata={"static": True})

    def specs(self) -> Self:
        """This cache with each array's `PartitionSpec` in its place."""
        buffer = self.rules.spec("batch", None, "kv_head_shards", *[None] * (self.buffer.ndim - 3))
        return dataclasses.replace(self, buffer=buffer, batch=self.batch.specs(self.rules))

    # Inside `shard_map`, where T is the axis of rows, with one token each:

    def append_latents(
        self,
        a_T1E: jax.Array,
        q_gain_A: jax.Array,
        kv_gain_UC: jax.Array,
        start_T: jax.Array,
        n_new_T: jax.Array,
        *,
        eps: float,
        q_scale: float,
        kv_scale: float,
        frequencies: Frequencies,
    ) -> tuple[jax.Array, Self]:
        """See `LayerCache.append_latents`; tokens go to their slots."""
        kv_latent, k_rope = self.layout.columns(self.buffer)
        q_T1A, appended, _ = normalize_and_append(
            a_T1E,
            q_gain_A,
            kv_gain_UC,
            start_T[:, None],
            self.batch.slot_T[:, None],
            kv_latent,
            k_rope,
            eps=eps,
            q_scale=q_scale,
            kv_scale=kv_scale,
            frequencies=frequencies,
        )
        assert isinstance(appended, Columns)
        return q_T1A, dataclasses.replace(self, buffer=appended.array)

    def attend_latents(
        self,
        q_nope: jax.Array,
        q_rope: jax.Array,
        start_T: jax.Array,
        n_new_T: jax.Array,
        *,
        scale: float,
        frequencies: Frequencies,
    ) -> jax.Array:
        """See `LayerCache.attend_latents`; every block reads the pages of its request."""
        batch, (kv_latent, k_rope) = self.batch, self.layout.columns(self.buffer)
        position_RQ = batch.by_block(start_T)
        new_RQ = jnp.arange(batch.block_size) < batch.count_R[:, None]
        out, _ = latent_decode_attention(
            batch.by_block(q_nope[:, 0]),
            batch.by_block(q_rope[:, 0]),
            kv_latent,
            k_rope,
            jnp.where(new_RQ, position_RQ + 1, 0).astype(jnp.int32),
            scale=scale,
            rotary=rotary_tables(position_RQ, frequencies),
            page_table=batch.table_RN,
        )
        return batch.by_token(out)[:, None]


def hidden_states(
    model: Transformer, buffers: Sequence[Any], tokens_T: jax.Array, batch: RaggedBatch, layout: TokenLayout
) -> tuple[jax.Array, list[Any]]:
    """Runs the layers over a batch.

    Args:
      model: in the decode layout.
      buffers: of the layers, see `PagedCache`; donate them to the compiled function.
      tokens_T: ids.
      batch: where the tokens belong.
      layout: of the buffers.

    Returns:
      The normalised last hidden states [T, D], meaningless for padding, and the buffers with the tokens.
    """
    caches = [PagedCache(buffer, batch, model.rules, layout) for buffer in buffers]
    new_T = (batch.slot_T >= 0).astype(jnp.int32)
    hidden, appended = model.decode_hidden(tokens_T[:, None], caches, batch.position_T, new_T)
    return hidden[:, 0], [cache.buffer for cache in appended]


def logits(model: Transformer, hidden_TD: jax.Array) -> jax.Array:
    """Float32 logits [T, V] of hidden states."""
    return model.embedding.decode(hidden_TD[:, None])[:, 0]


def compile_ahead(
    config: ModelConfig,
    rules: AxisRules,
    mesh: Mesh,
    *,
    tokens: int,
    requests: int,
    pages: int,
    page_size: int,
    max_len: int,
    prefill: bool,
    head_dim: int = 0,
) -> jax.stages.Compiled:
    """Compiles a step for a mesh whose devices may be absent; nothing is allocated.

    Args:
      config: the model's configuration.
      rules: the decoding table.
      mesh: with explicit axes.
      tokens: T.
      requests: B.
      pages: P.
      page_size: S.
      max_len: tokens of a request.
      prefill: whether requests have different numbers of new tokens; if not, each has T / B.
      head_dim: of the KV heads of an engine's own pool (`TokenLayout.of_kv_heads`); 0: a packed one.

    Returns:
      The program; its arguments are the model's leaves, the buffers, and the batch.
    """
    attention = config.attention
    assert isinstance(attention, LatentAttentionConfig)
    with jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), rules=rules, layout="decode"))
        parts = rules.size("kv_head_shards")
        heads = HeadShards.of(config, rules).count // parts
        sizes = attention.d_latent, attention.d_rope, heads
        layout = TokenLayout.of_kv_heads(*sizes, head_dim) if head_dim else TokenLayout.packed(*sizes)
        packing = 4 // jnp.dtype(config.compute_dtype).itemsize
        of_token = (2 * heads * parts // packing, packing, head_dim) if head_dim else (parts * layout.width,)
        names = ("batch", None, "kv_head_shards", *[None] * (len(of_token) - 1))

        def buffer() -> jax.Array:
            return rules.constrain(jnp.zeros((pages, page_size, *of_token), config.compute_dtype), *names)

        buffers = [jax.eval_shape(buffer) for _ in model.layers]
        leaves, treedef = jax.tree.flatten(model)
        ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
        table = ints(requests, -(-max_len // page_size))

        def run(
            leaves: Any, buffers: Any, ids_T: Any, position_T: Any, slot_T: Any, new_B: Any, table_BN: Any
        ) -> Any:
            batch = RaggedBatch.of_requests(position_T, slot_T, new_B if prefill else None, table_BN)
            return hidden_states(jax.tree.unflatten(treedef, leaves), buffers, ids_T, batch, layout)

        args = leaves, buffers, ints(tokens), ints(tokens), ints(tokens), ints(requests), table
        return jax.jit(run, donate_argnums=1).lower(*on_mesh(args, mesh)).compile()
