"""`mlra-serve`: the tokens of `Generator`, whatever else is asked for, and no fault that outlives itself."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from mlra_jax.generation.generator import Generator
from tests.serving.conftest import (
    FOUR_DEVICES,
    LENGTH,
    SIZES,
    check_random_requests,
    free_port,
    random_params,
    write_run,
)

pytest.importorskip("sgl_jax")
import httpx


def prompts(n: int) -> list[list[int]]:
    """Token ids of 5 to 150 tokens; most begin with one of three others."""
    rng = np.random.default_rng(0)
    letters = lambda k: rng.integers(97, 123, k).tolist()
    prefixes = [[], letters(16), letters(50), letters(130)]
    return [prefixes[i % 4] + letters(5 + i % 16) for i in range(n)]


def check_equal_to_generator(server, run, asked):
    """All requests at once: each gets the tokens that `Generator` makes, by their text and probabilities."""
    request = {"temperature": 0, "ignore_eos": True, "logprobs": 1}
    ask = lambda prompt: server.post(prompt=prompt, max_tokens=10, **request)
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        answers = [answer.json()["choices"][0] for answer in pool.map(ask, asked)]
    expected = Generator.from_checkpoint(run).complete(asked, max_new_tokens=10, ignore_eos=True, logprobs=1)
    for answer, completion in zip(answers, expected, strict=True):
        if 256 not in completion.tokens:  # the end of text, which the engine leaves out
            assert answer["text"] == completion.text
        np.testing.assert_allclose(answer["logprobs"]["token_logprobs"], completion.logprobs, atol=2e-3)


def test_requests_get_the_tokens_of_the_generator(server, run):
    check_equal_to_generator(server, run, prompts(40))
    assert server.metric("cached_tokens_total") > 500
    assert server.is_idle()


@pytest.mark.slow
def test_two_processes_of_two_devices_serve_as_one(start_server, run):
    arguments = [run, *FOUR_DEVICES]
    hosts = [f"--distributed.coordinator=127.0.0.1:{free_port()}", "--distributed.processes=2"]
    first = start_server(*arguments, *hosts, "--distributed.process_id=0", devices=2)
    start_server(*arguments, *hosts, "--distributed.process_id=1", devices=2)
    check_equal_to_generator(first.ready(), run, prompts(8))


@pytest.mark.slow
def test_data_parallel_devices_have_pages_of_their_own(start_server, run):
    server = start_server(run, "--mesh.tensor=2", "--mesh.data=2", *SIZES, devices=4)
    check_equal_to_generator(server.ready(), run, prompts(8))


def test_each_request_is_sampled_in_its_own_way(server):
    greedy = {"prompt": "once", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    sampled = {**greedy, "temperature": 1.0, "seed": 5, "min_p": 0.001, "top_k": 50}
    requests = [greedy, sampled, sampled, {**sampled, "seed": 6}, greedy, {**sampled, "n": 2}]
    with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda request: server.post(**request).json()["choices"], requests))
    texts = [[choice["text"] for choice in choices] for choices in answers]
    assert texts[0] == texts[4]
    assert texts[1] == texts[2] == texts[5][:1]
    assert len({texts[0][0], texts[3][0], *texts[5]}) == 4


def test_requests_with_log_probabilities_share_batches_with_others(server):
    ask = lambda i: server.post(
        prompt=[i], max_tokens=1 + 5 * i % 13, logprobs=i % 3 or None, ignore_eos=True
    )
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = [answer.json()["choices"][0] for answer in pool.map(ask, range(48))]
    for i, answer in enumerate(answers):
        numbers = answer["logprobs"] and answer["logprobs"]["token_logprobs"]
        assert numbers is None if i % 3 == 0 else len(numbers) == 1 + 5 * i % 13


def test_text_streams_and_ends_where_it_is_told_to(server):
    request = {"prompt": "abc", "max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    whole = server.post(**request).json()["choices"][0]
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**request, "stream": True}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines]
    assert len(choices) > 6
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    numbers = [x for choice in choices for x in choice["logprobs"]["token_logprobs"]]
    assert numbers == whole["logprobs"]["token_logprobs"]
    assert choices[-1]["finish_reason"] == whole["finish_reason"] == "length"

    stop = next(c for c in whole["text"][2:] if c != "\N{REPLACEMENT CHARACTER}")
    stopped = server.post(**{**request, "stop": [stop]}).json()["choices"][0]
    assert stopped["text"] == whole["text"][: whole["text"].index(stop)]
    assert stopped["finish_reason"] == "stop"


def test_what_does_not_fit_or_is_not_text_is_refused_with_numbers(server):
    def refusal(content=None, **request):
        arguments = {"content": content} if content is not None else {"json": request}
        headers = {"Content-Type": "application/json"}
        return httpx.post(f"{server.url}/v1/completions", headers=headers, timeout=60, **arguments)

    too_long = refusal(prompt="x" * 300)
    assert too_long.status_code == 400
    assert "300 tokens" in too_long.json()["error"]["message"]
    assert "the context has 256" in too_long.json()["error"]["message"]
    together = refusal(prompt="x" * 200, max_tokens=100).json()["error"]["message"]
    assert "max_tokens=100 are 300" in together
    assert refusal(b"x" * 200_000).status_code == 413
    assert "UTF-8" in refusal(b'{"prompt": "\xff"}').json()["error"]["message"]
    assert "JSON" in refusal(b'{"prompt": ').json()["error"]["message"]
    chat = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "Hello"}])
    assert "no chat template" in chat.json()["error"]["message"]
    assert httpx.post(f"{server.url}/set_internal_state", json={}).status_code == 404
    card = httpx.get(f"{server.url}/v1/models").json()["data"][0]
    assert (card["id"], card["max_model_len"]) == ("tiny", LENGTH)


def test_requests_that_do_not_fit_into_the_pool_wait(server):
    request = {"temperature": 0, "ignore_eos": True, "max_tokens": 200}
    ask = lambda i: server.post(prompt=[i] * 50, **request)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    assert all(answer.json()["usage"]["completion_tokens"] == 200 for answer in answers)
    assert server.becomes_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_pages(server, stream):
    before = server.metric("generated_tokens_total")
    request = {"prompt": "abc", "max_tokens": 250, "n": 2, "ignore_eos": True, "stream": stream}
    if stream:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=request, timeout=60) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=request, timeout=0.3)
    assert server.becomes_idle()
    assert server.metric("generated_tokens_total") - before < 400


def test_random_requests_leave_nothing_behind(server):
    check_random_requests(server, 150)


@pytest.mark.slow
def test_two_thousand_random_requests_leave_nothing_behind(server):
    check_random_requests(server, 2_000)


@pytest.mark.slow
def test_logits_that_are_no_numbers_end_the_request_with_an_error(start_server, tmp_path):
    params = random_params()
    params["final_norm"]["gain"] = np.full_like(params["final_norm"]["gain"], np.nan)
    server = start_server(write_run(tmp_path / "broken", params), *SIZES).ready()
    answer = server.post(prompt="abc", max_tokens=1)
    assert answer.status_code == 500
    assert "NaN or infinite" in answer.json()["message"]
    assert "NaN or infinite" in server.post(prompt="abc", max_tokens=5, stream=True).text
    assert server.becomes_idle()


def test_sigterm_lets_a_request_finish_and_leaves_nothing(start_server, run, tmp_path):
    server = start_server(run, *FOUR_DEVICES, "--api-key=secret", devices=4).ready()
    request = {"prompt": "abc", "max_tokens": 100, "ignore_eos": True, "stream": True}
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
    assert server.process.wait(30) == 0
    assert not list(tmp_path.glob("mlra-serve-*"))


@pytest.mark.slow
def test_the_benchmark_measures_the_server_and_the_generator(compiled, tmp_path, repository):
    sizes = [
        "--config",
        "tiny",
        "--layers",
        "1",
        "--prompt",
        "16",
        "--new",
        "4",
        "--shared",
        "32",
        "--page",
        "16",
    ]
    how = [
        "--requests",
        "1",
        "2",
        "--tensor",
        "1",
        "--overlap",
        "no",
        "--parts",
        "requests",
        "prefix",
        "generator",
    ]
    where = ["--compiled", str(compiled / "serving"), "--out", str(tmp_path / "rates")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "benchmarks.serving", *sizes, *how, *where]
    subprocess.run(command, check=True, cwd=repository, env=environment, timeout=500)
    rows = json.loads((tmp_path / "rates.json").read_text())["rows"]
    assert [row["requests"] for row in rows if "requests" in row] == [1, 2, 1, 2]
    assert all(row.get("tokens/s", 1) > 0 for row in rows)
    assert next(row for row in rows if "shared tokens" in row)["second"] > 0
