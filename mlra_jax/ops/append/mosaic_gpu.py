"""One new token of each row on its way into a latent cache on Hopper GPUs: norms, rotation and append in one kernel."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mlra_jax.ops.hopper import THREADS, check_device, plgpu
from mlra_jax.ops.rotary import Frequencies, rotary_tables
from mlra_jax.ops.shard_map_utils import unchecked


def _store(ref: Any, value: jax.Array) -> None:
    """Writes `value`, of which a thread may have but two bytes: too few for what JAX 0.12 takes without being told."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def _kernel(
    slot_ref: Any,  # int32 [B]
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
    heads, slots, width = kv_latent_ref.shape[1:]
    rank, rotary = q_ref.shape[1], k_rope_ref.shape[2]
    slot = slot_ref[b]
    there = (slot >= 0) & (slot < slots)

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
        _store(kv_latent_ref.at[b, u, slot], norm(rank + u * width, kv_gain_ref.at[u], kv_scale))

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
        _store(k_rope_ref.at[b, slot], rotated.astype(a_ref.dtype))


def normalize_and_append(
    a_BTE: jax.Array,
    q_gain_A: jax.Array,
    kv_gain_UC: jax.Array,
    position_BT: jax.Array,
    slot_BT: jax.Array,
    kv_latent: jax.Array,
    k_rope: jax.Array,
    *,
    eps: float,
    q_scale: float,
    kv_scale: float,
    frequencies: Frequencies,
    layout: str,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `mlra_jax.ops.append.normalize_and_append`; for one token of each row, and token-major caches.

    `interpret`: `plgpu.InterpretGPUParams` run the kernel on the CPU.

    Raises:
      NotImplementedError: this is no Hopper GPU, or the arguments are not what the kernel takes.
    """
    check_device(interpret)
    if layout != "token_major":
        raise NotImplementedError(f"the kernel that appends latents writes token-major caches, not {layout}.")
    b, heads, _, width = kv_latent.shape
    rank, rotary = q_gain_A.shape[0], k_rope.shape[2]
    if a_BTE.shape[1] != 1:
        raise NotImplementedError(
            f"the kernel that appends latents takes one token of each row; got {a_BTE.shape[1]}."
        )
    if {x.dtype for x in (a_BTE, kv_latent, k_rope)} != {jnp.dtype(jnp.bfloat16)}:
        raise NotImplementedError("the kernel that appends latents takes bfloat16.")
    if rank % (4 * THREADS) or width % THREADS or rotary % 64 or not rotary:
        raise NotImplementedError(
            "the kernel that appends latents takes a query of a multiple of 512 elements, latents of a multiple of 128 "
            f"and rotary keys of a multiple of 64; got {rank}, {width} and {rotary}."
        )

    def run(_: None, *args: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        *given, kv_latent, k_rope = args
        caches = jax.new_ref(kv_latent), jax.new_ref(k_rope)  # changed in place: no copy of a donated cache
        q_BA = plgpu.kernel(
            functools.partial(_kernel, eps=eps, q_scale=q_scale, kv_scale=kv_scale),
            out_type=jax.ShapeDtypeStruct((b, rank), a_BTE.dtype),
            scratch_types=[plgpu.SMEM((2 * rotary,), a_BTE.dtype)],
            grid=(b, heads + 2),
            grid_names=("row", "part"),
            num_threads=1,
            thread_name="wg",
            compiler_params=plgpu.CompilerParams(),
            interpret=interpret,
            kernel_name="normalize_and_append",
        )(*given, *caches)
        return q_BA[:, None], *(jax.freeze(cache) for cache in caches)

    cos, sin = (x.astype(a_BTE.dtype) for x in rotary_tables(position_BT[:, 0], frequencies))
    tables = jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1)
    return unchecked(run)(None, slot_BT[:, 0], a_BTE[:, 0], q_gain_A, kv_gain_UC, *tables, kv_latent, k_rope)
