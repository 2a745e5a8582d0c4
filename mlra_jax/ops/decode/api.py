"""The public ops: decode attention over latent caches (MLA, GLA, MLRA, GTA), grouped ones (MHA, GQA, MQA, MFA), and
factored ones (TPA)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mlra_jax.ops import device
from mlra_jax.ops.back_end import BackEnd, Function, Lazy
from mlra_jax.ops.columns import Columns
from mlra_jax.ops.decode import reference, xla
from mlra_jax.ops.decode.reference import Arguments, FactoredArguments
from mlra_jax.ops.dispatch import Implementation, dispatch

Layout = Literal["token_major", "feature_major"]

IMPLEMENTATIONS: Mapping[str, BackEnd] = {
    "mosaic_gpu": Lazy("mlra_jax.ops.decode.mosaic_gpu", "MosaicGPU", device.require_hopper),
    "triton": Lazy("mlra_jax.ops.decode.triton", "Triton", device.require_ampere),
    "mosaic_tpu": Lazy("mlra_jax.ops.decode.mosaic_tpu", "MosaicTPU", device.require_tpu),
    "xla": Function(xla.decode_attention),
    "reference": Function(reference.decode_attention),
}
"""Back ends of the latent and the grouped op, in order of preference; all are called with `reference.Arguments`."""

FACTORED_IMPLEMENTATIONS: Mapping[str, BackEnd] = {
    "xla": Function(xla.factored_decode_attention),
    "reference": Function(reference.factored_decode_attention),
}
"""Back ends of the factored op, in order of preference; all are called with `reference.FactoredArguments`."""


def latent_decode_attention(
    q_nope: Float[Array, "B T L M C"],
    q_rope: Float[Array, "B T G M E"],
    kv_latent: Float[Array, "P L _ _"] | Columns,
    k_rope: Float[Array, "P _ _"] | Columns,
    kv_len: Int[Array, "B T"],
    *,
    scale: float,
    rotary: tuple[Float[Array, "B T _"], Float[Array, "B T _"]] | None = None,
    page_table: Int[Array, "B N"] | None = None,
    layout: Layout = "token_major",
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T L M C"], Float[Array, "B T L M"]]:
    """Absorbed attention of each latent head over its cache, which serves as key and as value.

    Scores are `scale * (q_nope . kv_latent + q_rope . k_rope)`; the output is the weighted sum of the latents
    (docs/architecture.md; paper, section 3, with W_UK moved to the query).

    A cache is P pages of S tokens. Without a `page_table` it is contiguous: page b holds row b's tokens (P = B). Where
    latents and rotary keys lie side by side in one buffer, such as a serving engine's pool, `Columns` of it stand for
    either array.

    Args:
      q_nope: absorbed content queries, M rows for each of L local latent heads.
      q_rope: rotary queries of the same rows. G is L, or a divisor of L if heads share queries: head l reads entry
        l mod G. E is R, which may be 0; with `rotary` E may be larger, and the last R features are read.
      kv_latent: cached latents [P, L, S, C]. Positions that no query of the row sees may hold anything, even NaN.
      k_rope: cached rotary keys [P, S, R], shared by all latent heads; of several heads of `Columns` the first is read.
      kv_len: how many of the leading tokens each query sees, which expresses causal masks and ragged batches. Any
        integers in any order: with 0 or less a query sees nothing, with more than its row has room for (S tokens, or
        N * S with pages) it sees everything.
      scale: multiplies the scores: 1/sqrt(H + R) of the expanded form, whatever C is.
      rotary: cosines and sines [B, T, R/2] with which to rotate `q_rope` (`mlra_jax.ops.rotary.apply_rope`); None:
        it is rotated already.
      page_table: token i of row b is at position i % S of page `page_table[b, i // S]`; entries past the last token
        that a query of the row sees may hold anything.
      layout: `token_major`, as above, or `feature_major`: kv_latent [P, L, C, S] and k_rope [P, R, S].
      implementation: a name in `IMPLEMENTATIONS`, or a back end, or several to be tried in order; None: the first that
        takes the call (`mlra_jax.explain` says which, and why).

    Returns:
      Output in the type of `q_nope`, zeros where nothing is seen, and the float32 log-sum-exp, -inf there.

    Raises:
      ValueError: shapes that do not belong together.
      NotImplementedError: the named implementation does not take these arguments.
    """
    b, t, heads, m, c = q_nope.shape
    r, wide = q_rope.shape[-1], q_rope.shape[-1]
    if rotary is not None:
        r = 2 * rotary[0].shape[-1]
        wide = max(r, wide)
        for name, x in zip(("cos", "sin"), rotary, strict=True):
            _check(x, f"{name} of rotary", (b, t, r // 2))
    shared = q_rope.shape[2]
    _check(q_rope, "q_rope", (b, t, shared if shared and heads % shared == 0 else heads, m, wide))
    if isinstance(k_rope, Columns):
        k_rope = dataclasses.replace(k_rope, starts=k_rope.starts[:1])
    _check_cache(
        kv_len, page_table, layout, (b, t), kv_latent=(kv_latent, (heads,), c), k_rope=(k_rope, (), r)
    )
    parts = [(q_nope, kv_latent)]
    if r:
        parts.append((q_rope, k_rope if isinstance(k_rope, Columns) else k_rope[:, None]))
    args = Arguments(parts, None, _int32(kv_len), scale, rotary if r else None, _int32(page_table), layout)
    return dispatch("latent_decode_attention", IMPLEMENTATIONS, implementation, args)


def grouped_decode_attention(
    q: Float[Array, "B T K M H"],
    k: Float[Array, "P K _ _"],
    v: Float[Array, "P K _ _"],
    kv_len: Int[Array, "B T"],
    *,
    scale: float,
    page_table: Int[Array, "B N"] | None = None,
    layout: Layout = "token_major",
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T K M V"], Float[Array, "B T K M"]]:
    """Attention of M query heads for each of K local KV heads over a cache of keys and values.

    Args:
      q: queries.
      k: cached keys [P, K, S, H]. Positions that no query of the row sees may hold anything, even NaN.
      v: cached values [P, K, S, V].
      kv_len: how many of the leading tokens each query sees; see `latent_decode_attention`.
      scale: multiplies the scores.
      page_table: see `latent_decode_attention`.
      layout: `token_major`, as above, or `feature_major`: k [P, K, H, S] and v [P, K, V, S].
      implementation: see `latent_decode_attention`.

    Returns:
      Output in the type of `q`, zeros where nothing is seen, and the float32 log-sum-exp, -inf there.

    Raises:
      ValueError: shapes that do not belong together.
      NotImplementedError: the named implementation does not take these arguments.
    """
    b, t, heads, _, h = q.shape
    width = v.shape[-2 if layout == "feature_major" else -1]
    _check_cache(kv_len, page_table, layout, (b, t), k=(k, (heads,), h), v=(v, (heads,), width))
    args = Arguments([(q, k)], v, _int32(kv_len), scale, page_table=_int32(page_table), layout=layout)
    return dispatch("grouped_decode_attention", IMPLEMENTATIONS, implementation, args)


def factored_decode_attention(
    q: Float[Array, "B T K M H"],
    a_k: Float[Array, "P K _ _"],
    b_k: Float[Array, "P _ _"],
    a_v: Float[Array, "P K _ _"],
    b_v: Float[Array, "P _ _"],
    kv_len: Int[Array, "B T"],
    *,
    scale: float,
    page_table: Int[Array, "B N"] | None = None,
    layout: Layout = "token_major",
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T K M V"], Float[Array, "B T K M"]]:
    """Attention of M query heads for each of K local KV heads over a cache of factors of keys and values.

    Head k's key of a token is the sum over i of `a_k[k, i] * b_k[i]`, r products of a number and a vector of width H
    that all heads share; its value likewise, of `a_v` and `b_v` (Zhang et al., Tensor Product Attention Is All You
    Need, 2025). Keys and values are never built: scores are `scale * sum of a_k[k, i] * (q . b_k[i])`.

    Args:
      q: queries.
      a_k: cached factors of the keys by head [P, K, S, r]. Positions that no query of the row sees may hold anything.
      b_k: cached factors of the keys that all heads share, [P, S, r * H], product by product.
      a_v: the same of the values [P, K, S, r'].
      b_v: [P, S, r' * V].
      kv_len: how many of the leading tokens each query sees; see `latent_decode_attention`.
      scale: multiplies the scores.
      page_table: see `latent_decode_attention`.
      layout: `token_major`, as above, or `feature_major`, with the last two axes of all four swapped.
      implementation: see `latent_decode_attention`; of `FACTORED_IMPLEMENTATIONS`.

    Returns:
      Output in the type of `q`, zeros where nothing is seen, and the float32 log-sum-exp, -inf there.

    Raises:
      ValueError: shapes that do not belong together.
      NotImplementedError: the named implementation does not take these arguments.
    """
    b, t, heads, _, h = q.shape
    axis = -2 if layout == "feature_major" else -1
    r, r_v, v_width = a_k.shape[axis], a_v.shape[axis], b_v.shape[axis]
    if v_width % r_v:
        raise ValueError(
            f"b_v must be {r_v} factors wide, as many as a_v has; {v_width} is no multiple of that."
        )
    _check_cache(
        kv_len,
        page_table,
        layout,
        (b, t),
        a_k=(a_k, (heads,), r),
        b_k=(b_k, (), r * h),
        a_v=(a_v, (heads,), r_v),
        b_v=(b_v, (), v_width),
    )
    cached = (a_k, b_k[:, None], a_v, b_v[:, None])
    args = FactoredArguments(q, cached, _int32(kv_len), scale, _int32(page_table), layout)
    return dispatch("factored_decode_attention", FACTORED_IMPLEMENTATIONS, implementation, args)


def _int32(x: Any) -> Any:
    """The type that kernels read, and in which lengths can be clipped: 300 does not fit int8."""
    return None if x is None else jnp.asarray(x, jnp.int32)


def _check(x: Any, name: str, expected: tuple[int, ...]) -> None:
    if x.shape != expected:
        raise ValueError(
            f"{name} must have the shape {expected} that the other arguments imply; got {x.shape}."
        )


def _check_cache(
    kv_len: jax.Array,
    page_table: jax.Array | None,
    layout: str,
    rows: tuple[int, int],
    **arrays: tuple[Any, tuple[int, ...], int],
) -> None:
    if layout not in ("token_major", "feature_major"):
        raise ValueError(f"layout must be token_major or feature_major; got {layout!r}.")
    _check(kv_len, "kv_len", rows)
    if page_table is not None:
        _check(page_table, "page_table", (rows[0], *page_table.shape[1:2]))
    first = next(iter(arrays.values()))[0].shape
    pages = rows[0] if page_table is None else first[0]
    feature_major = layout == "feature_major"
    page_size = first[-1] if feature_major else first[-2]
    for name, (x, heads, width) in arrays.items():
        if isinstance(x, Columns):
            x.check(name, layout)
            heads = heads or (1,)
        _check(x, name, (pages, *heads, *((width, page_size) if feature_major else (page_size, width))))
