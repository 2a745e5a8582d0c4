"""When the training kernels for Hopper GPUs apply, and how they are differentiated."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mlra_jax.ops.attention.mosaic_gpu.config import Config, Shape
from mlra_jax.ops.attention.mosaic_gpu.kernel import Static, Tensors, attend, gradients
from mlra_jax.ops.attention.qk_parts import Parts
from mlra_jax.ops.hopper import HopperKernel, require_bfloat16
from mlra_jax.ops.remat import ATTENTION
from mlra_jax.ops.shard_map_utils import unchecked


class MosaicGPU(HopperKernel[Shape, Config]):
    """bfloat16 in and out, float32 softmax and sums; differentiable once."""

    config_type = Config

    def check(self, parts: Parts, v: jax.Array | None, *, scale: float, q_start: jax.Array | int) -> Shape:
        """The sizes of a call."""
        self.target()
        arrays = [x for pair in parts for x in pair] + ([] if v is None else [v])
        require_bfloat16(arrays, "the Mosaic GPU kernels take")
        shape = Shape.of(parts, v)
        if (
            any(w not in (32, 64, 128) for w in shape.widths)
            or shape.v_width not in (64, 128)
            or sum(shape.widths) > 192
        ):
            raise NotImplementedError(
                "the Mosaic GPU kernels take keys of parts of 32, 64 or 128 features, 192 in all, and values of 64 or "
                f"128; got {' + '.join(map(str, shape.widths))} and {shape.v_width}."
            )
        return shape

    def run(
        self, shape: Shape, config: Config, parts: Parts, v: Any, *, scale: float, q_start: Any
    ) -> jax.Array:
        """Runs the kernels."""
        static = Static(shape, config, scale, self.interpret)
        arrays, tree = jax.tree.flatten((list(map(tuple, parts)), v))
        call = lambda _, start, *arrays: _attend(static, start, *jax.tree.unflatten(tree, arrays))
        return unchecked(call)(None, jnp.full((1,), q_start, jnp.int32), *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Static, start: jax.Array, parts: Parts, v: jax.Array | None) -> jax.Array:
    return _forward(static, start, parts, v)[0]


def _pad(x: jax.Array, axis: int, n: int) -> jax.Array:
    """`x` with zeros up to a size of n along an axis."""
    return jnp.pad(x, [(0, n - x.shape[i] if i == axis else 0) for i in range(x.ndim)])


def _by_head(x_BTLMW: jax.Array, shape: Shape) -> jax.Array:
    """[M, B, T, L, W], padded: the layout of a product with a matrix for each head, so nothing is transposed."""
    return _pad(x_BTLMW.transpose(3, 0, 1, 2, 4), 2, shape.queries)


def _tensors(start: jax.Array, parts: Parts, v: jax.Array | None, shape: Shape) -> Tensors:
    return Tensors(
        start=start,
        queries=tuple(_by_head(q, shape) for q, _ in parts),
        keys=tuple(_pad(k, 1, shape.tokens) for _, k in parts),
        values=None if v is None else _pad(v, 1, shape.tokens),
    )


def _forward(static: Static, start: jax.Array, parts: Parts, v: jax.Array | None) -> tuple[jax.Array, Any]:
    outputs = attend(static, _tensors(start, parts, v, static.shape))
    out_MBTLV, lse = (checkpoint_name(x, ATTENTION) for x in outputs)
    out = out_MBTLV[:, :, : parts[0][0].shape[1]].transpose(1, 2, 3, 0, 4)
    return out, (start, parts, v, out_MBTLV, lse)


def _backward(
    static: Static, saved: Any, d_out: jax.Array
) -> tuple[Any, list[tuple[jax.Array, jax.Array]], jax.Array | None]:
    (start, parts, v, *outputs), shape = saved, static.shape
    dq, dk = gradients(static, _tensors(start, parts, v, shape), *outputs, _by_head(d_out, shape))

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
