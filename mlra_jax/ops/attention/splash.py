"""Causal attention on TPU: the Splash attention that JAX brings, inside `shard_map` with its checks or without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from mlra_jax.ops import device
from mlra_jax.ops.attention.qk_parts import Joined
from mlra_jax.ops.back_end import Kernel
from mlra_jax.ops.remat import ATTENTION
from mlra_jax.ops.shard_map_utils import unchecked

BLOCKS = (512, 256, 128)
"""Tokens of a block of queries or keys: the first that divides them."""

FUSED_BLOCKS = 8
"""Most blocks of keys for which one kernel computes all gradients: it writes the queries' once for each of them."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiling of a call."""

    block_q: int
    block_kv: int
    fused: bool
    """Whether one kernel computes all gradients."""

    @classmethod
    def heuristic(cls, shape: tuple[int, int], target: None) -> Config:
        """The largest blocks that divide queries and keys."""
        block_q, block_kv = (next(b for b in BLOCKS if size % b == 0) for size in shape)
        return cls(block_q, block_kv, shape[1] <= FUSED_BLOCKS * block_kv)

    def block_sizes(self) -> splash.BlockSizes:
        """The same as Splash attention wants it."""
        q, kv = self.block_q, self.block_kv
        backward = {"use_fused_bwd_kernel": True} if self.fused else {"block_q_dq": q, "block_kv_dq": kv}
        return splash.BlockSizes(
            block_q=q,
            block_kv=kv,
            block_kv_compute=kv,
            block_q_dkv=q,
            block_kv_dkv=kv,
            block_kv_dkv_compute=kv,
            **backward,
        )


class Splash(Kernel[tuple[int, int], Config]):
    """Differentiable once; interpreted with `interpret=True`."""

    name: ClassVar[str] = "splash"
    config_type = Config

    def check(self, args: Joined) -> tuple[int, int]:
        """Numbers of queries and keys."""
        if not self.interpret:
            device.require_tpu()
        t, s = args.q.shape[1], args.k.shape[1]
        if t % BLOCKS[-1] or s % BLOCKS[-1]:
            raise NotImplementedError(
                f"It needs lengths that are multiples of {BLOCKS[-1]}; got {t} queries, {s} keys."
            )
        if any(width % 64 for width in (args.k.shape[-1], args.v.shape[-1])):
            raise NotImplementedError(
                f"It needs widths that are multiples of 64; got {args.k.shape[-1]} and {args.v.shape[-1]}."
            )
        return t, s

    def run(self, shape: tuple[int, int], config: Config, args: Joined) -> jax.Array:
        """Calls Splash attention."""
        (t, s), n, q_start = shape, args.q.shape[2], args.q_start
        known = isinstance(q_start, int | np.integer)
        offset = int(q_start) if known else s - t  # the one that sees every block of keys
        mask = splash.MultiHeadMask([splash.CausalMask((t, s), offset=offset)] * n)
        kernel = splash.make_splash_mha_single_device(
            mask,
            block_sizes=config.block_sizes(),
            residual_checkpoint_name=ATTENTION,
            interpret=bool(self.interpret),
        )
        if not known:
            kernel = _shifted(kernel, q_start, offset, (t, config.block_q), (s, config.block_kv))
        q = (args.q.astype(jnp.float32) * args.scale).astype(args.q.dtype)  # Splash attention takes no scale
        by_head = (x.swapaxes(1, 2) for x in (q, args.k, args.v))
        return unchecked(_attend)(kernel, *by_head).swapaxes(1, 2)


def _shifted(
    kernel: Any,
    q_start: jax.Array | int,
    offset: int,
    queries: tuple[int, int],
    keys: tuple[int, int],
) -> Any:
    """The causal kernel of queries from `offset` on as one of queries from `q_start` on.

    What Splash is told of each block of queries and keys: whether it is seen by no query, by some or by all (0, 1, 2),
    and which block of keys, and in the backward pass of queries, is to be in memory: where none is seen, the next one
    that is, so that it is copied meanwhile.

    Args:
      kernel: its arrays describe all blocks.
      q_start: position of the first query.
      offset: the position that the kernel was made for.
      queries: number of queries, and in a block.
      keys: the same of keys.
    """
    (t, block_q), (s, block_kv) = queries, keys
    first = q_start + block_q * jnp.arange(t // block_q)[:, None]  # query of a block
    k = jnp.arange(s // block_kv)[None, :]
    seen = first + block_q - 1 >= block_kv * k
    blocks = jnp.where(first >= block_kv * (k + 1) - 1, 2, seen.astype(jnp.int32))
    first_seeing = jnp.clip((block_kv * k - q_start) // block_q, 0, t // block_q - 1)
    of_queries = jnp.where(seen, jnp.arange(t // block_q)[:, None], first_seeing)

    def told(info: Any, fetched: jax.Array) -> Any:
        cast = lambda x, like: jnp.broadcast_to(x, like.shape[1:])[None].astype(like.dtype)
        return info._replace(
            block_mask=cast(blocks, info.block_mask),
            data_next=cast(fetched, info.data_next),
            q_sequence=info.q_sequence + (q_start - offset),
        )

    (forward, dq, dkv), keywords = kernel.tree_flatten()
    of_keys = jnp.where(seen, k, 0)
    parts = told(forward, of_keys), dq and told(dq, of_keys), told(dkv, of_queries)
    return type(kernel).tree_unflatten(keywords, parts)


def _attend(kernel: Callable[..., jax.Array], *qkv_BNTH: jax.Array) -> jax.Array:
    return jax.vmap(kernel)(*qkv_BNTH)
