"""Appends one token of each row to a latent cache on Hopper GPUs: norms, rotation and append in one kernel."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mlra_jax.ops.append.reference import LatentTokens
from mlra_jax.ops.columns import decline_columns
from mlra_jax.ops.hopper import THREADS, HopperKernel, plgpu, require_bfloat16
from mlra_jax.ops.rotary import rotary_tables
from mlra_jax.ops.shard_map_utils import unchecked


def _store(ref: Any, value: jax.Array) -> None:
    """Writes `value`, of which a thread may have only two bytes; JAX 0.12 wants to be told that this is slow."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def _kernel(
    position_ref: Any,  # int32 [B]: where in the cache
    a_ref: Any,  # [B, A + U*C + R]
    q_gain_ref: Any,  # [A]
    kv_gain_ref: Any,  # [U, C]
    cos_ref: Any,  # [B, R]
    sin_ref: Any,  # [B, R], negative in the first half
    kv_latent_ref: Any,  # [B, U, S, C], changed
    k_rope_ref: Any,  # [B, S, R], changed
    q_ref: Any,  # [B, A]
    twice_smem: Any,  # [2R]
    *,
    eps: float,
    q_scale: float,
    kv_scale: float,
) -> None:
    """Program (b, 0) has row b's query, (b, 1 + u) its latent u, (b, 1 + U) its rotary key."""
    b, part = lax.axis_index("row"), lax.axis_index("part")
    heads, capacity, width = kv_latent_ref.shape[1:]
    rank, rotary = q_ref.shape[1], k_rope_ref.shape[2]
    at = position_ref[b]
    there = (at >= 0) & (at < capacity)

    def norm(start: Any, gain_ref: Any, scale: float) -> jax.Array:
        n = gain_ref.shape[0]
        lay_out = plgpu.Layout.WG_STRIDED((n,), vec_size=min(4, n // THREADS))
        x = plgpu.load(a_ref.at[b, pl.ds(start, n)], layout=lay_out, optimized=False).astype(jnp.float32)
        y = x * lax.rsqrt(jnp.sum(x * x) / n + eps)
        gain = plgpu.load(gain_ref, layout=lay_out, optimized=False).astype(jnp.float32)
        return (y.astype(a_ref.dtype).astype(jnp.float32) * gain * scale).astype(a_ref.dtype)

    @pl.when(part == 0)
    def _() -> None:
        _store(q_ref.at[b], norm(0, q_gain_ref, q_scale))

    @pl.when((part > 0) & (part <= heads) & there)
    def _() -> None:
        u = part - 1
        _store(kv_latent_ref.at[b, u, at], norm(rank + u * width, kv_gain_ref.at[u], kv_scale))

    @pl.when((part > heads) & there)
    def _() -> None:
        row = plgpu.Layout.WGMMA.reduce(1)
        read = lambda ref: plgpu.load(ref, layout=row, optimized=False)
        x = read(a_ref.at[b, pl.ds(rank + heads * width, rotary)])
        for i in range(2):  # element i then lies R/2 before its partner
            twice_smem[pl.ds(i * rotary, rotary)] = x
        plgpu.commit_smem()
        partner = read(twice_smem.at[pl.ds(rotary // 2, rotary)])
        rotated = x * read(cos_ref.at[b]) + partner * read(sin_ref.at[b])
        _store(k_rope_ref.at[b, at], rotated.astype(a_ref.dtype))


class MosaicGPU(HopperKernel[None, None]):
    """For one token of each row, and token-major caches."""

    def check(self, args: LatentTokens) -> None:
        """Whether it takes a call."""
        self.target()
        if args.layout != "token_major":
            raise NotImplementedError(
                f"the kernel that appends latents writes token-major caches, not {args.layout}."
            )
        decline_columns((args.kv_latent,), "the kernel that appends latents writes")
        if args.a.shape[1] != 1:
            raise NotImplementedError(
                f"the kernel that appends latents takes one token of each row; got {args.a.shape[1]}."
            )
        require_bfloat16((args.a, args.kv_latent, args.k_rope), "the kernel that appends latents takes")
        rank, width, rotary = len(args.q_gain), args.kv_latent.shape[3], args.k_rope.shape[2]
        if rank % (4 * THREADS) or width % THREADS or rotary % 64 or not rotary:
            raise NotImplementedError(
                "the kernel that appends latents takes queries of a multiple of 512 elements, latents of a multiple of "
                f"128 and rotary keys of a multiple of 64; got {rank}, {width} and {rotary}."
            )

    def run(self, shape: None, config: None, args: LatentTokens) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Runs the kernel; the caches are changed in place, if they are donated."""
        b, heads, rank, rotary = *args.kv_latent.shape[:2], len(args.q_gain), args.k_rope.shape[2]
        dtype = args.a.dtype

        def run(_: None, *arrays: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            *given, kv_latent, k_rope = arrays
            caches = jax.new_ref(kv_latent), jax.new_ref(k_rope)  # no copy of a donated cache
            q_BA = plgpu.kernel(
                functools.partial(_kernel, eps=args.eps, q_scale=args.q_scale, kv_scale=args.kv_scale),
                out_type=jax.ShapeDtypeStruct((b, rank), dtype),
                scratch_types=[plgpu.SMEM((2 * rotary,), dtype)],
                grid=(b, heads + 2),
                grid_names=("row", "part"),
                num_threads=1,
                thread_name="wg",
                compiler_params=plgpu.CompilerParams(),
                interpret=self.interpret,
                kernel_name="normalize_and_append",
            )(*given, *caches)
            return q_BA[:, None], *(jax.freeze(cache) for cache in caches)

        cos, sin = (x.astype(dtype) for x in rotary_tables(args.position[:, 0], args.frequencies))
        tables = jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1)
        gains, caches = (args.q_gain, args.kv_gain), (args.kv_latent, args.k_rope)
        return unchecked(run)(None, args.cache_position[:, 0], args.a[:, 0], *gains, *tables, *caches)
