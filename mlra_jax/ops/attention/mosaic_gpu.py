"""Causal attention and its gradients on Hopper GPUs in Pallas Mosaic GPU: when it applies, how it cuts the work."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mlra_jax.ops.attention.qk_parts import Parts, heads_of
from mlra_jax.ops.hopper import ROWS, check_device
from mlra_jax.ops.remat import ATTENTION
from mlra_jax.ops.shard_map_utils import unchecked

TILE = 128
"""Tokens are padded to a multiple of it."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of a call, padded to whole tiles."""

    batch: int
    heads: int
    """L: KV heads; part i of their queries has `q_heads[i]`, and head l reads l mod that; keys likewise."""
    q_heads: tuple[int, ...]
    k_heads: tuple[int, ...]
    widths: tuple[int, ...]
    v_width: int
    latent: bool
    """Whether the value is the first part of the key."""
    heads_per_kv: int
    """M: query heads that read a KV head."""
    queries: int
    """T."""
    tokens: int
    """S."""
    keys: int
    """Of the tokens those that are no padding."""

    @property
    def key_widths(self) -> tuple[int, ...]:
        """Of what is read of a key, with its value, where that is not part of it."""
        return self.widths if self.latent else (*self.widths, self.v_width)


@dataclasses.dataclass(frozen=True)
class Config:
    """How a call is cut.

    Attributes:
      row_groups: warpgroups of a program of the forward kernel, each with a tile of 64 tokens of a query head.
      block: tokens that it takes at a time.
      stages: of its ring.
      dq_block: tokens that the kernel for the queries' gradients takes at a time.
      dq_stages: of its ring.
      dk_stages: of the ring of the kernel for the keys' gradients, which takes 64 rows at a time.
      dk_shares: programs among which the rows that see a block of keys are divided; their sums are added up after.
    """

    row_groups: int
    block: int
    stages: int
    dq_block: int = 64
    dq_stages: int = 4
    dk_stages: int = 4
    dk_shares: int = 1

    @classmethod
    def heuristic(cls, shape: Shape, processors: int) -> Config:
        """A cut that fits the GPU."""
        tiles = shape.queries // ROWS * shape.heads_per_kv
        wide = sum(shape.key_widths) > 192
        programs = shape.tokens // TILE * shape.heads * shape.batch
        return cls(
            row_groups=3 if tiles % 3 == 0 else 2,
            block=64,
            stages=3 if wide else 4,
            dq_stages=3 if wide else 4,
            dk_stages=3 if wide else 4,
            # The first block of keys is seen by twice as many rows as the average one: with many programs a processor
            # the last ones end together. Half as many took a tenth longer, and spared half of that in sums (mlra_4).
            dk_shares=max(1, min(12 * processors // programs, tiles // 8)),
        )


def causal_attention(
    parts: Parts,
    v: jax.Array | None,
    *,
    scale: float,
    q_start: jax.Array | int,
    config: Config | None = None,
    interpret: Any = None,
) -> jax.Array:
    """See `mlra_jax.ops.attention.causal_attention_parts`; bfloat16 in and out, float32 softmax and sums.

    Args:
      parts: queries and keys.
      v: values, or None.
      scale: multiplies the scores.
      q_start: position of the first query.
      config: how the work is cut; None: as the heuristic says.
      interpret: `plgpu.InterpretGPUParams` run the kernels on the CPU.

    Raises:
      NotImplementedError: this is no Hopper GPU, or the arguments are not what the kernels take.
    """
    check_device(interpret)
    arrays = [x for pair in parts for x in pair] + ([] if v is None else [v])
    if not_bf16 := {str(x.dtype) for x in arrays if x.dtype != jnp.bfloat16}:
        raise NotImplementedError(f"the Mosaic GPU kernels take bfloat16; got {', '.join(sorted(not_bf16))}.")
    widths = tuple(k.shape[-1] for _, k in parts)
    v_width = widths[0] if v is None else v.shape[-1]
    if any(w not in (32, 64, 128) for w in widths) or v_width not in (64, 128) or sum(widths) > 192:
        raise NotImplementedError(
            "the Mosaic GPU kernels take keys of parts of 32, 64 or 128 features, 192 in all, and values of 64 or "
            f"128; got {' + '.join(map(str, widths))} and {v_width}."
        )

    def call(_: None, start: jax.Array, *args: jax.Array) -> jax.Array:
        pairs = list(zip(args[: 2 * len(parts) : 2], args[1 : 2 * len(parts) : 2], strict=True))
        rest = None if v is None else args[-1]
        return _attend(scale, config, interpret, start, pairs, rest)

    start = jnp.full((1,), q_start, jnp.int32)
    return unchecked(call)(None, start, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(
    scale: float, config: Config | None, interpret: Any, start: jax.Array, parts: Parts, v: jax.Array | None
) -> jax.Array:
    return _forward(scale, config, interpret, start, parts, v)[0]


def _shape(parts: Parts, v: jax.Array | None) -> Shape:
    (b, t, _, m, _), s = parts[0][0].shape, parts[0][1].shape[1]
    whole = lambda n: -(-n // TILE) * TILE
    return Shape(
        batch=b,
        heads=heads_of(parts, v),
        q_heads=tuple(q.shape[2] for q, _ in parts),
        k_heads=tuple(k.shape[2] for _, k in parts),
        widths=tuple(k.shape[-1] for _, k in parts),
        v_width=(parts[0][1] if v is None else v).shape[-1],
        latent=v is None,
        heads_per_kv=m,
        queries=whole(t),
        tokens=whole(s),
        keys=s,
    )


def _config(config: Config | None, shape: Shape, interpret: Any) -> Config:
    return config or Config.heuristic(shape, check_device(interpret)[1])


def _pad(x: jax.Array, axis: int, n: int) -> jax.Array:
    """`x` with zeros up to a size of n along an axis."""
    return jnp.pad(x, [(0, n - x.shape[i] if i == axis else 0) for i in range(x.ndim)])


def _by_head(x_BTLMW: jax.Array, shape: Shape) -> jax.Array:
    """[M, B, T, L, W], padded: as a product with a matrix for each head leaves it, which therefore turns nothing."""
    return _pad(x_BTLMW.transpose(3, 0, 1, 2, 4), 2, shape.queries)


def _forward(
    scale: float, config: Config | None, interpret: Any, start: jax.Array, parts: Parts, v: jax.Array | None
) -> tuple[jax.Array, Any]:
    from mlra_jax.ops.attention.mosaic_gpu_kernel import attend

    shape = _shape(parts, v)
    out_MBTLV, lse = attend(
        start,
        [_by_head(q, shape) for q, _ in parts],
        [_pad(k, 1, shape.tokens) for _, k in parts],
        None if v is None else _pad(v, 1, shape.tokens),
        shape=shape,
        config=_config(config, shape, interpret),
        scale=scale,
        interpret=interpret,
    )
    out_MBTLV, lse = checkpoint_name(out_MBTLV, ATTENTION), checkpoint_name(lse, ATTENTION)
    out = out_MBTLV[:, :, : parts[0][0].shape[1]].transpose(1, 2, 3, 0, 4)
    return out, (start, parts, v, out_MBTLV, lse)


def _backward(
    scale: float, config: Config | None, interpret: Any, saved: Any, d_out: jax.Array
) -> tuple[Any, list[tuple[jax.Array, jax.Array]], jax.Array | None]:
    from mlra_jax.ops.attention.mosaic_gpu_kernel import gradients

    start, parts, v, out_MBTLV, lse = saved
    shape = _shape(parts, v)
    dq, dk = gradients(
        start,
        [_by_head(q, shape) for q, _ in parts],
        [_pad(k, 1, shape.tokens) for _, k in parts],
        None if v is None else _pad(v, 1, shape.tokens),
        out_MBTLV,
        lse,
        _by_head(d_out, shape),
        shape=shape,
        config=_config(config, shape, interpret),
        scale=scale,
        interpret=interpret,
    )

    def shared(x: jax.Array, axis: int, heads: int, n: int) -> jax.Array:
        """Sums over the heads that share one, along `axis`, and leaves the first n tokens, along the axis before."""
        x = jax.lax.slice_in_dim(x, 0, n, axis=axis - 1)
        if heads == shape.heads:
            return x
        by_shared = x.reshape(*x.shape[:axis], -1, heads, *x.shape[axis + 1 :])
        return by_shared.astype(jnp.float32).sum(axis=axis).astype(x.dtype)

    of_queries = lambda x, q: shared(x, 3, q.shape[2], q.shape[1]).transpose(1, 2, 3, 0, 4)
    of_keys = lambda x, k: shared(x, 2, k.shape[2], k.shape[1])
    d_parts = [
        (of_queries(dq_i, q), of_keys(dk_i, k))
        for (q, k), dq_i, dk_i in zip(parts, dq, dk[: len(parts)], strict=True)
    ]
    d_start = np.zeros(start.shape, jax.dtypes.float0)
    return d_start, d_parts, None if v is None else of_keys(dk[-1], v)


_attend.defvjp(_forward, _backward)
