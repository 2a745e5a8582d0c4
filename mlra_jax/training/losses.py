"""The training loss; in what runs on each device, T counts all of its tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlra_jax.data.pipeline import IGNORED
from mlra_jax.sharding import TRAIN_RULES, AxisRules

LOGIT_BYTES = 2**29
"""Most bytes of float32 logits that exist on a device at a time."""


def logit_chunks(tokens: int, vocab: int, logit_bytes: int = LOGIT_BYTES) -> tuple[int, int]:
    """The number of chunks of a device's tokens, and tokens per chunk, with `vocab` logits per token."""
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

    Each device processes its tokens in chunks. When differentiated, a chunk's logits are turned into gradients of
    `x_BTD` and `table_VD` right away and not recomputed in the backward pass: three products, as with stored logits.

    Args:
      x_BTD: the last hidden states, laid out as (batch, length, whole).
      table_VD: output embedding, laid out as (vocab, embed); all V ids are in the softmax.
      targets_BT: int32 in [0, V), or `IGNORED`.
      dtype: type of the products and of the gradients exchanged; logits, softmax and sums are float32.
      rules: the table of logical axis names.
      logit_bytes: most bytes of float32 logits that exist on a device at a time.

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
    logit_bytes: int = LOGIT_BYTES,
) -> tuple[jax.Array, jax.Array]:
    """Each target's log-probability, and whether it is the most probable id; arguments as in `chunked_cross_entropy`.

    Returns:
      Log-probabilities in nats (float32 [B, T], 0 where the target is `IGNORED`), and whether the target is the most
      probable id (bool [B, T], true where it is `IGNORED`); laid out like the targets. Not meant to be differentiated.
    """
    rules = TRAIN_RULES

    def on_device(
        x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        def step(x_TD: jax.Array, targets_T: jax.Array) -> tuple[tuple[()], tuple[jax.Array, jax.Array]]:
            ignored_T = targets_T == IGNORED
            largest_T, normalizer_T, target_T, _ = _normalize(rules, _logits(x_TD, table_VD), targets_T)
            return (), (jnp.where(ignored_T, 0, target_T - normalizer_T), ignored_T | (target_T == largest_T))

        chunks = logit_chunks(targets_BT.size, table_VD.shape[0], logit_bytes)
        _, scores = _over_chunks(step, (), chunks, x_BTD.reshape(-1, x_BTD.shape[-1]), targets_BT.ravel())
        return jax.tree.map(lambda s: s.reshape(targets_BT.shape), scores)

    rows = ("batch", "length")
    return rules.shard_map(on_device, ((*rows, None), ("vocab", None), rows), (rows, rows))(
        x_BTD.astype(dtype), rules.constrain(table_VD.astype(dtype), "vocab", None), targets_BT
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(
    rules: AxisRules, chunks: tuple[int, int], x_TD: jax.Array, table_VD: jax.Array, targets_T: jax.Array
) -> jax.Array:
    """Sum of the cross-entropies of a device's tokens; x and table must `vary` over batch, length and vocabulary."""
    step = lambda x_TD, targets_T: (_nats(rules, _logits(x_TD, table_VD), targets_T)[0], ())
    return _over_chunks(step, rules.vary(jnp.zeros(()), "batch", "length"), chunks, x_TD, targets_T)[0]


def _forward(
    rules: AxisRules, chunks: tuple[int, int], x_TD: jax.Array, table_VD: jax.Array, targets_T: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    def step(x_TD: jax.Array, targets_T: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        logits_TV = _logits(x_TD, table_VD)
        nats, normalizer_T, is_target_TV = _nats(rules, logits_TV, targets_T)
        d_TV = jnp.exp(logits_TV - normalizer_T[:, None]) - is_target_TV
        d_TV = jnp.where((targets_T != IGNORED)[:, None], d_TV, 0).astype(x_TD.dtype)
        d_table = jnp.einsum("TV,TD->VD", d_TV, x_TD, preferred_element_type=jnp.float32)
        return (nats, d_table), jnp.einsum("TV,VD->TD", d_TV, table_VD)

    zeros = (
        rules.vary(jnp.zeros(()), "batch", "length"),
        rules.vary(jnp.zeros(table_VD.shape, jnp.float32), "batch", "length", "vocab"),
    )
    (nats, d_table_VD), d_x_TD = _over_chunks(step, zeros, chunks, x_TD, targets_T)
    return nats, (d_x_TD, d_table_VD.astype(table_VD.dtype))


def _backward(
    rules: AxisRules, chunks: tuple[int, int], gradients: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    d_x_TD, d_table_VD = ((g * d).astype(d.dtype) for d in gradients)
    return d_x_TD, d_table_VD, None


_chunked.defvjp(_forward, _backward)


def _logits(x_TD: jax.Array, table_VD: jax.Array) -> jax.Array:
    return jnp.einsum("TD,VD->TV", x_TD, table_VD, preferred_element_type=jnp.float32)


def _nats(
    rules: AxisRules, logits_TV: jax.Array, targets_T: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sum of the cross-entropies, log-sum-exp [T], and which logits are the targets' [T, V of this device]."""
    _, normalizer_T, target_T, is_target_TV = _normalize(rules, logits_TV, targets_T)
    nats = jnp.sum(jnp.where(targets_T != IGNORED, normalizer_T - target_T, 0))
    return nats, normalizer_T, is_target_TV


def _normalize(
    rules: AxisRules, logits_TV: jax.Array, targets_T: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Largest logit, log-sum-exp and target's logit [T], and which is the target's [T, V]; V is the device's part."""
    v = logits_TV.shape[1]
    is_target_TV = rules.axis_index("vocab") * v + jnp.arange(v) == targets_T[:, None]
    largest_T = rules.pmax(jnp.max(logits_TV, axis=1), "vocab")
    total_T = rules.psum(jnp.sum(jnp.exp(logits_TV - largest_T[:, None]), axis=1), "vocab")
    target_T = rules.psum(jnp.sum(jnp.where(is_target_TV, logits_TV, 0), axis=1), "vocab")
    return largest_T, largest_T + jnp.log(total_T), target_T, is_target_TV


def _over_chunks(
    step: Callable[[jax.Array, jax.Array], tuple[Any, Any]],
    zeros: Any,
    chunks: tuple[int, int],
    x_TD: jax.Array,
    targets_T: jax.Array,
) -> tuple[Any, Any]:
    """Runs `step(x, targets) -> (a, b)` on chunks of the tokens; returns the sum of a and the concatenation of b."""
    n_chunks, size = chunks
    if n_chunks == 1:
        return step(x_TD, targets_T)
    n = targets_T.size
    padding = n_chunks * size - n
    x = jnp.pad(x_TD, ((0, padding), (0, 0))).reshape(n_chunks, size, -1)
    targets = jnp.pad(targets_T, (0, padding), constant_values=IGNORED).reshape(n_chunks, size)

    def add(total: Any, chunk: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        added, joined = step(*chunk)
        return jax.tree.map(jnp.add, total, added), joined

    total, joined = jax.lax.scan(add, zeros, (x, targets))
    return total, jax.tree.map(lambda y: y.reshape(n_chunks * size, *y.shape[2:])[:n], joined)
