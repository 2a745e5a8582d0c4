"""Scores are the definition's, however sequences are batched, padded and split over devices."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlra_jax.evaluation.scoring import Scorer, rolling_windows
from mlra_jax.generation.sampling import NotFiniteError

MESHES = {"one": (1, 1, 1, 1), "data": (8, 1, 1, 1), "all": (1, 2, 2, 2)}


def random_pairs(n=70):
    rng = np.random.default_rng(3)
    sizes = zip(rng.integers(1, 150, n), rng.integers(0, 20, n), strict=True)
    return [(rng.integers(0, 257, c).tolist(), rng.integers(0, 257, k).tolist()) for c, k in sizes]


PAIRS = [*random_pairs(), ([5], list(range(96))), (list(range(200)), [7])]


@pytest.fixture(scope="module")
def expected(log_probabilities):
    """Log-likelihood and greediness of each pair by the definition, one sequence at a time."""
    out = []
    for context, continuation in PAIRS:
        ids = np.array([*context, *continuation][-97:])
        n = len(continuation)
        rows = log_probabilities(ids[:-1])[len(ids) - 1 - n :] if n else np.zeros((0, 264))
        total = sum(row[i] for row, i in zip(rows, continuation, strict=True))
        out.append((total, all(row.argmax() == i for row, i in zip(rows, continuation, strict=True))))
    return out


@pytest.mark.parametrize(("mesh", "batch_size"), [("one", 1), ("one", 64), ("data", 64), ("all", 1)])
def test_scores_are_those_of_single_sequences_at_any_batch_size_on_any_mesh(
    mesh, batch_size, evaluated, expected
):
    scores = Scorer(evaluated(MESHES[mesh], batch_size)).score(PAIRS)
    totals, greedy = zip(*scores, strict=True)
    np.testing.assert_allclose(totals, [e[0] for e in expected], rtol=1e-5, atol=1e-5)
    assert list(greedy) == [e[1] for e in expected]


def test_a_continuation_of_most_probable_ids_is_greedy_until_one_is_not(evaluated, log_probabilities):
    ids = [72, 101]
    for _ in range(4):
        ids.append(int(log_probabilities(np.array(ids))[-1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 264]
    pairs = [(ids[:2], ids[2:]), (other[:2], other[2:]), (ids[:2], [])]
    scores = Scorer(evaluated((1, 1, 4, 1))).score(pairs)
    assert [s.is_greedy for s in scores] == [True, False, True]
    assert scores[2].log_likelihood == 0


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (([], [1]), "Sequence 1 has 0 tokens of context and 1 to score; the first must be at least 1"),
        (([1], [0] * 97), "97 to score; .* at most seq_len=96"),
        (([1], [264]), "Sequence 1 holds ids that are not from 0 to 263"),
        (([-1], [2]), "Sequence 1 holds ids that are not from 0 to 263"),
    ],
)
def test_what_cannot_be_scored_is_refused(pair, words, evaluated):
    with pytest.raises(ValueError, match=words):
        Scorer(evaluated()).score([([1], [2]), pair])


def test_a_likelihood_that_is_no_number_is_an_error_that_names_the_sequence(evaluated):
    model = evaluated((1, 1, 4, 1))
    model.params["final_norm"]["gain"] *= jnp.nan
    with pytest.raises(NotFiniteError, match="log-likelihood of sequence 1 is nan"):
        Scorer(model).score([([1], []), ([1], [2])])


def test_few_lengths_are_compiled_and_all_sequences_fit(evaluated):
    for sizes, seq_len in (((1, 1, 1, 1), 96), ((1, 1, 1, 8), 2048), ((1, 1, 1, 3), 300)):
        scorer = Scorer(evaluated(sizes, seq_len=seq_len))
        lengths = [scorer.padded_length(n) for n in range(1, seq_len + 1)]
        assert all(length >= n for n, length in enumerate(lengths, 1))
        assert len(set(lengths)) <= 6
        assert all(length % sizes[-1] == 0 for length in lengths)
        assert max(lengths) == seq_len


@given(n=st.integers(0, 40), seq_len=st.integers(1, 12))
def test_rolling_windows_score_every_token_once_with_as_much_before_it_as_fits(n, seq_len):
    ids = list(range(n))
    pairs = list(rolling_windows(ids, -1, seq_len))
    assert list(itertools.chain.from_iterable(continuation for _, continuation in pairs)) == ids
    sequence = [-1, *ids]
    for context, continuation in pairs:
        assert len(context) + len(continuation) - 1 <= seq_len
        first = sequence.index(continuation[0])
        assert context == sequence[first - len(context) : first]
        last = continuation[-1] == n - 1
        assert len(context) == (1 if not last else max(1, min(first, seq_len + 1 - len(continuation))))
