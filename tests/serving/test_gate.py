"""The gate in front of the engine: what is refused and why, in which form the rest is passed on, and who may enter."""

from __future__ import annotations

import asyncio
import json

import pytest

from mlra_jax.serving.gate import (
    CHAT,
    COMPLETIONS,
    Counts,
    Gate,
    Refused,
    parse,
    requests_of_client,
    translate,
)


class Bytes:
    """A model of bytes with a context of 32 tokens and no chat template."""

    name, max_len, n_tokens, end_of_text = "tiny", 32, 257, 256

    def __init__(self):
        self.aborted = []
        self.abort = self.aborted.append

    def encode(self, text):
        return list(text.encode())

    def encode_chat(self, messages):
        return None

    async def state(self):
        return {"requests_running": 2}


class Chat(Bytes):
    def encode_chat(self, messages):
        return self.encode("".join(message["content"] for message in messages))


MODEL = Bytes()


def test_a_request_is_passed_on_with_ids_and_known_fields_alone():
    request = {"prompt": "ab", "seed": 2**40 + 1, "top_k": 0, "user": "x", "rid": "y", "lora_path": "z"}
    expected = {
        "model": "tiny",
        "prompt": [97, 98],
        "seed": 1,
        "top_k": -1,
        "temperature": 1.0,
        "max_tokens": 16,
    }
    assert translate(COMPLETIONS, request, MODEL) == expected
    assert translate(COMPLETIONS, {"prompt": ["", [1]], "n": 2}, MODEL)["prompt"] == [[256], [1]]
    assert translate(COMPLETIONS, {"prompt": "x" * 30}, MODEL)["max_tokens"] == 2  # what there is room for
    assert translate(COMPLETIONS, {"prompt": "x", "logprobs": 0}, MODEL)["logprobs"] == 1
    message = {"role": "user", "content": "abc"}
    assert translate(CHAT, {"messages": [message]}, Chat())["max_tokens"] == 29
    parts = {"role": "user", "content": [{"type": "text", "text": "abc"}]}
    assert translate(CHAT, {"messages": [parts], "max_completion_tokens": 3}, Chat())["max_tokens"] == 3


@pytest.mark.parametrize(
    ("path", "request_", "message"),
    [
        (COMPLETIONS, {}, "prompt must be a string"),
        (COMPLETIONS, {"prompt": []}, "prompt must be a string"),
        (COMPLETIONS, {"prompt": [[1], "a", 3]}, "prompt must be a string"),
        (COMPLETIONS, {"prompt": [1, 257]}, "Prompt 0 has the token id 257; ids are 0 to 256."),
        (COMPLETIONS, {"prompt": [True]}, "token id true"),
        (COMPLETIONS, {"prompt": "\ud800"}, "half of a surrogate pair"),
        (
            COMPLETIONS,
            {"prompt": "x" * 32},
            "The prompt's 32 tokens leave no room for a completion; the context has 32.",
        ),
        (COMPLETIONS, {"prompt": "x" * 30, "max_tokens": 5}, "max_tokens=5 are 35; the context has 32."),
        (
            COMPLETIONS,
            {"prompt": "x", "max_tokens": 0},
            "max_tokens must be an integer of at least 1; got 0.",
        ),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 2.0}, "max_tokens must be an integer"),
        (COMPLETIONS, {"prompt": "x", "temperature": float("nan")}, "temperature must be a number"),
        (COMPLETIONS, {"prompt": "x", "top_p": 0}, "top_p must be a number above 0"),
        (COMPLETIONS, {"prompt": "x", "stop": [""]}, "stop must be a string, or up to 16"),
        (COMPLETIONS, {"prompt": "x", "n": 65}, "n must be an integer from 1 to 64"),
        (COMPLETIONS, {"prompt": ["x"] * 10, "n": 7}, "10 prompts with n=7 are 70"),
        (COMPLETIONS, {"prompt": "x", "min_tokens": 17}, "min_tokens=17 is more than max_tokens=16"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"1": 2}}, "logit_bias is not supported here"),
        (COMPLETIONS, {"prompt": "x", "echo": True, "logprobs": 1}, "echo and logprobs do not go together"),
        (
            COMPLETIONS,
            {"prompt": "x", "model": "gpt-4"},
            'The model "gpt-4" is not served here; this is tiny.',
        ),
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}, "has no chat template; use /v1/completions"),
        (
            CHAT,
            {"messages": [{"role": "robot", "content": "x"}]},
            "messages[0] must be an object with the role",
        ),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages[0].content must be text"),
    ],
)
def test_what_is_not_legal_is_refused_with_the_reason(path, request_, message):
    with pytest.raises(Refused) as error:
        translate(path, request_, MODEL)
    assert message in error.value.message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"prompt": "\xff"}', "not UTF-8: invalid start byte at byte 12"),
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"[" * 100_000, "nests too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_body_that_is_no_object_is_refused(body, message):
    with pytest.raises(Refused, match=message):
        parse(body)


async def engine(scope, receive, send):
    """An engine's server that answers with what it was sent, or waits until the client has left."""
    body = json.loads((await receive())["body"])
    requests_of_client.get().append("request-1")
    if body["max_tokens"] == 9:
        assert (await receive())["type"] == "http.disconnect"
        return
    assert b"origin" not in dict(scope["headers"])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


def ask(gate, path=COMPLETIONS, body=b'{"prompt": "a"}', method="POST", **headers):
    """Status and text of the answer; the client leaves once it has sent its body."""
    sent, parts = [], [body[:5], body[5:]]

    async def receive():
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
        await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    given = {"content-type": "application/json", "origin": "https://example.org"} | headers
    scope = {"type": "http", "path": path, "method": method}
    scope["headers"] = [(k.replace("_", "-").encode(), v.encode()) for k, v in given.items()]
    asyncio.run(asyncio.wait_for(gate(scope, receive, send), 10))
    return (sent[0]["status"], sent[1]["body"].decode()) if sent else (None, "")


def test_who_may_enter_and_what_for():
    model, counts = Bytes(), Counts()
    gate = Gate(engine, model, counts, api_key="key", max_body=100)
    right = {"authorization": "Bearer key"}
    assert ask(gate)[0] == ask(gate, authorization="Bearer kez")[0] == 401
    status, text = ask(gate, **right)
    assert (status, json.loads(text)["prompt"]) == (200, [97])
    assert ask(gate, body=b"x" * 101, **right)[0] == 413
    assert ask(gate, content_length="101", **right)[0] == 413
    assert ask(gate, content_type="text/plain", **right)[0] == 415
    assert ask(gate, method="GET", **right)[0] == 405
    assert ask(gate, "/flush_cache", **right)[0] == 404
    assert json.loads(ask(gate, "/v1/models", method="GET", **right)[1])["data"][0]["max_model_len"] == 32
    status, text = ask(gate, "/metrics", method="GET")
    assert status == 200
    assert 'mlra_responses_total{status="413"} 2' in text
    assert "mlra_requests_running 2" in text


def test_requests_of_a_client_that_has_left_are_ended():
    model = Bytes()
    assert ask(Gate(engine, model, Counts()), body=b'{"prompt": "a", "max_tokens": 9}') == (None, "")
    assert set(model.aborted) == {"request-1"}
