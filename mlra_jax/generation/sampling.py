"""Choosing the next token from logits: penalties, greedy, temperature, top-k, top-p, min-p, each row in its own way."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from mlra_jax.config import ConfigError, NotNegative, Range, Validated
from mlra_jax.errors import ExplainedError
from mlra_jax.ops.all_reduce import Workspace, all_reduce
from mlra_jax.sharding import AxisRules

NO_NUMBER = -2
"""Stands for the token of a row whose logits leave no choice: one is NaN or +infinity, or all are -infinity."""


class NotFiniteError(ExplainedError, ValueError):
    """The logits that a model computes for a text are NaN or infinite; the message says where."""


@dataclasses.dataclass(frozen=True)
class Sampling(Validated):
    """How a token is sampled; the filters apply in the order of the fields, each to what the one before has left.

    Penalties change the logits before anything else, for greedy decoding too. Tokens whose logits tie with the last one
    that a filter keeps are kept too.

    To sample in another way, derive a frozen dataclass, add numeric fields, and override `filtered_logits`. Prompts
    that are generated together can use different classes. A temperature of 0 always takes the most probable token.
    """

    # Float32 logits divided by less would overflow; by more, they would all be equal.
    temperature: Annotated[float, Range(ge=1e-6, le=1e6, also=(0,))] = 0.0
    """Divides the logits; 0 takes the most probable token (greedy)."""
    top_k: NotNegative = 0
    """Keep the k most probable tokens; 0: all."""
    top_p: Annotated[float, Range(gt=0, le=1)] = 1.0
    """Keep the fewest most probable tokens whose probabilities sum to at least this; 1: all."""
    min_p: Annotated[float, Range(ge=0, le=1)] = 0.0
    """Keep tokens with at least this fraction of the most probable token's probability; 0: all."""

    repetition_penalty: Annotated[float, Range(ge=0.01, le=100)] = 1.0
    """Divides positive logits and multiplies negative ones of tokens in the prompt or the completion; 1: none."""
    presence_penalty: Annotated[float, Range(ge=-2, le=2)] = 0.0
    """Subtracted from the logits of tokens that are in the completion."""
    frequency_penalty: Annotated[float, Range(ge=-2, le=2)] = 0.0
    """Subtracted from the logits of tokens in the completion, once for each time that they are in it."""

    def conflicts(self) -> list[str]:
        if self.temperature or (self.top_k, self.top_p, self.min_p) == (0, 1, 0):
            return []
        return ["top_k, top_p and min_p have no effect on greedy decoding; give a temperature above 0."]

    def penalized_logits(self, logits_V: jax.Array, prompt_V: jax.Array, count_V: jax.Array) -> jax.Array:
        """The logits [V] of one row with the penalties; called inside a compiled function if any row has some.

        Args:
          logits_V: the model's logits, float32.
          prompt_V: whether each token is in the prompt.
          count_V: how often each token is in the completion so far.
        """
        r, made_V = self.repetition_penalty, count_V > 0
        repeated_V = jnp.where(logits_V > 0, logits_V / r, logits_V * r)
        logits_V = jnp.where(prompt_V | made_V, repeated_V, logits_V)
        return logits_V - self.presence_penalty * made_V - self.frequency_penalty * count_V

    def filtered_logits(self, logits_V: jax.Array) -> jax.Array:
        """The logits [V] from which one row's token is sampled: divided by the temperature, -inf for excluded tokens.

        Called inside a compiled function, where fields are scalar arrays. A field that no row of the batch sets is
        still the default number, so that its filter can be omitted from the program.

        Args:
          logits_V: the model's logits, float32, -inf for ids that the tokenizer does not have.

        Returns:
          Float32 [V]; here, the largest is 0.
        """

        def off(value: Any, neutral: float) -> bool:
            return not isinstance(value, jax.Array) and value == neutral

        temperature: Any = jnp.where(self.temperature == 0, 1, self.temperature)
        logits_V = (logits_V - logits_V.max()) / temperature
        lowest: Any = -jnp.inf
        if not (off(self.top_k, 0) and off(self.top_p, 1)):
            descending_V = -jnp.sort(-logits_V)
        if not off(self.top_k, 0):
            kth = descending_V[jnp.clip(self.top_k, 1, len(logits_V)) - 1]
            lowest = jnp.where(self.top_k == 0, -jnp.inf, kth)
        if not off(self.top_p, 1):
            p_V = jax.nn.softmax(jnp.where(descending_V >= lowest, descending_V, -jnp.inf))
            needed_V = jnp.cumsum(p_V) - p_V < self.top_p  # those before it do not suffice
            # 0 is the largest logit, which is kept even if top_p is 0 in float32.
            least = jnp.where(needed_V, descending_V, 0.0).min()
            lowest = jnp.where(self.top_p == 1, lowest, jnp.maximum(lowest, least))
        if not off(self.min_p, 0):
            lowest = jnp.maximum(lowest, jnp.log(self.min_p))
        return jnp.where(logits_V >= lowest, logits_V, -jnp.inf)


GREEDY = Sampling()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """The tokens that penalties look at."""

    prompt_BV: Any
    """Whether each token is in the row's prompt."""
    count_BV: Any
    """How often each token is in the row's completion: int32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSampling:
    """How the rows of a batch are sampled, as arrays, so that other values run the same compiled program."""

    classes: tuple[type[Sampling], ...] = dataclasses.field(metadata={"static": True})
    """The classes that occur in the batch."""
    fields: tuple[dict[str, Any], ...]
    """For each class, the fields in which any row differs from the default: numbers [B]."""
    class_B: Any
    """Each row's class, an index into `classes`: int32."""
    seed_B: Any
    """Each row's seed: uint32."""
    sample_B: Any
    """Each row's number among the samples of its prompt: int32."""

    @classmethod
    def of(
        cls,
        samplings: Sequence[Sampling],
        seeds: Sequence[int],
        samples: Sequence[int],
        known: Sequence[Sampling] = (),
    ) -> Self:
        """NumPy arrays that hold the sampling, the seed and the sample number of each row.

        Args:
          samplings: of each row.
          seeds: of each row.
          samples: of each row.
          known: others for which the same compiled program has to serve.

        Raises:
          ConfigError: a subclass of `Sampling` has a field that is not a number.
        """
        every = [*known, *samplings]
        classes = tuple(dict.fromkeys(map(type, every)))

        def used(kind: type[Sampling]) -> dict[str, Any]:
            own = [sampling for sampling in every if type(sampling) is kind]
            fields = {}
            for field in dataclasses.fields(kind):
                if all(getattr(sampling, field.name) == field.default for sampling in own):
                    continue
                # Rows of other classes get the values of any row of this one, which they do not use.
                rows = [s if type(s) is kind else own[0] for s in samplings]
                values = np.array([getattr(s, field.name) for s in rows])
                if values.dtype.kind not in "biuf" or values.ndim > 1:
                    raise ConfigError(
                        f"{kind.__name__}.{field.name} must be a number to be compiled for each row."
                    )
                if isinstance(field.default, float):  # whose values may be whole numbers
                    values = values.astype(np.float32)
                elif values.dtype.kind in "iu":
                    values = np.clip(values, -(2**31), 2**31 - 1).astype(np.int32)
                fields[field.name] = values.astype(np.float32) if values.dtype.kind == "f" else values
            return fields

        class_B = np.array([classes.index(type(sampling)) for sampling in samplings], np.int32)
        seed_B = np.array([seed % 2**32 for seed in seeds], np.uint32)
        return cls(classes, tuple(map(used, classes)), class_B, seed_B, np.array(samples, np.int32))

    def _all(self, **neutral: float) -> bool:
        """Whether these fields have these values in every row, whatever the values of the arrays."""
        return all(
            getattr(kind, name) == value and name not in fields
            for kind, fields in zip(self.classes, self.fields, strict=True)
            for name, value in neutral.items()
        )

    @property
    def has_penalties(self) -> bool:
        """Whether any row may have penalties."""
        return not self._all(repetition_penalty=1, presence_penalty=0, frequency_penalty=0)

    @property
    def is_greedy(self) -> bool:
        """Whether every row takes its most probable token, without penalties, whatever the values of the arrays."""
        return self._all(temperature=0) and not self.has_penalties


def greedy(
    rules: AxisRules, logits_BV: jax.Array, n_vocab: int, workspace: Workspace | None = None
) -> jax.Array:
    """The most probable token of each row, int32 [B], the first of equals; `NO_NUMBER` where there is none.

    Logits may be split over the vocabulary: devices exchange only the best of their own, two numbers per row.
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
    sampling: RowSampling,
    n_vocab: int,
    *,
    position_B: jax.Array,
    seen: Seen | None = None,
    workspace: Workspace | None = None,
) -> jax.Array:
    """The next token of each row, int32 [B]; `NO_NUMBER` where its logits leave no choice.

    A row's token depends on its logits, sampling, seed, sample number and position, and not on the other rows, nor on
    the mesh: each row has a key of its own.

    Args:
      rules: the decoding table. Each device samples for its own rows; the logits are gathered over the vocabulary for
        it, unless all rows are greedy.
      logits_BV: the model's logits, float32.
      sampling: how each row is sampled.
      n_vocab: number of ids of the tokenizer; later ones are padding and never sampled.
      position_B: the sampled token's position in its sequence.
      seen: the tokens that penalties look at; None: no row has penalties.
      workspace: through which devices exchange their most probable tokens (`Workspace`).
    """
    if sampling.is_greedy:
        return greedy(rules, logits_BV, n_vocab, workspace)

    def one(
        kind: type[Sampling],
        fields: dict[str, Any],
        logits_V: jax.Array,
        seed: Any,
        index: Any,
        position: Any,
        seen: Seen | None,
    ) -> jax.Array:
        method = kind(**fields)
        if seen is not None:
            logits_V = method.penalized_logits(logits_V, seen.prompt_BV, seen.count_BV)
        filtered_V = method.filtered_logits(logits_V)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), position)
        sampled = jax.random.categorical(key, filtered_V)
        token = jnp.where(method.temperature == 0, logits_V.argmax(), sampled).astype(jnp.int32)
        # The maximum is NaN if any logit is.
        finite = jnp.isfinite(logits_V.max()) & jnp.isfinite(filtered_V.max())
        return jnp.where(finite, token, NO_NUMBER)

    def rows(
        logits_BV: jax.Array, sampling: RowSampling, position_B: jax.Array, seen: Seen | None
    ) -> jax.Array:
        logits_BV = jnp.where(jnp.arange(logits_BV.shape[1]) < n_vocab, logits_BV, -jnp.inf)
        token_B = jnp.zeros_like(sampling.class_B)
        for i, (kind, fields) in enumerate(zip(sampling.classes, sampling.fields, strict=True)):
            args = fields, logits_BV, sampling.seed_B, sampling.sample_B, position_B, seen
            kind_B = jax.vmap(functools.partial(one, kind))(*args)
            token_B = jnp.where(sampling.class_B == i, kind_B, token_B)
        return token_B

    by_row = jax.tree.map(lambda _: rules.spec("batch"), (sampling, seen))
    names = (("batch", None), by_row[0], ("batch",), by_row[1])
    return rules.shard_map(rows, names, ("batch",))(logits_BV, sampling, position_B, seen)


def log_probabilities(
    rules: AxisRules, logits_BV: jax.Array, token_B: jax.Array, n_vocab: int, top: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Natural logarithms of probabilities under the model itself: temperature 1, without penalties and filters.

    Args:
      rules: the decoding table.
      logits_BV: the model's logits, float32.
      token_B: a token of each row.
      n_vocab: number of ids of the tokenizer.
      top: how many of the most probable tokens to list.

    Returns:
      The token's, [B]; the most probable tokens, [B, top]; theirs, [B, top].
    """

    def rows(logits_BV: jax.Array, token_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        log_p_BV = jax.nn.log_softmax(
            jnp.where(jnp.arange(logits_BV.shape[1]) < n_vocab, logits_BV, -jnp.inf)
        )
        of_token_B1 = jnp.take_along_axis(log_p_BV, jnp.maximum(token_B, 0)[:, None], axis=1)
        highest_BK, id_BK = jax.lax.top_k(log_p_BV, top)
        return of_token_B1[:, 0], id_BK, highest_BK

    found = rules.shard_map(
        rows, (("batch", None), ("batch",)), (("batch",), ("batch", None), ("batch", None))
    )
    return jax.tree.map(lambda x: rules.constrain(x, *[None] * x.ndim), found(logits_BV, token_B))
