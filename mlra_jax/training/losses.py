"""The training loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlra_jax.data.pipeline import IGNORED
from mlra_jax.sharding import TRAIN_RULES, AxisRules

LOGIT_BYTES = 2**29
"""Most bytes of float32 logits that a device holds at a time."""


def logit_chunks(tokens: int, vocab: int, logit_bytes: int = LOGIT_BYTES) -> tuple[int, int]:
    """How many chunks a device cuts its tokens into, and tokens in a chunk, for `vocab` logits a token of its own."""
    most = max(logit_bytes // (4 * vocab), 1)
    n_chunks = -(-tokens // most)
    return n_chunks, -(-tokens // n_chunks)


def chunked_cross_entropy(
    x_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    dtype: jnp.dtype,
    rules: AxisRules = TRAIN_RULES,
    logit_bytes: int = LOGIT_BYTES,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the cross-entropies of the logits x · tableᵀ, in nats, of which only some tokens' exist at a time.

    Each device goes through its own tokens in chunks. When differentiated, a chunk's logits become gradients of `x_BTD`
    and `table_VD` at once and are not computed again in the backward pass: three products, as with stored logits.

    Args:
      x_BTD: the last hidden states, laid out as (batch, length, whole).
      table_VD: output embedding, laid out as (vocab, embed); all V ids are in the softmax.
      targets_BT: int32 in [0, V), or `IGNORED`.
      dtype: of the products and of the gradients between devices; logits, softmax and sums are float32.
      rules: table of logical axis names.
      logit_bytes: most bytes of float32 logits that a device holds.

    Returns:
      The sum (float32, nats) and the count (int32) as scalars.
    """

    parts = (
        "batch",
        "length",
        "vocab",
    )  # gradients of what is the same on several of them are summed by `vary`

    stored = rules.within("embed", "batch")

    def on_device(x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        x_BTD = rules.vary(x_BTD, *parts)
        table_VD = rules.all_gather(rules.vary(table_VD, *parts), stored, axis=1)
        chunks = logit_chunks(targets_BT.size, table_VD.shape[0], logit_bytes)
        nats = _chunked(rules, chunks, x_BTD.reshape(-1, x_BTD.shape[-1]), table_VD, targets_BT.ravel())
        return rules.psum(rules.psum(nats, "batch"), "length")

    rows = ("batch", "length")
    mapped = rules.shard_map(on_device, ((*rows, None), ("vocab", stored), rows), ())
    nats = mapped(x_BTD.astype(dtype), table_VD.astype(dtype), targets_BT)
    return nats, jnp.sum(targets_BT != IGNORED)


def token_scores(
    x_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    dtype: jnp.dtype,
    rules: AxisRules = TRAIN_RULES,
    logit_bytes: int = LOGIT_BYTES,
) -> tuple[jax.Array, jax.Array]:
    """Each target's log-probability, and whether no other id is more probable; arguments as `chunked_cross_entropy`.

    Returns:
      Log-probabilities in nats (float32 [B, T], 0 where the target is `IGNORED`), and whether the target is the most
      probable id (bool [B, T], true where it is `IGNORED`); laid out as the targets. Not differentiable in chunks.
    """

    def on_device(
        x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        def step(x_ND: jax.Array, targets_N: jax.Array) -> tuple[tuple[()], tuple[jax.Array, jax.Array]]:
            ignored_N = targets_N == IGNORED
            largest_N, normalizer_N, target_N, _ = _normalize(rules, _logits(x_ND, table_VD), targets_N)
            return (), (jnp.where(ignored_N, 0, target_N - normalizer_N), ignored_N | (target_N == largest_N))

        chunks = logit_chunks(targets_BT.size, table_VD.shape[0], logit_bytes)
        _, scores = _over_chunks(step, (), chunks, x_BTD.reshape(-1, x_BTD.shape[-1]), targets_BT.ravel())
        return jax.tree.map(lambda s: s.reshape(targets_BT.shape), scores)

    rows = ("batch", "length")
    return rules.shard_map(on_device, ((*rows, None), ("vocab", None), rows), (rows, rows))(
        x_BTD.astype(dtype), rules.constrain(table_VD.astype(dtype), "vocab", None), targets_BT
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(
    rules: AxisRules, chunks: tuple[int, int], x_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array
) -> jax.Array:
    """Sum of the cross-entropies of a device's tokens; x and table must `vary` over batch, length and vocabulary."""
    step = lambda x_ND, targets_N: (_nats(rules, _logits(x_ND, table_VD), targets_N)[0], ())
    return _over_chunks(step, rules.vary(jnp.zeros(()), "batch", "length"), chunks, x_ND, targets_N)[0]


def _forward(
    rules: AxisRules, chunks: tuple[int, int], x_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    def step(x_ND: jax.Array, targets_N: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        logits_NV = _logits(x_ND, table_VD)
        nats, normalizer_N, is_target_NV = _nats(rules, logits_NV, targets_N)
        d_NV = jnp.exp(logits_NV - normalizer_N[:, None]) - is_target_NV
        d_NV = jnp.where((targets_N != IGNORED)[:, None], d_NV, 0).astype(x_ND.dtype)
        d_table = jnp.einsum("NV,ND->VD", d_NV, x_ND, preferred_element_type=jnp.float32)
        return (nats, d_table), jnp.einsum("NV,VD->ND", d_NV, table_VD)

    zeros = (
        rules.vary(jnp.zeros(()), "batch", "length"),
        rules.vary(jnp.zeros(table_VD.shape, jnp.float32), "batch", "length", "vocab"),
    )
    (nats, d_table_VD), d_x_ND = _over_chunks(step, zeros, chunks, x_ND, targets_N)
    return nats, (d_x_ND, d_table_VD.astype(table_VD.dtype))


def _backward(
    rules: AxisRules, chunks: tuple[int, int], gradients: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    d_x_ND, d_table_VD = ((g * d).astype(d.dtype) for d in gradients)
    return d_x_ND, d_table_VD, None


_chunked.defvjp(_forward, _backward)


def _logits(x_ND: jax.Array, table_VD: jax.Array) -> jax.Array:
    return jnp.einsum("ND,VD->NV", x_ND, table_VD, preferred_element_type=jnp.float32)


def _nats(
    rules: AxisRules, logits_NV: jax.Array, targets_N: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sum of the counted cross-entropies, log-sum-exp [N], and which logit is the target's [N, V]; V a device's own."""
    _, normalizer_N, target_N, is_target_NV = _normalize(rules, logits_NV, targets_N)
    nats = jnp.sum(jnp.where(targets_N != IGNORED, normalizer_N - target_N, 0))
    return nats, normalizer_N, is_target_NV


def _normalize(
    rules: AxisRules, logits_NV: jax.Array, targets_N: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Largest logit, log-sum-exp and target's logit [N], and which is the target's [N, V]; V a device's own."""
    v = logits_NV.shape[1]
    is_target_NV = rules.axis_index("vocab") * v + jnp.arange(v) == targets_N[:, None]
    largest_N = rules.pmax(jnp.max(logits_NV, axis=1), "vocab")
    total_N = rules.psum(jnp.sum(jnp.exp(logits_NV - largest_N[:, None]), axis=1), "vocab")
    target_N = rules.psum(jnp.sum(jnp.where(is_target_NV, logits_NV, 0), axis=1), "vocab")
    return largest_N, largest_N + jnp.log(total_N), target_N, is_target_NV


def _over_chunks(
    step: Callable[[jax.Array, jax.Array], tuple[Any, Any]],
    zeros: Any,
    chunks: tuple[int, int],
    x_ND: jax.Array,
    targets_N: jax.Array,
) -> tuple[Any, Any]:
    """Runs `step(x, targets) -> (added up, joined)` on chunks of the tokens: adds the first, joins the second."""
    n_chunks, size = chunks
    if n_chunks == 1:
        return step(x_ND, targets_N)
    n = targets_N.size
    padding = n_chunks * size - n
    x = jnp.pad(x_ND, ((0, padding), (0, 0))).reshape(n_chunks, size, -1)
    targets = jnp.pad(targets_N, (0, padding), constant_values=IGNORED).reshape(n_chunks, size)

    def add(total: Any, chunk: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        added, joined = step(*chunk)
        return jax.tree.map(jnp.add, total, added), joined

    total, joined = jax.lax.scan(add, zeros, (x, targets))
    return total, jax.tree.map(lambda y: y.reshape(n_chunks * size, *y.shape[2:])[:n], joined)
