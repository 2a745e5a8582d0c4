"""The server on `GenerationLoop`: the tokens of `Generator`, whatever else is asked for, and rows that become free."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from mlra_jax.cli import serve
from mlra_jax.config import MeshConfig
from mlra_jax.data.tokenizers import json_description
from mlra_jax.generation.engine import Engine
from mlra_jax.generation.generator import GenerationOptions, Generator, changed
from mlra_jax.generation.load import load_model
from tests.serving.conftest import LENGTH, Server, check_random_requests, free_port, random_params, write_run

pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
import httpx

from mlra_jax.serving.chat import chat_encoder
from mlra_jax.serving.gate import CHAT, Counts
from mlra_jax.serving.http import make_server
from mlra_jax.serving.loop_server import Driver, Served, make_app, make_loop

SIZES = {"batch_size": 4, "max_len": LENGTH}
"""Of `Generator`'s batch: as the server's, so that programs are compiled once."""
GREEDY = {"temperature": 0, "ignore_eos": True}


class InProcess(Server):
    """The server in threads of this process, of a model that is loaded already."""

    def __init__(self, generator: Generator, rows: int, max_waiting: int = 0):
        loop = make_loop(generator.engine, rows, LENGTH, max_waiting)
        counts, port = Counts(), free_port()
        self.driver = Driver(loop, generator.tokenizer, counts)
        self.url = f"http://127.0.0.1:{port}"
        self.served = Served("tiny", self.driver)
        self.server = make_server(make_app(self.served, counts), "127.0.0.1", port, 5)
        self.driver.start()
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def is_idle(self) -> bool:
        return self.metric("requests_running") + self.metric("requests_waiting") == 0

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.driver.close()


@pytest.fixture(scope="module")
def generator(run):
    loaded = load_model(run, MeshConfig(data=1))
    return Generator(Engine(loaded.model, loaded.mesh, loaded.tokenizer.n_vocab), loaded.tokenizer)


@pytest.fixture(scope="module")
def server(generator):
    served = InProcess(generator, 4)
    yield served
    served.stop()


def prompts(n):
    """Token ids of 5 to 60 tokens; most begin with one of two others."""
    rng = np.random.default_rng(0)
    letters = lambda k: rng.integers(97, 123, k).tolist()
    prefixes = [[], letters(20), letters(40)]
    return [prefixes[i % 3] + letters(5 + i % 16) for i in range(n)]


def events(server, path="/v1/completions", **request):
    """What a streamed answer consists of."""
    with httpx.stream("POST", server.url + path, json={**request, "stream": True}, timeout=120) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_requests_get_the_tokens_of_the_generator(server, generator):
    asked = prompts(12)
    ask = lambda prompt: server.post(prompt=prompt, max_tokens=10, logprobs=2, **GREEDY)
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        answers = [answer.json() for answer in pool.map(ask, asked)]
    expected = generator.complete(asked, max_new_tokens=10, ignore_eos=True, logprobs=5, **SIZES)
    for answer, completion in zip(answers, expected, strict=True):
        [choice] = answer["choices"]
        assert choice["text"] == completion.text
        assert answer["usage"]["completion_tokens"] == len(choice["logprobs"]["tokens"]) == 10
        np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], completion.logprobs, atol=2e-3)
        assert all(0 < len(top) <= 2 for top in choice["logprobs"]["top_logprobs"])
    assert server.metric("cached_tokens_total") >= 100
    assert server.metric("generated_tokens_total") == 120
    assert server.is_idle()


def test_each_request_is_sampled_in_its_own_way(server, generator):
    sampled = {"prompt": "once", "max_tokens": 8, "seed": 5, "ignore_eos": True, "min_p": 0.001, "top_k": 50}
    greedy = {"prompt": ["once", "twice"], "max_tokens": 8, "echo": True, **GREEDY}
    requests = [sampled, {**sampled, "n": 2}, {**sampled, "seed": 6}, greedy]
    with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda request: server.post(**request).json()["choices"], requests))
    texts = [[choice["text"] for choice in choices] for choices in answers]
    options = GenerationOptions(8, ignore_eos=True, **SIZES)
    own = changed(options, temperature=1.0, n=2, seed=5, min_p=0.001, top_k=50)
    expected = generator.generate(["once", "once", "twice"], [own, options, options])
    assert texts[1] == expected[:2]
    assert texts[0] == texts[1][:1]
    assert texts[2] != texts[0]
    assert texts[3] == ["once" + expected[2], "twice" + expected[3]]


def test_text_streams_and_ends_where_it_is_told_to(server):
    request = {"prompt": "abc", "max_tokens": 12, "logprobs": 0, **GREEDY}
    whole = server.post(**request).json()["choices"][0]
    *pieces, usage = events(server, **request, stream_options={"include_usage": True})
    choices = [piece["choices"][0] for piece in pieces]
    assert len(choices) > 6
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    numbers = [x for choice in choices for x in choice["logprobs"]["token_logprobs"]]
    assert numbers == whole["logprobs"]["token_logprobs"]
    assert choices[-1]["finish_reason"] == whole["finish_reason"] == "length"
    assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}

    stop = next(c for c in whole["text"][2:] if c != "\N{REPLACEMENT CHARACTER}")
    stopped = server.post(**{**request, "stop": [stop]}).json()["choices"][0]
    assert stopped["text"] == whole["text"][: whole["text"].index(stop)]
    assert stopped["finish_reason"] == "stop"
    assert server.becomes_idle()
    refused = server.post(prompt="abc", min_tokens=2)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "min_tokens")
    assert (
        "no chat template"
        in server.post("/v1/chat/completions", messages=[{"role": "user", "content": "x"}]).text
    )


TEMPLATE = """{% for m in messages %}
{% if m.role == 'system' %}{{ raise_exception('No system here') }}{% endif %}
{{ m.content }}{{ eos_token }}
{% endfor %}
"""


def test_conversations_become_tokens_by_the_template(server, generator, tmp_path, monkeypatch):
    pytest.importorskip("jinja2")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json_description("byte")))
    assert chat_encoder(str(path)) is None
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.setattr(server.served, "_chat", encode := chat_encoder(str(path)))
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    prompt = [*b"Hello", 256, *b"\n"]
    assert encode([{"role": "user", "content": "Hello"}]) == prompt
    request = {"messages": messages, "max_tokens": 6, "logprobs": True, "top_logprobs": 2, **GREEDY}
    [choice] = server.post("/v1/chat/completions", **request).json()["choices"]
    options = {"max_new_tokens": 6, "ignore_eos": True, **SIZES}
    assert choice["message"] == {"role": "assistant", "content": generator.generate(prompt, **options)}
    assert [len(token["top_logprobs"]) for token in choice["logprobs"]["content"]] == [2] * 6
    pieces = [event["choices"][0]["delta"]["content"] for event in events(server, CHAT, **request)]
    assert "".join(pieces) == choice["message"]["content"]
    refused = server.post("/v1/chat/completions", messages=[{"role": "system", "content": "x"}])
    assert (refused.status_code, "No system here" in refused.text) == (400, True)


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_rows(server, stream):
    stats = server.driver.loop.stats
    before = stats.step_tokens
    request = {"prompt": "abc", "max_tokens": 250, "n": 8, "ignore_eos": True, "stream": stream}
    if stream:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=request, timeout=60) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=request, timeout=0.1)
    assert server.becomes_idle()
    assert stats.step_tokens - before < 1000
    end = time.monotonic() + 10
    while server.server.server_state.tasks:  # those that wait for the rest of an answer
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow  # every way of sampling is compiled
def test_random_requests_leave_nothing_behind(server):
    check_random_requests(server, 300)


def test_a_full_queue_and_numbers_that_are_none_are_errors(generator, tmp_path):
    params = random_params()
    params["final_norm"]["gain"] = np.full_like(params["final_norm"]["gain"], np.nan)
    loaded = load_model(write_run(tmp_path / "broken", params), MeshConfig(data=1))
    broken = Engine(loaded.model, loaded.mesh, loaded.tokenizer.n_vocab)
    broken.programs = generator.engine.programs
    server = InProcess(Generator(broken, loaded.tokenizer), 4, max_waiting=2)
    try:
        answer = server.post(prompt="abc", max_tokens=1)
        assert answer.status_code == 500
        assert "NaN or infinite" in answer.json()["error"]["message"]
        assert "NaN or infinite" in events(server, prompt="abc", max_tokens=5)[-1]["error"]["message"]
        full = server.post(prompt="abc", max_tokens=5, n=10)
        assert full.status_code == 503
        assert "no more than 2 may" in full.json()["error"]["message"]
        assert server.becomes_idle()
        assert httpx.get(f"{server.url}/health").status_code == 200
        # An error in the thread ends what runs, and says so.
        server.driver.loop.step = lambda *_: 1 / 0
        assert "has failed" in server.post(prompt="abc").json()["error"]["message"]
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert server.post(prompt="abc").status_code == 503
    finally:
        server.stop()


def test_sigterm_lets_a_request_finish(run, compiled, tmp_path):
    arguments = [run, "--engine=loop", "--max-requests=4", "--api-key=secret"]
    server = Server(arguments, compiled, 1, tmp_path / "log", free_port())
    try:
        server.ready()
        request = {"prompt": "abc", "max_tokens": 200, "ignore_eos": True, "stream": True}
        assert httpx.post(f"{server.url}/v1/completions", json=request).status_code == 401
        headers = {"Authorization": "Bearer secret"}
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=request, headers=headers, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason": "length"' in rest[-2]
        assert server.process.wait(30) == 0
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--engine=loop", "--page-size=16"], "--page-size is no option of --engine loop"),
        (["--engine=loop", "--", "--schedule-policy", "lpm"], "is for sglang-jax"),
        (["--engine=sglang", "--max-waiting=3"], "--max-waiting is no option of --engine sglang"),
    ],
)
def test_options_of_the_other_engine_are_refused(run, given, message, capsys, monkeypatch):
    monkeypatch.setattr(serve, "_devices", lambda several: ("cpu", 1))
    with pytest.raises(SystemExit):
        serve.main([run, *given])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_benchmark_measures_this_engine(compiled, tmp_path, repository):
    sizes = ["--config", "tiny", "--layers", "1", "--prompt", "16", "--new", "12", "--requests", "1", "2"]
    where = ["--compiled", str(compiled / "serving"), "--out", str(tmp_path / "rates")]
    how = ["--engine", "loop", "--parts", "requests"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "benchmarks.serving", *sizes, *how, *where]
    subprocess.run(command, check=True, cwd=repository, env=environment, timeout=300)
    rows = json.loads((tmp_path / "rates.json").read_text())["rows"]
    assert [(row["engine"], row["requests"]) for row in rows] == [("loop", 1), ("loop", 2)]
    assert all(row["tokens/s"] > 0 for row in rows)
