"""Tokens are drawn from the distribution that the options describe, for each row by itself."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlra_jax.config import ConfigError, MeshConfig
from mlra_jax.generation.sampling import GREEDY, NO_NUMBER, RowSampling, Sampling, greedy, sample
from mlra_jax.sharding import AxisRules, decode_rules, make_mesh

V, N_VOCAB = 16, 13


def probabilities(logits, sampling):
    """What is drawn from, in plain NumPy: the filters one after the other on a renormalised distribution."""
    logits = np.asarray(logits, np.float64)[:N_VOCAB] / sampling.temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    descending = np.argsort(-p, kind="stable")
    if sampling.top_k:
        p[descending[sampling.top_k :]] = 0
        p /= p.sum()
    if sampling.top_p < 1:
        total = 0.0
        for i in descending:
            if total >= sampling.top_p:
                p[i] = 0
            total += p[i]
        p /= p.sum()
    p[p < sampling.min_p * p.max()] = 0
    return np.append(p / p.sum(), np.zeros(V - N_VOCAB))


options = st.builds(
    Sampling,
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, V),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 1),
)


def margin(logits, sampling):
    """How far the nearest probabilities are from where a rounding would let a token in or out."""
    before_top_p = probabilities(logits, Sampling(sampling.temperature, sampling.top_k))
    before_min_p = probabilities(logits, dataclasses.replace(sampling, min_p=0.0))
    sums = np.cumsum(-np.sort(-before_top_p))
    shares = before_min_p / before_min_p.max()
    return min(
        abs(sums - sampling.top_p).min() if sampling.top_p < 1 else 1,
        abs(shares[shares < 1] - sampling.min_p).min(initial=1) if sampling.min_p else 1,
    )


@settings(deadline=None, max_examples=60)
@given(options, st.integers(0, 1000))
def test_filters_leave_the_distribution_that_numpy_leaves(sampling, seed):
    logits = np.random.default_rng(seed).normal(size=V).astype(np.float32) * 3
    assume(margin(logits, sampling) > 1e-5)
    logits[N_VOCAB:] = -np.inf  # as `sample` passes them
    p = jax.nn.softmax(sampling.filtered_logits(jnp.asarray(logits)))
    np.testing.assert_allclose(p, probabilities(logits, sampling), atol=1e-5)


def draw(logits_BV, sampling, *, rules=None, seed=0, samples=None, positions=None):
    b = len(logits_BV)
    samplings = [sampling] * b if isinstance(sampling, Sampling) else sampling
    by_row = RowSampling.of(samplings, [seed] * b, np.zeros(b, np.int32) if samples is None else samples)
    position_B = jnp.asarray(np.zeros(b, np.int32) if positions is None else positions)
    rows = jax.tree.map(jnp.asarray, by_row)
    tokens = sample(rules or AxisRules(), jnp.asarray(logits_BV), rows, N_VOCAB, position_B=position_B)
    return np.asarray(tokens)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.7),
        Sampling(1.5, top_k=4),
        Sampling(1.0, top_p=0.8),
        Sampling(1.0, min_p=0.1),
        Sampling(2.0, top_k=8, top_p=0.9, min_p=0.05),
    ],
)
def test_drawn_tokens_are_distributed_as_in_numpy(sampling):
    n = 20_000
    logits = np.random.default_rng(1).normal(size=V).astype(np.float32) * 2
    drawn = draw(np.tile(logits, (n, 1)), sampling, samples=np.arange(n, dtype=np.int32))
    expected = probabilities(logits, sampling)
    seen = np.bincount(drawn, minlength=V) / n
    assert (seen[expected == 0] == 0).all()
    deviation = np.sqrt(expected * (1 - expected) / n)
    assert (abs(seen - expected) <= 5 * deviation).all()


@dataclasses.dataclass(frozen=True)
class OnlyOdd(Sampling):
    """A method of a user's own: the filters of `Sampling`, then every second (or so) id alone."""

    stride: int = 2

    def filtered_logits(self, logits_V):
        allowed_V = jnp.arange(len(logits_V)) % self.stride == 1
        return super().filtered_logits(jnp.where(allowed_V, logits_V, -jnp.inf))


def test_a_subclass_samples_in_its_own_way_and_is_validated():
    logits = np.random.default_rng(5).normal(size=(400, V)).astype(np.float32)
    samples = np.arange(400, dtype=np.int32)
    assert set(draw(logits, OnlyOdd(1.0), samples=samples)) == {1, 3, 5, 7, 9, 11}
    both = draw(logits, [OnlyOdd(1.0, stride=3), Sampling(1.0)] * 200, samples=samples)
    assert set(both[::2]) == {1, 4, 7, 10}
    assert set(both[1::2]) == set(range(N_VOCAB))
    with pytest.raises(ConfigError, match="stride='two' must be a whole number"):
        OnlyOdd(1.0, stride="two").validate()
    with pytest.raises(ConfigError, match=r"OnlyOdd\.stride must be a number"):
        draw(logits[:1], OnlyOdd(1.0, stride="two"))


def test_a_row_draws_the_same_in_any_batch_and_on_any_mesh():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(8, V)).astype(np.float32)
    samples, positions = np.arange(8, dtype=np.int32) % 3, rng.integers(0, 1000, 8).astype(np.int32)
    sampling = [Sampling(1.0, top_k=10, top_p=0.95)] * 8
    sampling[1:6] = [
        GREEDY,
        Sampling(0.5),
        Sampling(1.5, min_p=0.2),
        Sampling(2.0, top_k=3),
        OnlyOdd(1.0, stride=3),
    ]
    whole = draw(logits, sampling, seed=7, samples=samples, positions=positions)
    for i in range(8):
        row = slice(i, i + 1)
        one = draw(logits[row], sampling[row], seed=7, samples=samples[row], positions=positions[row])
        assert one == whole[row]
    for sizes in [(1, 1, 8, 1), (2, 1, 2, 2), (8, 1, 1, 1)]:
        with jax.set_mesh(make_mesh(MeshConfig(*sizes))):
            rules = decode_rules()
            split = rules.constrain(jnp.asarray(logits), "batch", "vocab")
            tokens = draw(split, sampling, rules=rules, seed=7, samples=samples, positions=positions)
        assert tokens.tolist() == whole.tolist()


def test_seed_sample_and_position_each_change_what_is_drawn():
    logits = np.zeros((64, V), np.float32)
    base = {"seed": 0, "samples": np.zeros(64, np.int32), "positions": np.arange(64, dtype=np.int32)}
    drawn = [
        draw(logits, Sampling(1.0), **base | change).tolist()
        for change in [
            {},
            {"seed": 1},
            {"samples": np.ones(64, np.int32)},
            {"positions": np.arange(1, 65, dtype=np.int32)},
        ]
    ]
    assert len({tuple(d) for d in drawn}) == 4
    assert len(set(drawn[0])) > 5
    assert draw(logits, Sampling(1.0), **base).tolist() == drawn[0]


@pytest.mark.parametrize("sizes", [None, (1, 1, 1, 1), (1, 1, 8, 1), (2, 1, 2, 2)])
def test_greedy_takes_the_first_of_the_most_probable_real_ids(sizes):
    logits = np.zeros((4, V), np.float32)
    logits[0, [3, 7]] = 2.0  # equals: the first
    logits[1, N_VOCAB:] = 9.0  # padding of the vocabulary
    logits[2] = -np.arange(V) - 100.0
    logits[3, 12] = 0.5
    mesh = contextlib.nullcontext()
    if sizes is not None:
        mesh = jax.set_mesh(make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))]))
    with mesh:
        rules = decode_rules()
        split = rules.constrain(jnp.asarray(logits), "batch", "vocab")
        assert np.asarray(greedy(rules, split, N_VOCAB)).tolist() == [3, 0, 0, 12]
        for row, value in enumerate([np.nan, np.inf, -np.inf]):
            logits[row, slice(None) if value < 0 else 5] = value
        split = rules.constrain(jnp.asarray(logits), "batch", "vocab")
        assert np.asarray(greedy(rules, split, N_VOCAB)).tolist() == [NO_NUMBER] * 3 + [12]


edges = st.builds(
    Sampling,
    temperature=st.sampled_from([1e-6, 1e-3, 1.0, 1e6]),
    top_k=st.sampled_from([0, 1, N_VOCAB, V, 10**6]),
    top_p=st.sampled_from([5e-324, 1e-45, 1e-9, 0.5, 1 - 1e-16, 1]),
    min_p=st.sampled_from([0, 5e-324, 1e-9, 1]),
)
logit = st.sampled_from([-np.inf, -3e38, -1e30, -1.0, 0.0, 1e-45, 1.0, 1e30, 3e38])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    sampling=st.one_of(edges, options),
    logits=st.lists(st.one_of(logit, st.floats(-9, 9)), min_size=V, max_size=V),
)
def test_every_legal_option_leaves_a_choice_among_the_possible_tokens(sampling, logits):
    row = np.array(logits, np.float32)
    possible = [int(i) for i in np.flatnonzero(row[:N_VOCAB] > -np.inf)]
    assert sampling.faults() == []
    left = np.asarray(sampling.filtered_logits(jnp.where(jnp.arange(V) < N_VOCAB, row, -jnp.inf)))
    drawn = draw(row[None].repeat(4, axis=0), sampling).tolist()
    if possible:
        assert not np.isnan(left).any()
        assert left.max() == 0
        assert {i for i in range(V) if left[i] > -np.inf} <= set(possible)
        assert set(drawn) <= set(possible)
    else:
        assert drawn == [NO_NUMBER] * 4
    row[3] = np.nan
    assert draw(row[None], sampling).tolist() == [NO_NUMBER]


def test_a_very_low_temperature_is_greedy_and_overflows_nothing():
    logits = np.random.default_rng(3).normal(size=(50, V)).astype(np.float32) * 1000
    assert draw(logits, Sampling(1e-6)).tolist() == draw(logits, GREEDY).tolist()


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Sampling(temperature=-1), "temperature=-1"),
        (Sampling(temperature=float("nan")), "temperature=nan"),
        (Sampling(temperature=1e-9), "at least 1e-06"),
        (Sampling(temperature=1e300), "at most 1000000.0"),
        (Sampling(1.0, top_k=-1), "top_k=-1"),
        (Sampling(1.0, top_p=0.0), "top_p=0.0"),
        (Sampling(1.0, top_p=1.5), "top_p=1.5"),
        (Sampling(1.0, min_p=2.0), "min_p=2.0"),
        (Sampling(top_k=5), "no effect on greedy"),
    ],
)
def test_illegal_options_are_refused(sampling, words):
    with pytest.raises(ConfigError, match=words):
        sampling.validate()


def test_all_faults_are_listed_at_once():
    assert len(Sampling(-1.0, -1, 2.0, 3.0).faults()) == 4
    assert Sampling(0.5, 3, 0.9, 0.1).faults() == GREEDY.faults() == []
