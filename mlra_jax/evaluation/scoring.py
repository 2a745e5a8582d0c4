"""Log-likelihoods of continuations, in padded batches on a mesh."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mlra_jax.data.pipeline import IGNORED, Placement, one_ahead
from mlra_jax.evaluation.load import Evaluated
from mlra_jax.generation.sampling import NotFiniteError
from mlra_jax.model import from_params
from mlra_jax.training.losses import token_scores

SHORTEST = 64
"""Shortest padded length; a program is compiled for it and each doubling up to T."""

Pair = tuple[Sequence[int], Sequence[int]]
"""Ids of a context, and of its continuation."""


class Score(NamedTuple):
    """A model's score of a continuation."""

    log_likelihood: float
    """Sum of its tokens' log-probabilities, in nats."""
    is_greedy: bool
    """Whether every token is the most probable one in its place."""


def rolling_windows(ids: Sequence[int], prefix: int, seq_len: int) -> Iterator[Pair]:
    """Splits a text into pairs in which each of its tokens is scored once, `seq_len` at a time.

    The first token is predicted from `prefix`. The last pair has fewer tokens to score and so a longer context.
    """
    sequence = [prefix, *ids]
    for start in range(0, len(ids), seq_len):
        end = min(start + seq_len, len(ids))
        yield sequence[max(0, end - seq_len) : start + 1], sequence[start + 1 : end + 1]


class Scorer:
    """Scores continuations with one model; every process of a cluster makes the same calls and gets the same results.

    Args:
      model: on its mesh.
    """

    def __init__(self, model: Evaluated):
        self.model = model
        self._sharding = model.batch_sharding

        def step(
            params: dict[str, Any], inputs_BT: jax.Array, targets_BT: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            transformer = from_params(model.config.model, params)
            nats_BT, best_BT = token_scores(
                transformer.hidden(inputs_BT),
                params["embedding"]["table"],
                targets_BT,
                dtype=transformer.embedding.compute_dtype,
            )
            whole = lambda x: transformer.rules.constrain(x, None)
            return whole(jnp.sum(nats_BT, axis=1)), whole(jnp.all(best_BT, axis=1))

        self._step = jax.jit(step)

    def padded_length(self, n: int) -> int:
        """The length to which a sequence of `n` inputs is padded."""
        doubled = SHORTEST * 2 ** max(0, math.ceil(math.log2(n / SHORTEST)))
        context = self.model.mesh.shape["context"]
        return min(-(-doubled // context) * context, self.model.seq_len)

    def score(self, pairs: Sequence[Pair], *, progress: bool = False) -> list[Score]:
        """Scores each pair's continuation after its context, in the order given.

        Sequences are padded to one of a few lengths and batched by length. Contexts that are too long are truncated on
        the left.

        Args:
          pairs: contexts of at least one token, continuations of at most T.
          progress: whether to show a progress bar, if standard error is a terminal.

        Raises:
          ValueError: a context is empty, a continuation does not fit, or an id is not in the vocabulary.
          NotFiniteError: the log-likelihood of a sequence is NaN or infinite.
        """
        seq_len, vocab_size = self.model.seq_len, self.model.config.model.vocab_size
        by_length: dict[int, list[int]] = {}
        sequences = []
        for i, (context, continuation) in enumerate(pairs):
            if not context or len(continuation) > seq_len:
                raise ValueError(
                    f"Sequence {i} has {len(context)} tokens of context and {len(continuation)} to score; the first "
                    f"must be at least 1, the second at most seq_len={seq_len}."
                )
            sequence = np.array([*context, *continuation][-(seq_len + 1) :])
            if sequence.min() < 0 or sequence.max() >= vocab_size:
                raise ValueError(f"Sequence {i} holds ids that are not from 0 to {vocab_size - 1}.")
            sequences.append(sequence)
            if continuation:
                by_length.setdefault(self.padded_length(len(sequence) - 1), []).append(i)

        def batches() -> Iterator[tuple[list[int], Any]]:
            for length in sorted(by_length, reverse=True):  # what does not fit in memory fails at once
                members = by_length[length]
                rows = self.model.rows(len(members))
                for start in range(0, len(members), rows):
                    chosen = members[start : start + rows]
                    inputs = np.zeros((rows, length), np.int32)
                    targets = np.full((rows, length), IGNORED, np.int32)
                    for row, i in enumerate(chosen):
                        n, n_scored = len(sequences[i]) - 1, len(pairs[i][1])
                        inputs[row, :n] = sequences[i][:-1]
                        targets[row, n - n_scored : n] = sequences[i][n + 1 - n_scored :]
                    place = Placement(self._sharding, (1, rows, length))
                    batch = place(inputs[place.sequences], targets[place.sequences])
                    yield chosen, self._step(self.model.params, batch["inputs"][0], batch["targets"][0])

        scores = [Score(0.0, True)] * len(pairs)
        bar = tqdm(total=len(pairs), unit="seq", dynamic_ncols=True, disable=None if progress else True)
        with bar, jax.set_mesh(self.model.mesh):
            for chosen, results in one_ahead(batches()):
                for i, total, greedy in zip(chosen, *results, strict=False):  # rows past them are padding
                    if not math.isfinite(total):
                        raise NotFiniteError(
                            f"The log-likelihood of sequence {i} is {total}; the weights of this checkpoint are no "
                            "good, take one from before its training diverged."
                        )
                    scores[i] = Score(float(total), bool(greedy))
                bar.update(len(chosen))
        return scores
