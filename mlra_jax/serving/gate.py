"""What stands before the engine's HTTP server: which requests reach it, in what form, and what is counted.

A request that is broken, too large or not permitted gets an answer that says so, in the form of OpenAI's errors, and
the engine never sees it. Prompts are passed on as token ids that fit into the context. When a client leaves, its
requests are ended, so that their pages are free.

An ASGI middleware that needs no library.
"""

from __future__ import annotations

import asyncio
import contextvars
import hmac
import json
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COMPLETIONS, CHAT, MODELS = "/v1/completions", "/v1/chat/completions", "/v1/models"
OPEN = ("/health", "/metrics")
"""Paths that need no API key."""

MAX_SAMPLES = 64
"""Most completions of one request: prompts times `n`."""
MAX_TOP_LOGPROBS = 5
MAX_STOPS, MAX_STOP_LENGTH = 16, 1000
DEFAULT_TOKENS = 16
"""New tokens of a text completion for which the request names no number, as in OpenAI's API."""


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.message, self.param, self.status = message, param, status


class Model(Protocol):
    """What the gate asks of the model that is served."""

    name: str
    """As clients call it."""
    max_len: int
    """Tokens of a prompt and its completion."""
    n_tokens: int
    """Ids of the tokenizer."""
    end_of_text: int
    """The id that stands for an empty prompt."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int] | None:
        """The ids of a conversation, with the beginning of an answer; None: the tokenizer has no chat template."""

    def abort(self, request_id: str) -> None:
        """Ends a request of the engine."""

    async def state(self) -> Mapping[str, float]:
        """Numbers for /metrics: what the engine holds now."""


requests_of_client: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar(
    "requests_of_client", default=None
)
"""The engine's ids of what the current HTTP request has asked for; whoever sends requests to the engine appends."""


def _number(low: float, high: float, *, above: bool = False) -> Callable[[Any], bool]:
    def is_legal(x: Any) -> bool:
        is_number = isinstance(x, int | float) and not isinstance(x, bool)
        return is_number and math.isfinite(x) and (low < x if above else low <= x) and x <= high

    return is_legal


def _integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and low <= x <= high


def _flag(x: Any) -> bool:
    return isinstance(x, bool)


def _stops(x: Any) -> bool:
    several = [x] if isinstance(x, str) else x
    is_string = lambda s: isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH and _is_text(s)
    return isinstance(several, list) and len(several) <= MAX_STOPS and all(map(is_string, several))


def _is_text(x: str) -> bool:
    """Whether a string is text: JSON can hold half of a character."""
    try:
        x.encode()
    except UnicodeEncodeError:
        return False
    return True


_TOKENS = 2**31 - 1
FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (_integer(1, _TOKENS), "an integer of at least 1"),
    "max_completion_tokens": (_integer(1, _TOKENS), "an integer of at least 1"),
    "min_tokens": (_integer(0, _TOKENS), "an integer of at least 0"),
    "n": (_integer(1, MAX_SAMPLES), f"an integer from 1 to {MAX_SAMPLES}"),
    "temperature": (_number(0, 100), "a number from 0 to 100"),
    "top_p": (_number(0, 1, above=True), "a number above 0 and at most 1"),
    "top_k": (_integer(-1, _TOKENS), "an integer; -1 or 0: all tokens"),
    "min_p": (_number(0, 1), "a number from 0 to 1"),
    "presence_penalty": (_number(-2, 2), "a number from -2 to 2"),
    "frequency_penalty": (_number(-2, 2), "a number from -2 to 2"),
    "seed": (_integer(-(2**63), 2**64 - 1), "an integer of at most 64 bits"),
    "stop": (_stops, f"a string, or up to {MAX_STOPS} of them, of 1 to {MAX_STOP_LENGTH} characters each"),
    "stream": (_flag, "true or false"),
    "ignore_eos": (_flag, "true or false"),
    "echo": (_flag, "true or false"),
    "stream_options": (
        lambda x: isinstance(x, dict) and _flag(x.get("include_usage", False)),
        'an object such as {"include_usage": true}',
    ),
    "model": (lambda x: isinstance(x, str), "a string"),
}
"""Fields of both requests: whether a value is legal, and what is. Unknown ones are ignored, as by other servers."""

LOGPROBS: Mapping[str, Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    COMPLETIONS: {
        "logprobs": (_integer(0, MAX_TOP_LOGPROBS), f"an integer from 0 to {MAX_TOP_LOGPROBS}"),
    },
    CHAT: {
        "logprobs": (_flag, "true or false"),
        "top_logprobs": (_integer(0, MAX_TOP_LOGPROBS), f"an integer from 0 to {MAX_TOP_LOGPROBS}"),
    },
}

NEUTRAL: Mapping[str, Sequence[Any]] = {
    "best_of": (1,),
    "suffix": ("",),
    "logit_bias": ({},),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "stop_token_ids": ([],),
}
"""Fields of OpenAI's requests, and of other servers', that are not supported, with the values that ask for nothing."""


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a request's body.

    Raises:
      Refused: it is none.
    """
    try:
        value = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Refused(f"The body is not UTF-8: {error.reason} at byte {error.start}.") from error
    except RecursionError as error:
        raise Refused("The body nests too deeply.") from error
    except ValueError as error:
        raise Refused(f"The body is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise Refused("The body must be a JSON object.")
    return value


def translate(path: str, request: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """A request for the engine, of known and legal fields alone, with prompts that fit.

    Args:
      path: `COMPLETIONS` or `CHAT`.
      request: the client's.
      model: that is served.

    Raises:
      Refused: it is not legal, or does not fit the context.
    """
    out = {}
    for name, (is_legal, what) in {**FIELDS, **LOGPROBS[path]}.items():
        if (value := request.get(name)) is None:
            continue
        if not is_legal(value):
            raise Refused(f"{name} must be {what}; got {_shown(value)}.", name)
        out[name] = value
    for name, nothing in NEUTRAL.items():
        if (value := request.get(name)) is not None and value not in nothing:
            raise Refused(f"{name} is not supported here; leave it out.", name)
    if out.pop("model", model.name) != model.name:
        raise Refused(
            f"The model {_shown(request['model'])} is not served here; this is {model.name}.", "model", 404
        )
    if out.get("stream_options") and not out.get("stream"):
        raise Refused("stream_options goes with stream=true.", "stream_options")
    if out.get("top_k") == 0:
        out["top_k"] = -1
    if "seed" in out:
        out["seed"] %= 2**31
    out.setdefault("temperature", 1.0)
    # The engine sends the chosen tokens' alone again and again while it streams.
    top = "logprobs" if path == COMPLETIONS else "top_logprobs"
    if out.get("logprobs") is not None and out["logprobs"] is not False:
        out[top] = max(1, int(out.get(top, 0)))

    asked: int = out.pop("max_completion_tokens", 0) or out.get("max_tokens", 0)
    if path == CHAT:
        ids = model.encode_chat(_messages(request.get("messages")))
        if ids is None:
            raise Refused(
                f"The tokenizer of {model.name} has no chat template; use {COMPLETIONS} with a prompt.",
                "messages",
            )
        if out.get("top_logprobs") and not out.get("logprobs"):
            raise Refused("top_logprobs goes with logprobs=true.", "top_logprobs")
        prompts, lacking = [ids], model.max_len
        out["messages"] = request["messages"]
    else:
        prompts, lacking = _prompts(request.get("prompt"), model), DEFAULT_TOKENS
        if out.get("echo") and out.get("logprobs") is not None:
            raise Refused("echo and logprobs do not go together; leave one out.", "echo")
        out["prompt"] = prompts[0] if len(prompts) == 1 else prompts
    if len(prompts) * out.get("n", 1) > MAX_SAMPLES:
        raise Refused(
            f"A request may ask for {MAX_SAMPLES} completions; {len(prompts)} prompts with n={out.get('n', 1)} are "
            f"{len(prompts) * out.get('n', 1)}.",
            "n",
        )
    longest = max(map(len, prompts))
    room = model.max_len - longest
    if room < 1 or asked > room:
        new = (
            "leave no room for a completion" if room < 1 else f"and max_tokens={asked} are {longest + asked}"
        )
        raise Refused(
            f"The prompt's {longest} tokens {new}; the context has {model.max_len}. Shorten the prompt"
            f"{'' if room < 1 else ', or lower max_tokens'}.",
            "messages" if path == CHAT else "prompt",
        )
    out["max_tokens"] = asked or min(lacking, room)
    if out.get("min_tokens", 0) > out["max_tokens"]:
        raise Refused(
            f"min_tokens={out['min_tokens']} is more than max_tokens={out['max_tokens']}.", "min_tokens"
        )
    return {"model": model.name, **out}


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _prompts(prompt: Any, model: Model) -> list[list[int]]:
    is_ids = lambda x: isinstance(x, list) and x and all(isinstance(i, int) for i in x)
    several = [prompt] if isinstance(prompt, str) or is_ids(prompt) else prompt
    if not isinstance(several, list) or not several:
        raise Refused("prompt must be a string, a list of token ids, or a list of either.", "prompt")
    if len(several) > MAX_SAMPLES:
        raise Refused(f"A request may have {MAX_SAMPLES} prompts; got {len(several)}.", "prompt")
    encoded = []
    for i, one in enumerate(several):
        if isinstance(one, str):
            if not _is_text(one):
                raise Refused(f"Prompt {i} is not text: it has half of a surrogate pair.", "prompt")
            encoded.append(model.encode(one) or [model.end_of_text])
        elif is_ids(one):
            # True is an int, but no id.
            if wrong := [x for x in one if isinstance(x, bool) or not 0 <= x < model.n_tokens]:
                raise Refused(
                    f"Prompt {i} has the token id {_shown(wrong[0])}; ids are 0 to {model.n_tokens - 1}.",
                    "prompt",
                )
            encoded.append(one)
        else:
            raise Refused("prompt must be a string, a list of token ids, or a list of either.", "prompt")
    return encoded


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list such as [{'role': 'user', 'content': 'Hello'}].", "messages")
    out = []
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant"):
            raise Refused(
                f"messages[{i}] must be an object with the role system, user or assistant.", "messages"
            )
        content = message.get("content")
        if isinstance(content, list) and all(
            isinstance(x, dict) and x.get("type") == "text" and isinstance(x.get("text"), str)
            for x in content
        ):
            content = "".join(x["text"] for x in content)
        if not isinstance(content, str) or not _is_text(content):
            raise Refused(f"messages[{i}].content must be text.", "messages")
        out.append({"role": role, "content": content})
    return out


class Counts:
    """Counters and histograms of the requests, as Prometheus reads them."""

    BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

    def __init__(self) -> None:
        self.responses: dict[int, int] = {}
        self.totals = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0}
        self.seconds: dict[str, list[float]] = {
            name: [0.0] * (len(self.BOUNDS) + 2) for name in ("time_to_first_token", "time_per_token")
        }
        """By name: observations up to each bound, all of them, and their sum."""

    def observe(self, name: str, seconds: float, times: int = 1) -> None:
        """Counts a duration."""
        row = self.seconds[name]
        for i, bound in enumerate(self.BOUNDS):
            if seconds <= bound:
                row[i] += times
        row[-2] += times
        row[-1] += seconds * times

    def text(self, state: Mapping[str, float]) -> str:
        """The metrics in Prometheus' text format; `state`: gauges."""
        lines = ["# TYPE mlra_responses_total counter"]
        lines += [f'mlra_responses_total{{status="{k}"}} {v}' for k, v in sorted(self.responses.items())]
        for name, total in self.totals.items():
            lines += [f"# TYPE mlra_{name}_total counter", f"mlra_{name}_total {total}"]
        for name, value in state.items():
            lines += [f"# TYPE mlra_{name} gauge", f"mlra_{name} {value}"]
        for name, row in self.seconds.items():
            full = f"mlra_{name}_seconds"
            lines.append(f"# TYPE {full} histogram")
            bounds = [*map(str, self.BOUNDS), "+Inf"]
            lines += [f'{full}_bucket{{le="{b}"}} {int(x)}' for b, x in zip(bounds, row, strict=False)]
            lines += [f"{full}_sum {row[-1]}", f"{full}_count {int(row[-2])}"]
        return "\n".join(lines) + "\n"


class Gate:
    """The middleware.

    Args:
      app: the engine's server.
      model: what is served.
      counts: to which requests are added.
      api_key: what clients must send as `Authorization: Bearer KEY`; empty: nothing.
      max_body: bytes of a request.
    """

    def __init__(self, app: App, model: Model, counts: Counts, *, api_key: str = "", max_body: int = 2**22):
        self.app, self.model, self.counts = app, model, counts
        self.api_key, self.max_body = api_key, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                status = message["status"]
                self.counts.responses[status] = self.counts.responses.get(status, 0) + 1
            await send(message)

        try:
            await self._handle(scope, receive, counted)
        except Refused as error:
            if not started:
                kind = "InternalServerError" if error.status >= 500 else "BadRequestError"
                content = {"message": error.message, "type": kind, "param": error.param, "code": error.status}
                await _answer(counted, error.status, json.dumps({"error": content}), "application/json")

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        headers = {k.lower(): v for k, v in scope["headers"]}
        if self.api_key and path not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.api_key.encode()):
                raise Refused("Send the API key as the header Authorization: Bearer KEY.", status=401)
        if path == "/metrics" and method == "GET":
            return await _answer(
                send, 200, self.counts.text(await self.model.state()), "text/plain; version=0.0.4"
            )
        # Without its origin, a page of some web site that calls a server on the user's own machine gets no answer.
        scope = {**scope, "headers": [(k, v) for k, v in scope["headers"] if k.lower() != b"origin"]}
        if path in (COMPLETIONS, CHAT):
            if method != "POST":
                raise Refused(f"{path} takes POST.", status=405)
            if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
                raise Refused("The header Content-Type must be application/json.", status=415)
            body = await self._body(headers, receive)
            request = translate(path, parse(body), self.model)
            return await self._generate(scope, json.dumps(request).encode(), receive, send)
        if path not in ("/health", "/health_generate", MODELS, f"{MODELS}/{self.model.name}"):
            raise Refused(f"There is no {path} here.", status=404)
        if method not in ("GET", "HEAD"):
            raise Refused(f"{path} takes GET.", status=405)
        if path.startswith(MODELS):
            card = {
                "id": self.model.name,
                "object": "model",
                "owned_by": "mlra_jax",
                "max_model_len": self.model.max_len,
            }
            content = {"object": "list", "data": [card]} if path == MODELS else card
            return await _answer(send, 200, json.dumps(content), "application/json")
        await self.app(scope, receive, send)

    async def _body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        too_large = Refused(
            f"The body is larger than the {self.max_body:,} bytes that are accepted.", status=413
        )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            raise too_large
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused("The client has left.", status=499)
            parts.append(message.get("body", b""))
            if sum(map(len, parts)) > self.max_body:
                raise too_large
            if not message.get("more_body"):
                return b"".join(parts)

    async def _generate(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Passes a request on, and ends what it asked for once it is answered or the client has left."""
        sent: list[str] = []
        token = requests_of_client.set(sent)
        left, taken = asyncio.Event(), False
        headers = [
            (k, v) for k, v in scope["headers"] if k.lower() not in (b"content-length", b"transfer-encoding")
        ]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}

        async def next_message() -> Message:
            nonlocal taken
            if not taken:
                taken = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()
            self._end(sent)

        watching = asyncio.create_task(watch())
        try:
            await self.app(scope, next_message, send)
        finally:
            watching.cancel()
            self._end(sent)
            requests_of_client.reset(token)

    def _end(self, requests: Iterable[str]) -> None:
        for request_id in requests:
            self.model.abort(request_id)


async def _answer(send: Send, status: int, content: str, media_type: str) -> None:
    body = content.encode()
    headers = [(b"content-type", media_type.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
