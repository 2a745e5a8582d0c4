"""A server of our own for one process: `GenerationLoop` behind Starlette and the gate (`mlra-serve --engine loop`).

One thread steps the loop and makes text of its tokens; HTTP runs in another one. After each step the first wakes the
second once, whatever the number of requests: on a GPU a step takes about as long as the host needs to start the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import secrets
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mlra_jax.config import MeshConfig
from mlra_jax.data.tokenizers import Tokenizer, get_tokenizer
from mlra_jax.generation.engine import Engine, Request
from mlra_jax.generation.load import Loaded, decode_devices, load_model, splits_heads
from mlra_jax.generation.loop import Event, GenerationLoop, QueueFullError
from mlra_jax.generation.sampling import Sampling
from mlra_jax.generation.text import RowText
from mlra_jax.serving import huggingface
from mlra_jax.serving.chat import ChatEncoder, chat_encoder
from mlra_jax.serving.gate import CHAT, COMPLETIONS, MAX_SAMPLES, MAX_TOP_LOGPROBS, Counts, Gate, Refused
from mlra_jax.serving.gate import requests_of_client as of_client
from mlra_jax.serving.http import ignore_repeated_signals, make_server
from mlra_jax.sharding import check_decode_layout, decode_rules, make_mesh

STEPS_AT_ONCE = 8
"""Steps between pieces of text while several completions run; a single one gets each token as it comes."""
WAITING_PER_ROW = 8
"""Completions that may wait for each row of the batch, if not told otherwise."""
ERRORS = {
    "error": ("The logits are NaN or infinite; the weights of this checkpoint are no good.", 500),
    "lost": ("The server has failed, and ends.", 500),
    "left": ("The client has left.", 499),
}
"""What a completion that did not end by itself means: a message and a status."""
FINISH = {"eos": "stop", "stop": "stop", "length": "length"}
"""OpenAI's names for why a completion ended."""


@dataclasses.dataclass
class Piece:
    """What a step brought for a completion."""

    index: int
    """Among the completions of its HTTP request."""
    text: str
    tokens: list[int]
    """The new tokens, without the end of text."""
    logprobs: Sequence[float]
    top_logprobs: Sequence[Sequence[tuple[int, float]]]
    finish: str | None = None
    """Why it ended, in OpenAI's words or those of `ERRORS`; None: it goes on."""


@dataclasses.dataclass
class Running:
    """A completion that waits or runs."""

    request: Request
    text: RowText
    index: int
    pieces: asyncio.Queue[Piece]
    """Of its HTTP request."""
    time: float
    """When it was submitted, or its last tokens came."""
    begun: bool = False

    def add(self, event: Event) -> Piece:
        """What an event means to the client."""
        before = len(self.text.tokens)
        for token in event.tokens:
            self.text.push(token)
        tokens = self.text.tokens[before:]
        finish = FINISH[self.text.finish_reason] if self.text.finish_reason else None
        if finish is None and event.finish is not None:
            finish = "error"
        logprobs, top = event.logprobs or (), event.top_logprobs or ()
        return Piece(
            self.index, self.text.take(), tokens, logprobs[: len(tokens)], top[: len(tokens)], finish
        )


class Driver:
    """The thread that steps a loop.

    Args:
      loop: which nobody else uses.
      tokenizer: the model's.
      counts: to which tokens and times are added.
    """

    def __init__(self, loop: GenerationLoop, tokenizer: Tokenizer, counts: Counts):
        self.loop, self.tokenizer, self.counts = loop, tokenizer, counts
        self.error: BaseException | None = None
        """What has ended the thread; None: nothing."""
        self.on_error: Callable[[], object] = lambda: None
        """Called, in the thread, when an error has ended it."""
        self._running: dict[int, Running] = {}
        self._changed = threading.Condition()  # its lock: for what is running
        self._closed = False
        self._http: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after its current step."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def submit(self, requests: Sequence[tuple[Request, tuple[str, ...]]]) -> asyncio.Queue[Piece]:
        """Adds the completions of an HTTP request, each with its stop strings; called where HTTP runs.

        Raises:
          Refused: too many wait, or the thread has ended.
        """
        self._http, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()
        numbers = of_client.get()
        with self._changed:
            if self.error or self._closed:
                raise Refused("The server ends.", status=503)
            for index, (request, stop) in enumerate(requests):
                last = request.prompt[-1]
                after = None if last == self.tokenizer.eot_id else last
                text = RowText(self.tokenizer, stop, request.eos_id, request.max_new_tokens, after)
                try:
                    number = self.loop.submit(request)
                except QueueFullError as error:  # those before this one are ended by the gate
                    raise Refused(str(error), status=503) from error
                self._running[number] = Running(request, text, index, pieces, time.perf_counter())
                if numbers is not None:
                    numbers.append(str(number))
            self._changed.notify()
        return pieces

    def abort(self, request_id: str) -> None:
        """Ends a completion, if it still runs; called where HTTP runs."""
        with self._changed:
            if (one := self._running.pop(int(request_id), None)) is None:
                return
            self.loop.cancel(int(request_id))
            self._changed.notify()
        one.pieces.put_nowait(Piece(one.index, "", [], (), (), "left"))

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self.loop.busy)
                    if self._closed:
                        return
                    several = len(self._running) > 1
                self._deliver(self.loop.step(STEPS_AT_ONCE if several else 1))
        except BaseException as error:
            with self._changed:
                self.error, lost = error, [*self._running.values()]
                self._running.clear()
            self._wake([(one, Piece(one.index, "", [], (), (), "lost")) for one in lost])
            self.on_error()

    def _deliver(self, events: Sequence[Event]) -> None:
        news = []
        for event in events:
            with self._changed:
                one = self._running.get(event.request)
            if one is None:  # its client has left, or it had its stop string
                continue
            piece = one.add(event)
            if piece.finish:
                with self._changed:
                    self._running.pop(event.request, None)
                if event.finish is None:
                    self.loop.cancel(event.request)
            news.append((one, piece))
        if news:
            self._wake(news)

    def _wake(self, news: list[tuple[Running, Piece]]) -> None:
        assert self._http is not None or not news
        with contextlib.suppress(RuntimeError):  # HTTP has ended
            if self._http is not None:
                self._http.call_soon_threadsafe(self._receive, news)

    def _receive(self, news: list[tuple[Running, Piece]]) -> None:
        """Hands pieces to those who wait for them; runs where HTTP does."""
        now, totals = time.perf_counter(), self.counts.totals
        totals["cached_tokens"] = self.loop.stats.shared_tokens
        for one, piece in news:
            if n := len(piece.tokens):
                totals["generated_tokens"] += n
                if one.begun:
                    self.counts.observe("time_per_token", (now - one.time) / n, n)
                else:
                    one.begun = True
                    totals["prompt_tokens"] += len(one.request.prompt)
                    self.counts.observe("time_to_first_token", now - one.time)
                one.time = now
            one.pieces.put_nowait(piece)


class Served:
    """The model as the gate sees it."""

    def __init__(self, name: str, driver: Driver, chat: ChatEncoder | None = None):
        self._chat = chat
        self.name, self.driver, tokenizer = name, driver, driver.tokenizer
        self.max_len, self.n_tokens, self.end_of_text = (
            driver.loop.max_len,
            tokenizer.n_vocab,
            tokenizer.eot_id,
        )
        self.encode, self.abort = tokenizer.encode, driver.abort

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int] | None:
        """See `gate.Model`."""
        return None if self._chat is None else self._chat(messages)

    async def state(self) -> Mapping[str, float]:
        """See `gate.Model`."""
        loop = self.driver.loop
        return {
            "requests_running": loop.running,
            "requests_waiting": loop.waiting,
            "rows": loop.rows.batch,
        }


def sampling_of(body: Mapping[str, Any]) -> Sampling:
    """How a request that the gate has passed is sampled."""
    number = lambda name, otherwise: float(body.get(name, otherwise))
    penalties = Sampling(
        presence_penalty=number("presence_penalty", 0), frequency_penalty=number("frequency_penalty", 0)
    )
    if body["temperature"] < 1e-6:  # greedy, which no filter changes
        return penalties
    return dataclasses.replace(
        penalties,
        temperature=number("temperature", 1),
        top_k=max(0, body.get("top_k", 0)),
        top_p=number("top_p", 1),
        min_p=number("min_p", 0),
    )


def requests_of(body: Mapping[str, Any], prompts: Sequence[list[int]], eos_id: int) -> list[Any]:
    """The loop's requests for one that the gate has passed: `n` for each prompt, with their stop strings.

    Raises:
      Refused: it asks for what the loop does not have.
    """
    if body.get("min_tokens") and not body.get("ignore_eos"):
        raise Refused("min_tokens is not supported by this engine; leave it out.", "min_tokens")
    stop = body.get("stop") or ()
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    seed = body["seed"] if "seed" in body else secrets.randbelow(2**31)
    asks = body.get("logprobs") is not None and body["logprobs"] is not False
    request = Request(
        (),
        body["max_tokens"],
        sampling_of(body),
        seed,
        eos_id=None if body.get("ignore_eos") else eos_id,
        logprobs=MAX_TOP_LOGPROBS if asks else None,  # one number, of which one program is compiled
        may_stop=bool(stop),
    )
    return [
        (dataclasses.replace(request, prompt=prompt, sample=sample), stop)
        for prompt in prompts
        for sample in range(body.get("n", 1))
    ]


@dataclasses.dataclass
class Answer:
    """What a client gets for a request that runs."""

    body: Mapping[str, Any]
    chat: bool
    prompts: Sequence[list[int]]
    pieces: asyncio.Queue[Piece]
    left: int
    """Completions that have not ended."""
    name: str
    tokenizer: Tokenizer
    made: int = 0
    """Tokens of all completions so far."""

    def __post_init__(self) -> None:
        kind = "chat.completion" if self.chat else "text_completion"
        streamed = ".chunk" if self.chat and self.body.get("stream") else ""
        self._head = {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex,
            "object": kind + streamed,
            "created": int(time.time()),
            "model": self.name,
        }

    async def news(self) -> AsyncIterator[Piece]:
        """The pieces of all completions, until these have ended."""
        while self.left:
            piece = await self.pieces.get()
            if piece.finish in ERRORS:
                message, status = ERRORS[piece.finish]
                raise Refused(message, status=status)
            self.left -= piece.finish is not None
            self.made += len(piece.tokens)
            yield piece

    def _usage(self) -> dict[str, int]:
        prompt = sum(map(len, self.prompts))
        return {"prompt_tokens": prompt, "completion_tokens": self.made, "total_tokens": prompt + self.made}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        top = self.body.get("top_logprobs" if self.chat else "logprobs")
        if not self.body.get("logprobs") or (not piece.tokens and not piece.finish):
            return None
        word = lambda token: self.tokenizer.decode([token])
        best = [pairs[: top or 0] for pairs in piece.top_logprobs]
        if not self.chat:
            return {
                "tokens": [*map(word, piece.tokens)],
                "token_logprobs": [*piece.logprobs],
                "top_logprobs": [{word(token): p for token, p in reversed(pairs)} for pairs in best],
            }
        one = lambda token, p: {"token": word(token), "logprob": p, "bytes": [*word(token).encode()]}
        chosen = zip(piece.tokens, piece.logprobs, best, strict=True)
        return {
            "content": [
                {**one(token, p), "top_logprobs": [one(*pair) for pair in pairs]}
                for token, p, pairs in chosen
            ]
        }

    def _choice(self, piece: Piece) -> dict[str, Any]:
        content: dict[str, Any] = {"text": piece.text}
        if self.chat:
            message = {"role": "assistant", "content": piece.text}
            content = {"delta" if self.body.get("stream") else "message": message}
        return {
            "index": piece.index,
            **content,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish,
        }

    def _echo(self, index: int) -> str:
        if not self.body.get("echo"):
            return ""
        return self.tokenizer.decode(self.prompts[index // self.body.get("n", 1)])

    async def whole(self) -> Response:
        """All in one."""
        every = [Piece(i, self._echo(i), [], [], []) for i in range(self.left)]
        async for piece in self.news():
            one = every[piece.index]
            one.text += piece.text
            one.tokens += piece.tokens
            one.logprobs = [*one.logprobs, *piece.logprobs]
            one.top_logprobs = [*one.top_logprobs, *piece.top_logprobs]
            one.finish = piece.finish
        return JSONResponse({**self._head, "choices": [*map(self._choice, every)], "usage": self._usage()})

    async def stream(self) -> AsyncIterator[str]:
        """Piece by piece, as server-sent events."""
        line = lambda content: f"data: {json.dumps(content)}\n\n"
        try:
            for i in range(self.left if self.body.get("echo") else 0):
                yield line({**self._head, "choices": [self._choice(Piece(i, self._echo(i), [], [], []))]})
            async for piece in self.news():
                if piece.text or piece.finish or (piece.tokens and self.body.get("logprobs")):
                    yield line({**self._head, "choices": [self._choice(piece)]})
        except Refused as error:
            content = {"message": error.message, "type": "InternalServerError", "code": error.status}
            yield line({"error": content})
        else:
            if (self.body.get("stream_options") or {}).get("include_usage"):
                yield line({**self._head, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"


def make_app(served: Served, counts: Counts, **options: Any) -> Gate:
    """The ASGI application: the gate, and behind it what the gate lets through.

    Args:
      served: the model.
      counts: of the requests.
      **options: of `Gate`.
    """
    driver, tokenizer = served.driver, served.driver.tokenizer

    async def generate(request: HttpRequest) -> Response:
        body, chat = await request.json(), request.url.path == CHAT
        if chat:
            prompts = [served.encode_chat(body["messages"]) or []]
        else:
            prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        requests = requests_of(body, prompts, tokenizer.eot_id)
        answer = Answer(body, chat, prompts, driver.submit(requests), len(requests), served.name, tokenizer)
        if not body.get("stream"):
            return await answer.whole()
        return StreamingResponse(answer.stream(), media_type="text/event-stream")

    async def health(request: HttpRequest) -> Response:
        return Response(status_code=503 if driver.error else 200)

    async def health_generate(request: HttpRequest) -> Response:
        pieces = driver.submit([(Request([tokenizer.eot_id], 1), ())])
        return Response(status_code=500 if (await pieces.get()).finish in ERRORS else 200)

    async def refuse(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, Refused)
        kind = "InternalServerError" if error.status >= 500 else "BadRequestError"
        content = {"message": error.message, "type": kind, "param": error.param, "code": error.status}
        return JSONResponse({"error": content}, status_code=error.status)

    routes = [
        Route(COMPLETIONS, generate, methods=["POST"]),
        Route(CHAT, generate, methods=["POST"]),
        Route("/health", health),
        Route("/health_generate", health_generate),
    ]
    app = Starlette(routes=routes, exception_handlers={Refused: refuse})
    return Gate(app, served, counts, **options)


def load(model: str, mesh: MeshConfig, *, step: int | None = None, tokenizer: str = "") -> Loaded:
    """The model of a checkpoint, or of a folder that mlra-export wrote.

    Args:
      model: where it is.
      mesh: sizes of all axes.
      step: of the checkpoint; None: the latest.
      tokenizer: see `get_tokenizer`; empty: the run's.

    Raises:
      ConfigError: mesh, devices, model and tokenizer do not fit together.
      UserError: the tokenizer is not available, or the folder is damaged.
    """
    if not huggingface.is_exported(model):
        return load_model(model, mesh, step=step, tokenizer=tokenizer)
    config, devices = huggingface.open_exported(model).config, decode_devices(mesh)
    split = splits_heads("auto", config.model, mesh.tensor, devices[0].platform)
    check_decode_layout(config.model, mesh, split)
    device_mesh = make_mesh(mesh, devices)
    found = get_tokenizer(config.data.tokenizer)
    return Loaded(config, found, device_mesh, huggingface.load(model, decode_rules(split), device_mesh))


def make_loop(engine: Engine, rows: int, max_len: int, max_waiting: int = 0) -> GenerationLoop:
    """The loop, whose queue is bounded: by default at `WAITING_PER_ROW`, and never too short for a single request."""
    max_waiting = max_waiting or max(MAX_SAMPLES, WAITING_PER_ROW * rows)
    # What most requests have; a field such as top_p makes every step sort the vocabulary once one request has had it.
    return GenerationLoop(engine, rows, max_len, max_waiting=max_waiting, known=[Sampling(temperature=1.0)])


def precompile(engine: Engine, loop: GenerationLoop) -> None:
    """Compiles what requests without further fields need, by calls that change nothing."""
    rows = loop.rows
    for n, size in engine.chunk_shapes(rows.batch, rows.max_len):
        rows.fill({}, n, size)
    rows.copy({})
    rows.begin({})
    rows.step()
    rows.run()


def serve(
    loaded: Loaded,
    *,
    name: str,
    tokenizer: str,
    rows: int,
    max_len: int,
    max_waiting: int,
    warm: bool,
    host: str,
    port: int,
    api_key: str,
    max_body: int,
    shutdown_seconds: float,
) -> None:
    """Serves a model until SIGTERM or SIGINT; then what runs may finish, for a while.

    Args:
      loaded: the model.
      name: for clients.
      tokenizer: beside which a chat template may lie; empty: the run's.
      rows: completions that run at the same time.
      max_len: tokens of a prompt and its completion.
      max_waiting: completions that may wait; 0: the default.
      warm: compile before the first request.
      host: address to listen on.
      port: port to listen on.
      api_key: see `Gate`.
      max_body: bytes of a request.
      shutdown_seconds: how long requests may go on after a signal.

    Raises:
      ConfigError: the devices' memory does not suffice.
    """
    chat = chat_encoder(tokenizer or loaded.config.data.tokenizer)
    engine = Engine(loaded.model, loaded.mesh, loaded.tokenizer.n_vocab)
    loop = make_loop(engine, rows, max_len, max_waiting)
    if warm:
        precompile(engine, loop)
    counts = Counts()
    driver = Driver(loop, loaded.tokenizer, counts)
    app = make_app(Served(name, driver, chat), counts, api_key=api_key, max_body=max_body)
    server = make_server(app, host, port, shutdown_seconds)
    driver.on_error = lambda: setattr(server, "should_exit", True)
    print(
        f"{name}: http://{host}:{port}/v1 (contexts of {max_len:,} tokens, {loop.rows.batch} completions at a time)",
        flush=True,
    )
    ignore_repeated_signals()
    driver.start()
    try:
        server.run()
    finally:
        driver.close()
    if driver.error:
        raise driver.error
