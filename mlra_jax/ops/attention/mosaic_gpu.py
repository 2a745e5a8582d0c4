"""Causal attention and its gradients on Hopper GPUs in Pallas Mosaic GPU: when it applies, how it cuts the work."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlra_jax.ops.attention.parts import Parts, heads_of
from mlra_jax.ops.decode import mosaic_gpu as decode
from mlra_jax.ops.device import current_device
from mlra_jax.ops.manual import unchecked

TILE = 128
"""Rows, and tokens, that they are padded to a multiple of."""


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
    rows: int
    """Of queries, of one head: tokens times M."""
    rows_per_token: int
    """M."""
    tokens: int
    """S."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How a call is cut.

    Attributes:
      block: tokens that the forward kernel takes at a time.
      stages: of its ring.
      row_groups: its warpgroups, of 64 rows each.
      dq_block: tokens that the kernel for the queries' gradients takes at a time.
      dq_stages: of its ring.
      dk_stages: of its ring.
      dk_shares: programs among which the rows that see a block of keys are divided; their sums are added up after.
    """

    block: int = 128
    stages: int = 3
    row_groups: int = 2
    dq_block: int = 64
    dq_stages: int = 4
    dk_stages: int = 4
    dk_shares: int = 1

    @classmethod
    def heuristic(cls, shape: Shape, processors: int) -> Config:
        """A cut that fits the GPU."""
        programs = shape.tokens // TILE * shape.heads * shape.batch
        wide = sum(shape.widths) + (0 if shape.latent else shape.v_width)
        return cls(
            stages=3 if wide <= 192 else 2,
            # The first block of keys is seen by twice as many rows as the average one.
            dk_shares=max(1, min(8 * processors // programs, shape.rows // (4 * TILE))),
            dk_stages=4 if wide <= 192 else 3,
            dq_stages=4 if wide <= 192 else 3,
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
    platform, kind = current_device()
    processors = 132 if interpret is not None else decode.find_processors(kind)
    if interpret is None and (platform != "gpu" or processors is None):
        raise NotImplementedError(f"the Mosaic GPU kernels run on Hopper GPUs; this is a {kind}.")
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(
            f"the Mosaic GPU kernels need JAX 0.11 or later, which needs Python 3.12; this is {jax.__version__}."
        )
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
        rows=whole(t * m),
        rows_per_token=m,
        tokens=whole(s),
    )


def _config(config: Config | None, shape: Shape) -> Config:
    processors = decode.find_processors(current_device()[1]) or 132
    return config or Config.heuristic(shape, processors)


def by_rows(q_BTLMW: jax.Array, rows: int) -> jax.Array:
    """Queries by head, [B, L, rows, W] with T * M rows of one token after the other, padded with zeros."""
    b, t, heads, m, w = q_BTLMW.shape
    q = q_BTLMW.transpose(0, 2, 1, 3, 4).reshape(b, heads, t * m, w)
    return jnp.pad(q, ((0, 0), (0, 0), (0, rows - t * m), (0, 0)))


def by_tokens(k_BSLW: jax.Array, tokens: int) -> jax.Array:
    """Keys or values by head, [B, L, S, W], padded with zeros."""
    return jnp.pad(k_BSLW.swapaxes(1, 2), ((0, 0), (0, 0), (0, tokens - k_BSLW.shape[1]), (0, 0)))


def _forward(
    scale: float, config: Config | None, interpret: Any, start: jax.Array, parts: Parts, v: jax.Array | None
) -> tuple[jax.Array, Any]:
    from mlra_jax.ops.decode.mosaic_gpu_kernel import attend

    shape = _shape(parts, v)
    config = _config(config, shape)
    t = parts[0][0].shape[1]
    seen = jnp.broadcast_to(jnp.minimum(start + jnp.arange(1, t + 1), parts[0][1].shape[1]), (shape.batch, t))
    keys = [by_tokens(k, shape.tokens) for _, k in parts]
    values = None if v is None else by_tokens(v, shape.tokens)
    pairs = tuple((q, k) for (q, _), k in zip(parts, keys, strict=True))
    out, lse = attend(
        pairs,
        values,
        seen,
        None,
        shape=decode.Shape.of(pairs, values, None),
        scale=scale,
        config=decode.Config(1, config.block, config.stages, config.row_groups),
        interpret=interpret,
    )
    return out, (start, parts, v, out, lse)


def _backward(
    scale: float, config: Config | None, interpret: Any, saved: Any, d_out: jax.Array
) -> tuple[Any, list[tuple[jax.Array, jax.Array]], jax.Array | None]:
    from mlra_jax.ops.attention.mosaic_gpu_kernel import gradients

    start, parts, v, out, lse = saved
    shape = _shape(parts, v)
    (b, t, _, m, _), s = parts[0][0].shape, parts[0][1].shape[1]
    dq, dk, dv = gradients(
        start,
        tuple(by_rows(q, shape.rows) for q, _ in parts),
        tuple(by_tokens(k, shape.tokens) for _, k in parts),
        None if v is None else by_tokens(v, shape.tokens),
        by_rows(out, shape.rows),
        by_rows(lse[..., None], shape.rows)[..., 0],
        by_rows(d_out, shape.rows),
        shape=shape,
        config=_config(config, shape),
        scale=scale,
        interpret=interpret,
    )

    def sum_shared(x_BLSW: jax.Array, heads: int) -> jax.Array:
        by_shared = x_BLSW.reshape(b, -1, heads, *x_BLSW.shape[2:])
        return by_shared.astype(jnp.float32).sum(axis=1).astype(x_BLSW.dtype)

    def of_queries(x_BLSW: jax.Array, heads: int) -> jax.Array:
        x = sum_shared(x_BLSW[:, :, : t * m], heads)
        return x.reshape(b, heads, t, m, -1).transpose(0, 2, 1, 3, 4)

    of_keys = lambda x_BLSW, heads: sum_shared(x_BLSW[:, :, :s], heads).swapaxes(1, 2)
    d_parts = [
        (of_queries(q, n), of_keys(k, heads))
        for q, n, k, heads in zip(dq, shape.q_heads, dk, shape.k_heads, strict=True)
    ]
    d_start = np.zeros(start.shape, jax.dtypes.float0)
    return d_start, d_parts, None if dv is None else of_keys(dv, shape.heads)


_attend.defvjp(_forward, _backward)
