"""Requests in at any time, tokens out: which prompt goes into which row of a batch, and when.

loop = GenerationLoop(engine, rows=64, max_len=4096)
number = loop.submit(Request(prompt, max_new_tokens=100))
while loop.busy:
    for event in loop.step():
        ...

A row that ends is filled with the next waiting prompt while the cache of the others stays as it is. A step of the model
takes about as long however many rows generate, so idle rows are lost time; but each refill interrupts the others for a
call of its own. So a run of steps ends when `REFILL_SHARE` of the rows have ended, if prompts wait.

A prompt that begins as another row's does gets that row's tokens by copying them, or keeps those that are left in its
own row, so that a shared prefix is computed once on each device along `data`, for as long as any row still holds it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import threading
from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np

from mlra_jax.config import ConfigError, Positive, require
from mlra_jax.errors import UserError
from mlra_jax.generation.engine import (
    CHUNK_SIZES,
    NO_TOKEN,
    SMALL_CHUNK,
    STEPS_PER_RUN,
    Chosen,
    Engine,
    Logprobs,
    Request,
    Rows,
    next_chunk,
)
from mlra_jax.generation.sampling import NO_NUMBER, RowSampling, Sampling

REFILL_SHARE = 1 / 10
"""Share of the rows that must have ended for a run of steps to end before its time, if prompts wait.

Let a call that fills rows cost the time of F steps besides that of its tokens, and completions have t tokens. Refilling
k of B rows at a time loses k / (2 B) of the rows to waiting, and F B / (k t) of the time to calls. The sum is least for
k = B sqrt(2 F / t): a tenth of the rows for t = 100 and a call that costs half a step."""
STEPS_BETWEEN_STOPS = 8
"""Most steps of a run while a caller may cancel a request for what it reads: no row runs on for longer than this."""
STEPS_BETWEEN_CHUNKS = 16
"""Most steps of a run while long prompts are run in chunks."""
CHUNKS_AT_ONCE = 4
"""As many of the largest chunks are run before rows that generate go on, if these are at least half of all."""
SHORTEST_SHARED = CHUNK_SIZES[0]
"""Shorter common beginnings of prompts are computed for each: no chunk would be saved."""

Finish = Literal["eos", "length", "error", "cancelled"]
"""The request's `eos_id` came; it has its maximum number of tokens; its logits are NaN or infinite; `cancel`."""


class QueueFullError(UserError):
    """As many requests wait as may; the message says how many."""


@dataclasses.dataclass(frozen=True)
class Event:
    """What a step brought for one request."""

    request: int
    """The number that `submit` gave it."""
    tokens: tuple[int, ...] = ()
    """New tokens, the one that ends it included."""
    logprobs: tuple[float, ...] | None = None
    """Natural logarithms of their probabilities under the model itself; None: not asked for."""
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    """For each token, the most probable ones with their log-probabilities, the most probable first."""
    time: float = 0.0
    """When the tokens reached the host, by `Engine.clock`."""
    finish: Finish | None = None
    """Why it has ended; None: it goes on. There is no event after this one."""


@dataclasses.dataclass
class LoopStats:
    """What a loop has done so far. The quotients say how well the device was used."""

    steps: int = 0
    """Steps of the whole batch."""
    step_tokens: int = 0
    """Tokens that they made."""
    rows: int = 0
    """Rows of the batch."""
    chunks: int = 0
    """Calls that ran prompts."""
    chunk_positions: int = 0
    """Positions that they computed, padding included."""
    chunk_tokens: int = 0
    """Tokens of prompts that they ran."""
    shared_tokens: int = 0
    """Tokens of prompts that were in the cache already, or copied."""

    @property
    def occupancy(self) -> float | None:
        """Share of the rows that made a token, over all steps; None: there was no step."""
        return self.step_tokens / (self.steps * self.rows) if self.steps else None


NOTHING = Request((), 0)


@dataclasses.dataclass
class _Row:
    """What the host knows of a row."""

    number: int | None = None
    """Of its request; None: it is free."""
    request: Request = NOTHING
    """The one that it has, or had."""
    content: Any = ()
    """Tokens that its cache begins with, or will once its prompt has been run."""
    beginning: bytes = b""
    """The first `SHORTEST_SHARED` of them."""
    filled: int = 0
    """How many of them the cache holds, at least."""
    prompt_len: int = 0
    """The prompt after which its logits were taken; 0: they are of no use."""
    source: tuple[int, int] | None = None
    """The row whose first tokens it gets, and how many, once that row holds them."""
    begun: bool = False
    tokens: list[int] = dataclasses.field(default_factory=list)
    flying: int = 0
    """Most tokens that are on their way from the device."""
    ended: int = 0
    """When it was last freed, in launches."""

    @property
    def filling(self) -> bool:
        return self.number is not None and not self.begun

    @property
    def active(self) -> bool:
        return self.number is not None and self.begun


@dataclasses.dataclass
class _Flight:
    """Tokens that the device is making."""

    first: Chosen | None
    later: Chosen | None
    numbers: list[int | None]
    """The request of each row."""
    flying: list[int]


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """With how many equal tokens both begin."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


@functools.lru_cache
def _check_sampling(sampling: Sampling) -> None:
    """Raises ConfigError if it is not legal, or cannot be compiled."""
    sampling.validate()
    RowSampling.of([sampling], [0], [0])


class GenerationLoop:
    """Generates for requests that come at any time, in a batch whose rows are refilled.

    `submit` and `cancel` may be called from any thread, `step` from one at a time. With several processes, all make the
    same calls in the same order.

    Args:
      engine: the model.
      rows: rows of the batch, rounded up to a multiple of the devices along `data`.
      max_len: tokens that a row holds, for a prompt and its completion.
      max_waiting: requests that may wait for a row; None: any number.
      known: ways of sampling that will occur; any other one that uses other fields compiles the step anew.
      top_logprobs: most `logprobs` that requests will ask for, likewise; None: no request asks for any.

    Raises:
      ConfigError: the devices' memory does not suffice; the message says what is needed.
    """

    def __init__(
        self,
        engine: Engine,
        rows: int,
        max_len: int,
        *,
        max_waiting: int | None = None,
        known: Sequence[Sampling] = (),
        top_logprobs: int | None = None,
    ):
        require(Positive, rows=rows, max_len=max_len)
        engine.check_memory(rows, max_len)
        self.rows = Rows(engine, rows, max_len, known=known, top=top_logprobs)
        self.max_len, self.max_waiting = max_len, max_waiting
        self.stats = LoopStats(rows=self.rows.batch)
        self._engine = engine
        self._shapes = engine.chunk_shapes(rows, max_len)
        self._rows = [_Row(content=np.zeros(0, np.int32)) for _ in range(self.rows.batch)]
        self._enough = max(1, round(self.rows.batch * REFILL_SHARE))
        self._numbers = itertools.count()
        self._launches = 0
        self._flight: _Flight | None = None
        self._lock = threading.Lock()  # for the two below
        self._waiting: collections.OrderedDict[int, Request] = collections.OrderedDict()
        self._cancelled: set[int] = set()

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have a row."""
        return sum(row.number is not None for row in self._rows)

    @property
    def busy(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._waiting or self._cancelled or self.running)

    def submit(self, request: Request) -> int:
        """Adds a request to the queue and returns its number, which its events have.

        Raises:
          ConfigError: it is not legal, or can never fit into a row; the message says why, with the numbers.
          QueueFullError: as many wait as may.
        """
        self._check(request)
        with self._lock:
            if self.max_waiting is not None and len(self._waiting) >= self.max_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait already, and no more than {self.max_waiting} may; try again "
                    "later."
                )
            number = next(self._numbers)
            self._waiting[number] = request
        return number

    def cancel(self, number: int) -> None:
        """Ends a request: the next step has its last event. One that has ended, or never was, is ignored."""
        with self._lock:
            self._cancelled.add(number)

    def step(self, max_steps: int = STEPS_PER_RUN) -> list[Event]:
        """Takes waiting requests into free rows, generates, and returns what there is of it.

        Args:
          max_steps: most tokens of a request that are waited for; with 1, each is returned as soon as it is there.

        Returns:
          What came for each request, in order of time; nothing if there is nothing to do.

        Raises:
          ConfigError: `max_steps` is less than 1.
        """
        require(Positive, max_steps=max_steps)
        events = self._drop_cancelled()
        flight, self._flight = self._flight or self._launch(max_steps), None
        if flight is None:
            return events
        if max_steps == 1:  # the device makes the next token while the host waits for this one
            self._flight = self._launch(1)
        events += self._read(flight)
        # Otherwise it goes on while the caller processes these, unless they may make the caller cancel something.
        if self._flight is None and not any(row.request.may_stop for row in self._rows if row.active):
            self._flight = self._launch(max_steps)
        return events

    def _check(self, request: Request) -> None:
        n_vocab, tokens = self._engine.n_vocab, request.prompt
        if len(tokens) < 1 or request.max_new_tokens < 1:
            raise ConfigError("A prompt must have at least one token, and get at least one.")
        if len(tokens) + request.max_new_tokens > self.max_len:
            raise ConfigError(
                f"The prompt has {len(tokens)} tokens; with max_new_tokens={request.max_new_tokens} that is "
                f"{len(tokens) + request.max_new_tokens}, more than the {self.max_len} that a row holds: shorten it, "
                "or ask for fewer."
            )
        if wrong := [token for token in tokens if not 0 <= token < n_vocab]:
            raise ConfigError(f"The prompt has the token id {wrong[0]}; ids are 0 to {n_vocab - 1}.")
        require(Logprobs | None, logprobs=request.logprobs)
        _check_sampling(request.sampling)

    # Freeing and filling rows

    def _free(self, row: _Row, *, keep: bool = True) -> None:
        """Frees a row; what its cache holds stays of use unless it is not to be kept."""
        if not keep:
            row.content, row.filled, row.prompt_len = np.zeros(0, np.int32), 0, 0
        elif row.begun:
            row.content = np.concatenate([row.content, np.array(row.tokens[:-1], np.int32)])
            row.filled = len(row.content)
        else:
            row.content, row.prompt_len = row.content[: row.filled], 0
        for other in self._rows:
            if (
                other.source is not None
                and self._rows[other.source[0]] is row
                and other.source[1] > row.filled
            ):
                other.source = None
        row.number = row.source = None
        row.begun, row.tokens, row.flying, row.ended = False, [], 0, self._launches
        row.beginning = row.content[:SHORTEST_SHARED].tobytes()

    def _drop_cancelled(self) -> list[Event]:
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
            found = [number for number in cancelled if self._waiting.pop(number, None) is not None]
        stopped = []
        for i, row in enumerate(self._rows):
            if row.number not in cancelled or row.number is None:
                continue
            found.append(row.number)
            if row.begun:
                stopped.append(i)
            self._free(row)
        if stopped:
            self.rows.stop(stopped)
        return [Event(number, finish="cancelled") for number in sorted(found)]

    def _assign(self) -> None:
        """Gives free rows to waiting requests, the oldest first."""
        while free := [i for i, row in enumerate(self._rows) if row.number is None]:
            with self._lock:
                if not self._waiting:
                    break
                number, request = self._waiting.popitem(last=False)
            self._place(number, request, free)
        self._copy()

    def _place(self, number: int, request: Request, free: Sequence[int]) -> None:
        """Gives the request one of the free rows: if possible on the device that holds most of its prompt."""
        prompt = np.asarray(request.prompt, np.int32)
        part_of = lambda i: i // self.rows.part_rows
        shared = [self._shared(prompt, row) for row in self._rows]
        ready = [row.filled >= n and row.source is None for row, n in zip(self._rows, shared, strict=True)]
        best: dict[int, tuple[int, bool, int]] = {}
        load = collections.Counter(part_of(i) for i, row in enumerate(self._rows) if row.number is not None)
        for i, n in enumerate(shared):
            best[part_of(i)] = max(best.get(part_of(i), (0, False, 0)), (n, ready[i], -i))

        def worth(i: int) -> tuple[int, bool, int, int, int]:
            n = best[part_of(i)][0]
            return n, shared[i] == n > 0, -load[part_of(i)], -self._rows[i].ended, -i

        chosen = max(free, key=worth)
        if any(row.source is not None and row.source[0] == chosen for row in self._rows):
            self._copy()  # before it is overwritten
        n, _, source = best[part_of(chosen)]
        row = self._rows[chosen]
        in_place = n == shared[chosen]
        if in_place:  # running the last token sets the row's length
            n = min(n, len(prompt) - 1)
        row.number, row.request, row.content, row.prompt_len = number, request, prompt, len(prompt)
        row.beginning = prompt[:SHORTEST_SHARED].tobytes()
        row.filled, row.source = (n, None) if in_place else (0, (-source, n))
        self.stats.shared_tokens += n * in_place

    def _shared(self, prompt: np.ndarray, row: _Row) -> int:
        """With how many tokens of the prompt the row's cache begins, or will; 0 if too few."""
        if row.beginning != prompt[:SHORTEST_SHARED].tobytes():  # as most are
            return 0
        n = common_prefix(prompt, row.content)
        if not n == len(prompt) == row.prompt_len:  # the logits are those after another prompt
            n = min(n, len(prompt) - 1)
        return n if n >= SHORTEST_SHARED else 0

    def _copy(self) -> None:
        """Copies the prefixes that rows wait for and that are there."""
        sources = {i: row.source for i, row in enumerate(self._rows) if row.source is not None}
        ready = {i: source for i, source in sources.items() if self._rows[source[0]].filled >= source[1]}
        if not ready:
            return
        self.rows.copy(ready)
        for i, (_, n) in ready.items():
            self._rows[i].filled, self._rows[i].source = n, None
            self.stats.shared_tokens += n

    def _unfilled(self) -> list[int]:
        return [i for i, row in enumerate(self._rows) if row.filling and row.filled < row.prompt_len]

    def _fill(self) -> int:
        """Runs one chunk of prompts; returns its positions, or as many as take as long."""
        by_part: list[list[int]] = [[] for _ in range(self.rows.n_parts)]
        for i in self._unfilled():
            if self._rows[i].source is None:
                by_part[i // self.rows.part_rows].append(i)
        left = lambda i: self._rows[i].prompt_len - self._rows[i].filled
        n, size = next_chunk([[left(i) for i in part] for part in by_part], self._shapes)
        chunks = {}
        for part in by_part:
            for i in sorted(part, key=lambda i: -min(left(i), size))[:n]:
                row = self._rows[i]
                chunks[i] = row.filled, row.content[row.filled : row.filled + size]
        self.rows.fill(chunks, n, size)
        for i, (_, tokens) in chunks.items():
            self._rows[i].filled += len(tokens)
            self.stats.chunk_tokens += len(tokens)
        self.stats.chunks += 1
        self.stats.chunk_positions += n * size * self.rows.n_parts
        return max(n * size, SMALL_CHUNK)

    # The device's work and its results

    def _launch(self, max_steps: int) -> _Flight | None:
        """Fills free rows and starts a run of steps; None if there is nothing to do."""
        self._launches += 1
        self._copy()
        self._assign()
        positions, most = 0, max(n * size for n, size in self._shapes)
        while self._unfilled():
            positions += self._fill()
            self._copy()
            generating = sum(
                row.active or (row.filling and row.filled == row.prompt_len) for row in self._rows
            )
            if positions >= CHUNKS_AT_ONCE * most and 2 * generating >= self.rows.batch:
                break  # the others go on; the rest of the prompts comes after some steps
        flying = [0] * self.rows.batch
        fresh = {i: row for i, row in enumerate(self._rows) if row.filling and row.filled == row.prompt_len}
        first = self.rows.begin({i: row.request for i, row in fresh.items()}) if fresh else None
        for i, row in fresh.items():
            row.begun, flying[i] = True, 1
        room = lambda i, row: len(row.tokens) + row.flying + flying[i] < row.request.max_new_tokens
        active = [i for i, row in enumerate(self._rows) if row.active and room(i, row)]
        later = None
        if active and not (fresh and max_steps == 1):
            n_steps, n_idle = max_steps, 0
            if any(self._rows[i].request.may_stop for i in active):
                n_steps = min(n_steps, STEPS_BETWEEN_STOPS)
            if self._unfilled():
                n_steps = min(n_steps, STEPS_BETWEEN_CHUNKS)
            if self._waiting:
                n_idle = max(0, len(active) - self._enough)
            later = self.rows.step() if max_steps == 1 else self.rows.run(n_steps, n_idle)
            for i in active:
                flying[i] += n_steps
        for row, n in zip(self._rows, flying, strict=True):
            row.flying += n
        if first is None and later is None:
            return None
        return _Flight(first, later, [row.number for row in self._rows], flying)

    def _read(self, flight: _Flight) -> list[Event]:
        """Waits for the tokens and sorts them by request."""
        events = []
        for chosen in (flight.first, flight.later):
            if chosen is None:
                continue
            made: list[Any] = [None if x is None else np.asarray(x) for x in chosen]
            now = self._engine.clock()
            if chosen.id_B.ndim == 1:
                made = [None if x is None else x[None] for x in made]
            is_token = made[0] != NO_TOKEN
            if chosen is flight.later:
                self.stats.steps += int(is_token.any(axis=1).sum())
            for i, number in enumerate(flight.numbers):
                row, of_row = self._rows[i], is_token[:, i]
                if number is None or row.number != number or not of_row.any():
                    continue
                if chosen is flight.later:
                    self.stats.step_tokens += int(of_row.sum())
                of_row = Chosen(*(None if x is None else x[of_row, i] for x in made))
                events.append(self._event(row, of_row, now))
        for i, n in enumerate(flight.flying):
            if self._rows[i].number == flight.numbers[i]:
                self._rows[i].flying -= n
        return events

    def _event(self, row: _Row, made: Chosen, now: float) -> Event:
        """What some tokens of a row are to its request; frees the row if it has ended."""
        number, request = row.number, row.request
        assert number is not None
        tokens, finish = made.id_B.tolist(), cast(Finish | None, None)
        if tokens[-1] == NO_NUMBER:
            finish = "error"
            tokens.pop()
        row.tokens += tokens
        if finish is None and tokens[-1] == request.eos_id:
            finish = "eos"
        elif finish is None and len(row.tokens) == request.max_new_tokens:
            finish = "length"
        logprobs = top = None
        if (k := request.logprobs) is not None:
            logprobs = tuple(made.logprob_B.tolist()[: len(tokens)])
            pairs = zip(made.top_id_BK[:, :k].tolist(), made.top_logprob_BK[:, :k].tolist(), strict=True)
            top = tuple(tuple(zip(*pair, strict=True)) for pair in pairs)[: len(tokens)]
        if finish:
            self._free(row, keep=finish != "error")
        return Event(number, tuple(tokens), logprobs, top, now, finish)
