"""Rows are refilled while others go on; every request gets the tokens that it would get alone."""

import dataclasses

import jax
import numpy as np
import pytest

from mlra_jax.config import ConfigError
from mlra_jax.generation.engine import STEPS_PER_RUN, Request
from mlra_jax.generation.loop import GenerationLoop, QueueFullError
from mlra_jax.generation.sampling import Sampling

SIZES = (2, 2, 2)
ROWS, MAX_LEN = 4, 64


@pytest.fixture(scope="module")
def loop(engine):
    """`loop(**options)`: of four rows of 64 tokens, on a mesh of data 2 x tensor 2 x context 2 devices."""
    return lambda **options: GenerationLoop(engine("mlra_4", SIZES), ROWS, MAX_LEN, **options)


@pytest.fixture(scope="module")
def requests():
    """24 of mixed lengths; every second one begins with the same 20 tokens."""
    rng = np.random.default_rng(1)
    ids = lambda n: rng.integers(0, 257, n).tolist()
    shared = ids(20)
    own = [ids(rng.integers(1, 20)) for _ in range(24)]
    prompts = [shared + ids if i % 2 else ids for i, ids in enumerate(own)]
    return [Request(prompt, int(rng.integers(1, 20))) for prompt in prompts]


@pytest.fixture(scope="module")
def expected(requests, rollout):
    """Their tokens, each from full forward passes."""
    longest = [rollout("mlra_4", [r.prompt for r in requests[i : i + 4]], 19) for i in range(0, 24, 4)]
    rows = [row for rows in longest for row in rows]
    return [row[: r.max_new_tokens] for row, r in zip(rows, requests, strict=True)]


def finish(loop, numbers, max_steps=STEPS_PER_RUN):
    """The tokens of each request, and why it ended."""
    tokens, ends = {number: [] for number in numbers}, {}
    while loop.busy:
        for event in loop.step(max_steps):
            assert event.request not in ends
            tokens.setdefault(event.request, []).extend(event.tokens)
            if event.finish:
                ends[event.request] = event.finish
    return [tokens[number] for number in numbers], [ends[number] for number in numbers]


@pytest.mark.parametrize("max_steps", [1, 5, STEPS_PER_RUN])
def test_each_request_gets_its_own_tokens_and_rows_seldom_wait(max_steps, loop, requests, expected):
    this = loop()
    tokens, ends = finish(this, [this.submit(request) for request in requests], max_steps)
    assert tokens == expected
    assert set(ends) == {"length"}
    assert (this.waiting, this.running, this.busy) == (0, 0, False)
    static = [[len(row) - 1 for row in expected[i : i + ROWS]] for i in range(0, 24, ROWS)]
    of_static_batches = sum(map(sum, static)) / sum(ROWS * max(batch) for batch in static)
    assert of_static_batches < 0.7
    assert this.stats.occupancy > 0.8
    assert this.stats.step_tokens == sum(map(sum, static))


def test_a_shared_prefix_is_run_once_on_each_device_along_data(loop, requests, expected):
    this = loop()
    finish(this, [this.submit(request) for request in requests[1::2]])
    lengths = [len(request.prompt) for request in requests[1::2]]
    assert this.stats.chunk_tokens == sum(lengths) - (12 - 2) * 20
    assert this.stats.shared_tokens == (12 - 2) * 20
    # So is the whole prompt of several samples, whose first tokens follow from the same logits.
    this = loop()
    prompt, sampling = requests[1].prompt, Sampling(1.0)
    samples = [Request(prompt, 6, sampling, seed=9, sample=i) for i in range(4)]
    together, _ = finish(this, [*map(this.submit, samples)])
    assert (this.stats.chunk_tokens, this.stats.shared_tokens) == (2 * len(prompt), 2 * len(prompt))
    assert len({tuple(row) for row in together}) == 4
    again, _ = finish(
        this, [*map(this.submit, samples)]
    )  # in rows that hold the prompt, and what came after it
    assert again == together
    assert this.stats.chunk_tokens == 2 * len(prompt) + 4
    other = loop()
    others = [Request(prompt[:i], 1) for i in (3, 5, 7)]  # nothing to share, and other rows
    alone, _ = finish(other, [other.submit(request) for request in [*others, samples[2]]])
    assert alone[3] == together[2]


def test_requests_come_and_go_at_any_time(loop, requests, expected):
    this = loop(max_waiting=3)
    first = [this.submit(request) for request in requests[:3]]
    with pytest.raises(QueueFullError, match="3 requests wait already, and no more than 3 may"):
        this.submit(requests[3])
    events = this.step(2)
    later = [this.submit(request) for request in requests[3:6]]
    this.cancel(first[0])
    this.cancel(later[1])
    this.cancel(10**6)
    tokens = {number: [] for number in (*first, *later)}
    ends = {}
    while True:
        for event in events:
            tokens[event.request] += event.tokens
            ends[event.request] = event.finish
        if not this.busy:
            break
        events = this.step(2)
    for i, number in enumerate((*first, *later)):
        if i in (0, 4):
            assert ends[number] == "cancelled"
            assert tokens[number] == expected[i][: len(tokens[number])]
            assert len(tokens[number]) < len(expected[i])
        else:
            assert (tokens[number], ends[number]) == (expected[i], "length")
    assert this.step() == []
    long = this.submit(Request([1, 2, 3], 60))
    this.step(2)
    this.cancel(long)
    assert [(event.request, event.finish) for event in this.step()] == [(long, "cancelled")]
    assert not np.asarray(this.rows.state.left_B).any()  # nor does the device go on


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([], 1), "at least one token"),
        (Request([1], 0), "at least one token"),
        (
            Request([1] * 60, 5),
            "60 tokens; with max_new_tokens=5 that is 65, more than the 64 that a row holds",
        ),
        (Request([1, 257], 5), "token id 257; ids are 0 to 256"),
        (Request([1], 5, Sampling(-1.0)), "temperature=-1"),
        (Request([1], 5, logprobs=-1), "logprobs=-1"),
    ],
)
def test_what_can_never_run_is_refused_with_the_numbers(request_, words, loop):
    this = loop()
    with pytest.raises(ConfigError, match=words):
        this.submit(request_)
    assert not this.busy


def test_a_row_ends_at_its_end_token_or_when_its_logits_are_no_number(loop, requests, expected):
    eos = expected[5][2]
    assert eos not in expected[5][:2]
    this = loop()
    numbers = [
        this.submit(dataclasses.replace(requests[5], eos_id=eos)),
        this.submit(dataclasses.replace(requests[3], max_new_tokens=19)),
    ]
    events = this.step(1) + this.step(1)
    assert this.running == 2
    (bad,) = [i for i, row in enumerate(this._rows) if row.number == numbers[1]]
    poison = lambda x: jax.device_put(
        np.where(np.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1)) == bad, np.nan, x), x.sharding
    )
    cache = this.rows.state.cache
    cache = dataclasses.replace(cache, layers=jax.tree.map(poison, cache.layers))
    this.rows.state = dataclasses.replace(this.rows.state, cache=cache)
    tokens, ends = finish(this, numbers)
    begun = {n: [t for e in events if e.request == n for t in e.tokens] for n in numbers}
    assert ends == ["eos", "error"]
    assert begun[numbers[0]] + tokens[0] == expected[5][:3]
    # Nothing of a poisoned row is used again, not even by a prompt that begins as its did.
    again, _ = finish(this, [this.submit(request) for request in requests[3:8]])
    assert again == expected[3:8]


def test_log_probabilities_are_those_of_the_model_itself(loop, requests, expected, logits_of):
    this = loop()
    asked = [
        dataclasses.replace(requests[1], logprobs=3, max_new_tokens=4),
        dataclasses.replace(requests[2], logprobs=0, max_new_tokens=4, sampling=Sampling(2.0), seed=1),
        dataclasses.replace(requests[3], max_new_tokens=4),
    ]
    numbers = [this.submit(request) for request in asked]
    found = {number: [] for number in numbers}
    while this.busy:
        for event in this.step():
            assert (event.logprobs is None) == (event.request == numbers[2])
            assert (event.top_logprobs is None) == (event.request == numbers[2])
            nothing = [None] * len(event.tokens)
            columns = event.tokens, event.logprobs or nothing, event.top_logprobs or nothing
            found[event.request] += zip(*columns, strict=True)
    assert [token for token, *_ in found[numbers[0]]] == expected[1][:4]
    for number, request in zip(numbers[:2], asked, strict=False):
        tokens = [token for token, *_ in found[number]]
        log_p_TV = jax.nn.log_softmax(logits_of(request.prompt + tokens)[len(request.prompt) - 1 :])
        log_p_TV = np.asarray(log_p_TV)
        for t, (token, logprob, top) in enumerate(found[number]):
            assert logprob == pytest.approx(log_p_TV[t, token], abs=1e-3)
            order = np.argsort(-log_p_TV[t], kind="stable")[: request.logprobs]
            assert [i for i, _ in top] == order.tolist()
            assert [p for _, p in top] == pytest.approx(log_p_TV[t, order].tolist(), abs=1e-3)


def test_penalties_hold_for_each_row_and_new_values_compile_nothing(loop, requests, logits_of, engine):
    this = loop(known=[Sampling(repetition_penalty=2, presence_penalty=1, frequency_penalty=1)])
    values = [(1.0, 0.0, 0.0), (1.8, 0.0, 0.0), (1.0, -1.9, 0.0), (0.5, 0.5, -2.0), (1.3, 0.0, 1.5)]
    prompts = [request.prompt[:9] for request in requests[2:12:2]]
    asked = [Request(p, 6, Sampling(0, 0, 1, 0, *v)) for p, v in zip(prompts, values, strict=True)]
    assert all(request.sampling.temperature == 0 for request in asked)
    tokens, _ = finish(this, [this.submit(request) for request in asked])
    compiled = len(engine("mlra_4", SIZES).programs)
    plain = loop()
    unpenalized, _ = finish(plain, [plain.submit(Request(p, 6)) for p in prompts])
    for prompt, made, (repetition, presence, frequency) in zip(prompts, tokens, values, strict=True):
        for t in range(6):
            logits = logits_of(prompt + made[:t])[-1]
            count = np.bincount(made[:t], minlength=257)
            seen = (count > 0) | np.isin(np.arange(257), prompt)
            logits = np.where(seen, np.where(logits > 0, logits / repetition, logits * repetition), logits)
            logits -= presence * (count > 0) + frequency * count
            assert made[t] == logits.argmax()
    assert tokens[0] == unpenalized[0]
    assert tokens[1:] != unpenalized[1:]
    again = loop(known=[Sampling(repetition_penalty=2, presence_penalty=1, frequency_penalty=1)])
    finish(
        again, [again.submit(Request(prompts[0], 3, Sampling(repetition_penalty=1.1, presence_penalty=0.3)))]
    )
    assert len(engine("mlra_4", SIZES).programs) == compiled
