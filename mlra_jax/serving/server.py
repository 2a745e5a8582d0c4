"""sglang-jax's server behind our gate: what `mlra-serve` runs. The engine is imported here and in `sglang` alone."""

from __future__ import annotations

import asyncio
import copy
import itertools
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import uvicorn
from sgl_jax.srt.entrypoints import engine, http_server
from sgl_jax.srt.managers.tokenizer_manager import TokenizerManager, print_exception_wrapper
from sgl_jax.srt.server_args import ServerArgs
from sgl_jax.srt.utils import kill_process_tree

from mlra_jax.serving.gate import Counts, Gate, requests_of_client
from mlra_jax.serving.sglang import NOT_FINITE_MESSAGE, register

SEED_STEP = 0x3C6EF35F
"""Between the seeds of a request's samples."""


class Requests(TokenizerManager):
    """The engine's door for requests, with seeds, counts, and an end for every one of them."""

    counts: Counts
    no_create_loop: bool

    def auto_create_handle_loop(self) -> None:
        """As the engine's, but SIGTERM is uvicorn's, which waits for what runs and for no longer than it is told."""
        if not self.no_create_loop:
            self.no_create_loop = True
            self.asyncio_tasks.add(
                asyncio.get_running_loop().create_task(print_exception_wrapper(self.handle_loop))
            )

    def _send_one_request(self, obj: Any, tokenized_obj: Any, created_time: float | None = None) -> Any:
        params = tokenized_obj.sampling_params
        if params.max_new_tokens > 0:  # else it caches the prompt, of which samples come after
            # The copies of a request for several samples share the counter.
            number = next(params.__dict__.setdefault("sample_numbers", itertools.count()))
            seed = secrets.randbelow(2**31) if params.sampling_seed is None else params.sampling_seed
            tokenized_obj.sampling_params = own = copy.copy(params)
            del own.sample_numbers
            own.sampling_seed = (seed + SEED_STEP * number) % 2**31
        if (of_client := requests_of_client.get()) is not None:
            of_client.append(obj.rid)
        return super()._send_one_request(obj, tokenized_obj, created_time)

    async def _wait_one_response(
        self, obj: Any, state: Any, request: Any = None
    ) -> AsyncIterator[dict[str, Any]]:
        async for out in super()._wait_one_response(obj, state, request):
            reason = out["meta_info"].get("finish_reason")
            if reason and reason["type"] == "abort" and reason.get("message") == NOT_FINITE_MESSAGE:
                raise RuntimeError(NOT_FINITE_MESSAGE)  # a ValueError would be the client's fault
            # The engine leaves it out if there are none, and then misses it.
            out["meta_info"].setdefault("output_top_logprobs", [])
            yield out

    def _handle_batch_output(self, recv_obj: Any) -> None:
        for i, rid in enumerate(recv_obj.rids):
            if (state := self.rid_to_state.get(rid)) is not None:
                self._count(state, recv_obj, i)
        super()._handle_batch_output(recv_obj)

    def _count(self, state: Any, recv_obj: Any, i: int) -> None:
        now, seen = time.time(), getattr(state, "tokens_seen", 0)
        if (new := recv_obj.completion_tokens[i] - seen) <= 0:
            return
        if seen == 0:
            self.counts.totals["prompt_tokens"] += recv_obj.prompt_tokens[i]
            self.counts.totals["cached_tokens"] += recv_obj.cached_tokens[i]
            self.counts.observe("time_to_first_token", now - state.created_time)
        else:
            self.counts.observe("time_per_token", (now - state.seen_at) / new, new)
        self.counts.totals["generated_tokens"] += new
        state.tokens_seen, state.seen_at = seen + new, now

    def _handle_abort_req(self, recv_obj: Any) -> None:
        # The engine's own fails on a request that it does not know any more, and never forgets one that it does.
        if recv_obj.rid in self.rid_to_state:
            super()._handle_abort_req(recv_obj)
            self.rid_to_state.pop(recv_obj.rid, None)


class Served:
    """The model as the gate sees it."""

    def __init__(self, name: str, max_len: int, requests: Requests, capacity: int):
        self.name, self.max_len, self.capacity = name, max_len, capacity
        self._requests, self._tokenizer = requests, requests.tokenizer
        self.n_tokens: int = requests.model_config.hf_config.n_tokens
        self.end_of_text: int = self._tokenizer.eos_token_id
        self.abort = requests.abort_request

    def encode(self, text: str) -> list[int]:
        """See `gate.Model`."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int] | None:
        """See `gate.Model`."""
        if not self._tokenizer.chat_template:
            return None
        return self._tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)

    async def state(self) -> Mapping[str, float]:
        """See `gate.Model`."""
        (engine_state,) = await self._requests.get_internal_state()
        cached, free = engine_state["tree_cache_size"], sum(engine_state["available_kv_tokens_per_dp"])
        return {
            "requests_running": engine_state["running_batch_size"],
            "requests_waiting": engine_state["waiting_queue_size"],
            "pool_tokens": self.capacity,
            "pool_tokens_free": free,
            "pool_tokens_of_prefixes": cached,
        }


def _sampling_params_with_seed(build: Any) -> Any:
    """The engine's translation of a request, which forgets its seed."""

    def build_with_seed(self: Any, request: Any, *args: Any) -> dict[str, Any]:
        return {**build(self, request, *args), "sampling_seed": request.seed}

    return build_with_seed


def serve(server_args: ServerArgs, *, max_len: int, max_body: int, shutdown_seconds: float) -> None:
    """Runs the engine and its server until SIGTERM or SIGINT; then what runs may finish, for a while.

    On hosts other than the first it runs the engine's part alone.

    Args:
      server_args: the engine's options.
      max_len: tokens of a prompt and its completion.
      max_body: bytes of a request.
      shutdown_seconds: how long requests may go on after a signal.
    """
    register()
    engine.TokenizerManager = Requests
    requests, templates, info = engine._launch_subprocesses_or_threads(server_args=server_args)
    try:
        # A single request fits into the pool, or it would wait for ever.
        max_len = min(max_len, info["max_req_input_len"])
        requests.counts = Counts()
        name = server_args.served_model_name
        served = Served(name, max_len, requests, info["max_total_num_tokens"])
        http_server.set_global_state(http_server._GlobalState(requests, templates, info))
        for handler in (http_server.OpenAIServingCompletion, http_server.OpenAIServingChat):
            handler._build_sampling_params = _sampling_params_with_seed(handler._build_sampling_params)
        http_server.app.server_args = server_args
        gate = Gate(
            http_server.app, served, requests.counts, api_key=server_args.api_key or "", max_body=max_body
        )
        print(
            f"{name}: http://{server_args.host}:{server_args.port}/v1 (contexts of {max_len:,} tokens, "
            f"{served.capacity:,} in all requests together)",
            flush=True,
        )
        _run(gate, server_args, shutdown_seconds)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _run(app: Any, server_args: ServerArgs, shutdown_seconds: float) -> None:
    config = uvicorn.Config(
        app,
        host=server_args.host,
        port=server_args.port,
        log_level="warning",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=max(1, round(shutdown_seconds)),
        loop="uvloop",
    )
    # uvicorn repeats the signal that has stopped it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run()
