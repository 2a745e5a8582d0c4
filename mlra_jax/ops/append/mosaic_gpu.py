"""Appends tokens to a latent cache on Hopper GPUs: norms, rotation and append in one kernel."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mlra_jax.ops.append.reference import LatentTokens
from mlra_jax.ops.columns import Columns
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
    position_ref: Any,  # int32 [N]: where in the cache
    a_ref: Any,  # [N, A + U*C + R]
    q_gain_ref: Any,  # [A]
    kv_gain_ref: Any,  # [U, C]
    cos_ref: Any,  # [N, R]
    sin_ref: Any,  # [N, R], negative in the first half
    *refs: Any,  # cache, changed: [N, U, S, C] and [N, S, R], or a pool [P, S, columns]; q [N, A]; scratch [2R]
    eps: float,
    q_scale: float,
    kv_scale: float,
    columns: tuple[Columns, Columns] | None,
) -> None:
    """Program (b, 0) has token b's query, (b, 1 + u) its latent u, (b, 1 + U) its rotary key."""
    *cache_refs, q_ref, twice_smem = refs
    b, part = lax.axis_index("row"), lax.axis_index("part")
    (heads, width), rank, rotary = kv_gain_ref.shape, q_ref.shape[1], cos_ref.shape[1]
    at = position_ref[b]
    if columns is None:
        kv_latent_ref, k_rope_ref = cache_refs
        there = (at >= 0) & (at < k_rope_ref.shape[1])
        latent_at = lambda u: kv_latent_ref.at[b, u, at]
        keys_at = lambda: [k_rope_ref.at[b, at]]
    else:
        (pool_ref,), (latents, keys) = cache_refs, columns
        pages, page_size = pool_ref.shape[:2]
        there = (at >= 0) & (at < pages * page_size)
        token_at = lambda start, n: pool_ref.at[
            lax.div(at, page_size), lax.rem(at, page_size), pl.ds(start, n)
        ]
        latent_at = lambda u: token_at(latents.start(u), width)
        keys_at = lambda: [token_at(start, rotary) for start in keys.starts]

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
        _store(latent_at(u), norm(rank + u * width, kv_gain_ref.at[u], kv_scale))

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
        for key_ref in keys_at():
            _store(key_ref, rotated.astype(a_ref.dtype))


class MosaicGPU(HopperKernel[None, None]):
    """For one token of each row and token-major caches, and any tokens for columns of a pool."""

    def check(self, args: LatentTokens) -> None:
        """Whether it takes a call."""
        self.target()
        if args.layout != "token_major":
            raise NotImplementedError(
                f"the kernel that appends latents writes token-major caches, not {args.layout}."
            )
        pooled = isinstance(args.kv_latent, Columns)
        if args.a.shape[1] != 1 and not pooled:
            raise NotImplementedError(
                f"the kernel that appends latents takes one token of each row; got {args.a.shape[1]}."
            )
        require_bfloat16((args.a, args.kv_latent, args.k_rope), "the kernel that appends latents takes")
        if pooled and not args.kv_latent.evenly_spaced:
            raise NotImplementedError(
                "the kernel that appends latents takes columns that start at equal distances; got "
                f"{list(args.kv_latent.starts)}."
            )
        rank, width, rotary = len(args.q_gain), args.kv_latent.shape[3], args.k_rope.shape[-1]
        if rank % (4 * THREADS) or width % THREADS or rotary % 64 or not rotary:
            raise NotImplementedError(
                "the kernel that appends latents takes queries of a multiple of 512 elements, latents of a multiple of "
                f"128 and rotary keys of a multiple of 64; got {rank}, {width} and {rotary}."
            )

    def run(self, shape: None, config: None, args: LatentTokens) -> tuple[jax.Array, Any, Any]:
        """Runs the kernel; the caches are changed in place, if they are donated."""
        (b, t), heads, rank, rotary = (
            args.a.shape[:2],
            len(args.kv_gain),
            len(args.q_gain),
            args.k_rope.shape[-1],
        )
        dtype, columns = args.a.dtype, None
        if isinstance(args.kv_latent, Columns):
            columns = args.kv_latent.of(None), args.k_rope.of(None)

        def run(_: None, *arrays: jax.Array) -> Any:
            caches = tuple(map(jax.new_ref, arrays[6:]))  # no copy of a donated cache
            q_NA = plgpu.kernel(
                functools.partial(
                    _kernel, eps=args.eps, q_scale=args.q_scale, kv_scale=args.kv_scale, columns=columns
                ),
                out_type=jax.ShapeDtypeStruct((b * t, rank), dtype),
                scratch_types=[plgpu.SMEM((2 * rotary,), dtype)],
                grid=(b * t, heads + 2),
                grid_names=("row", "part"),
                num_threads=1,
                thread_name="wg",
                compiler_params=plgpu.CompilerParams(),
                interpret=self.interpret,
                kernel_name="normalize_and_append",
            )(*arrays[:6], *caches)
            return q_NA.reshape(b, t, rank), *(jax.freeze(cache) for cache in caches)

        by_token = lambda x: x.reshape(b * t, *x.shape[2:])
        cos, sin = (x.astype(dtype) for x in rotary_tables(by_token(args.position), args.frequencies))
        tables = jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1)
        given = by_token(args.cache_position), by_token(args.a), args.q_gain, args.kv_gain, *tables
        if columns is None:
            return unchecked(run)(None, *given, args.kv_latent, args.k_rope)
        buffer = args.kv_latent.array
        q_BTA, pool = unchecked(run)(None, *given, args.kv_latent.flat)
        pool = pool.reshape(buffer.shape)
        return q_BTA, args.kv_latent.of(pool), args.k_rope.of(pool)
