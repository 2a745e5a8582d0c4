"""Choosing the next token from logits: greedy, temperature, top-k, top-p, min-p."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp

from mlra_jax.config import NotNegative, Range, Validated
from mlra_jax.errors import ExplainedError
from mlra_jax.ops.all_reduce import Workspace, all_reduce
from mlra_jax.sharding import AxisRules

NO_NUMBER = -2
"""Stands for the token of a row whose logits leave no choice: one is NaN or +infinity, or all are -infinity."""


class NotFiniteError(ExplainedError, ValueError):
    """What a model gives for a text is NaN or infinite; the message says where."""


@dataclasses.dataclass(frozen=True)
class Sampling(Validated):
    """How a token is drawn; the filters apply in the order of the fields, each to what the one before has left.

    Tokens whose logits tie with the last one that a filter keeps are kept too.
    """

    # Float32 logits divided by less would overflow; by more, they would all be equal.
    temperature: Annotated[float, Range(ge=1e-6, le=1e6, also=(0,))] = 0.0
    """Divides the logits; 0 takes the most probable token (greedy)."""
    top_k: NotNegative = 0
    """Keep the k most probable tokens; 0: all."""
    top_p: Annotated[float, Range(gt=0, le=1)] = 1.0
    """Keep the most probable tokens, as few as have this probability together; 1: all."""
    min_p: Annotated[float, Range(ge=0, le=1)] = 0.0
    """Keep the tokens that have at least this share of the most probable one's probability; 0: all."""

    def conflicts(self) -> list[str]:
        if self.temperature or (self.top_k, self.top_p, self.min_p) == (0, 1, 0):
            return []
        return ["top_k, top_p and min_p have no effect on greedy decoding; give a temperature above 0."]


GREEDY = Sampling()


def filtered_logits(logits: jax.Array, sampling: Sampling, n_vocab: int) -> jax.Array:
    """Logits [..., V] of the distribution that is drawn from: divided by the temperature, -inf where excluded.

    The largest is 0; it is -inf or NaN where the logits leave no choice (see `NO_NUMBER`).

    Args:
      logits: of the model, float32 [..., V].
      sampling: with a temperature above 0.
      n_vocab: ids from here on are padding of the vocabulary, and excluded.
    """
    logits = jnp.where(jnp.arange(logits.shape[-1]) < n_vocab, logits, -jnp.inf)
    logits = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    keep_from = lambda logits, lowest: jnp.where(logits >= lowest, logits, -jnp.inf)
    if 0 < sampling.top_k < n_vocab:
        logits = keep_from(logits, jax.lax.top_k(logits, sampling.top_k)[0][..., -1:])
    if sampling.top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        p = jax.nn.softmax(descending, axis=-1)
        needed = jnp.cumsum(p, axis=-1) - p < sampling.top_p  # those before it do not suffice
        # 0 is the largest logit, which is kept even if top_p is 0 in float32.
        logits = keep_from(logits, jnp.where(needed, descending, 0.0).min(axis=-1, keepdims=True))
    if sampling.min_p > 0:
        logits = keep_from(logits, logits.max(axis=-1, keepdims=True) + math.log(sampling.min_p))
    return logits


def greedy(
    rules: AxisRules, logits_BV: jax.Array, n_vocab: int, workspace: Workspace | None = None
) -> jax.Array:
    """The most probable token of each row, int32 [B]; of equals the first. `NO_NUMBER` where there is none.

    Logits may be split over the vocabulary: each device looks at its own, and two numbers a row are exchanged.
    """
    parts, part = rules.size("vocab"), ("vocab",)

    def best(logits_BV: jax.Array, *workspaces: Workspace) -> jax.Array:
        first = rules.axis_index("vocab") * logits_BV.shape[1]
        logits_BV = jnp.where(first + jnp.arange(logits_BV.shape[1]) < n_vocab, logits_BV, -jnp.inf)
        # Ids are exact in float32. argmax takes NaN for the largest number.
        best_B2 = jnp.stack([logits_BV.max(axis=1), first + logits_BV.argmax(axis=1)], axis=1)
        if parts > 1:
            mine = jnp.arange(parts)[:, None] == rules.axis_index("vocab")
            all_BP = jnp.where(mine, best_B2[:, None], 0).reshape(-1, 2 * parts)
            all_BP = all_reduce(all_BP, *workspaces, axis=rules.mesh_axes("vocab")).reshape(-1, parts, 2)
            device_B = all_BP[..., 0].argmax(axis=1)
            best_B2 = jnp.take_along_axis(all_BP, device_B[:, None, None], axis=1)[:, 0]
        return jnp.where(jnp.isfinite(best_B2[:, 0]), best_B2[:, 1].astype(jnp.int32), NO_NUMBER)

    workspaces = () if workspace is None else (workspace,)
    names = (("batch", "vocab"), *(Workspace(part, part) for _ in workspaces))
    return rules.shard_map(best, names, ("batch",), check_vma=False)(logits_BV, *workspaces)


def sample(
    rules: AxisRules,
    logits_BV: jax.Array,
    sampling: Sampling,
    n_vocab: int,
    *,
    seed: jax.Array,
    sample_B: jax.Array,
    position_B: jax.Array,
    workspace: Workspace | None = None,
) -> jax.Array:
    """The next token of each row, int32 [B]; `NO_NUMBER` where its logits leave no choice.

    What is drawn for a row depends on its logits, on `seed` and on the row's `sample` and `position`, and not on the
    other rows, nor on the mesh: each row has a key of its own.

    Args:
      rules: the decoding table. Each device draws for its own rows; the logits are gathered over the vocabulary for it.
      logits_BV: of the model, float32.
      sampling: what to draw from.
      n_vocab: ids from here on are padding of the vocabulary, and never drawn.
      seed: uint32 scalar.
      sample_B: which of its prompt's samples a row is.
      position_B: where in its sequence the drawn token goes.
      workspace: through which devices exchange what is the most probable on each.
    """
    if sampling.temperature == 0:
        return greedy(rules, logits_BV, n_vocab, workspace)

    def draw(logits_V: jax.Array, seed: jax.Array, index: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), position)
        return jax.random.categorical(key, logits_V).astype(jnp.int32)

    def draw_rows(
        logits_BV: jax.Array, seed: jax.Array, sample_B: jax.Array, position_B: jax.Array
    ) -> jax.Array:
        logits_BV = filtered_logits(logits_BV, sampling, n_vocab)
        drawn_B = jax.vmap(draw, (0, None, 0, 0))(logits_BV, seed, sample_B, position_B)
        return jnp.where(logits_BV.max(axis=-1) == 0, drawn_B, NO_NUMBER)

    row = ("batch",)
    return rules.shard_map(draw_rows, ((*row, None), (), row, row), row)(
        logits_BV, seed, sample_B, position_B
    )
