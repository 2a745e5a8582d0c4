"""Tokens per second, time to first token and between tokens of `mlra-serve`, against the ideal and `Generator`.

    python -m benchmarks.serving                                   # the paper's 2.9 B MLRA-4 on one GPU
    python -m benchmarks.serving --tensor 2 --parts requests       # on two
    python -m benchmarks.serving --config tiny --prompt 64 --new 16 --requests 1 4 --shared 256   # on a CPU

The server runs in processes of its own, with random weights in the model's compute type, and is asked over HTTP by
clients that stream, all at once; prompts are random and have nothing in common. Each number of requests is asked twice,
and the second time counts. *Tokens/s* are those after the first of each request, from the first token of all to the
last of all. Parts:

    requests    with overlap scheduling and without
    prefix      a prompt with a long beginning, then another with the same one
    generator   `Generator` with a static batch of as many rows, compiled loops

Ideal: the weights and the tokens that are cached, on average, are read once a step.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

PARTS = ("requests", "prefix", "generator")


# The server, in processes of its own.


def random_load(folder: str, rules: Any, mesh: Any) -> Any:
    """In place of `mlra_jax.serving.huggingface.load`: random values."""
    import jax

    from benchmarks.decode_step import random_model
    from mlra_jax.serving.huggingface import open_exported

    config = open_exported(folder).config.model
    with jax.set_mesh(mesh):
        return random_model(dataclasses.replace(config, param_dtype=config.compute_dtype), rules)


def run_scheduler(*args: Any) -> None:
    """The engine's process that holds the model."""
    from mlra_jax.serving import sglang

    sglang.load = random_load
    sglang.run_scheduler(*args)


def serve(arguments: Sequence[str]) -> int:
    """`mlra-serve` with random weights."""
    import mlra_jax.serving.server as http
    from benchmarks import serving  # by its name, by which the engine's processes find it
    from mlra_jax.cli import serve

    def register() -> None:
        http_register()
        http.engine.run_scheduler_process = serving.run_scheduler

    http_register, http.register = http.register, register
    return serve.main(list(arguments)) or 0


@contextlib.contextmanager
def server(
    args: argparse.Namespace, folder: str, max_len: int, requests: int, overlap: bool
) -> Iterator[int]:
    """The port of a server, once it answers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    chunk = min(2048, max(256, args.prompt))
    options = {
        "mesh.tensor": args.tensor,
        "port": port,
        "max-len": max_len,
        "max-requests": requests,
        "prefill-chunk": chunk,
        "overlap": "yes" if overlap else "no",
        "precompile": "yes",
        "compilation-cache": args.compiled,
    }
    if args.page:
        options["page-size"] = args.page
    buckets = sorted({n for n in args.requests if n < requests} | {requests})
    line = [folder, *(f"--{name}={value}" for name, value in options.items())]
    line += ["--", "--precompile-bs-paddings", *map(str, buckets)]
    line += ["--precompile-token-paddings", str(chunk)]
    environment = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.serving", "--serve", *line], env=environment
    )
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None:
                    raise SystemExit("The server did not start.") from None
                time.sleep(0.5)
        print(f"server ready after {time.perf_counter() - start:.0f} s", flush=True)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


# Its clients.


@dataclasses.dataclass
class Answer:
    """When a request was sent, and when each piece of its answer came."""

    sent: float
    pieces: list[float]


async def ask(port: int, prompt: list[int], new: int) -> Answer:
    """Streams one completion; a piece may have several tokens, where the client is late."""
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True}
    text = json.dumps(body)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    answer = Answer(time.perf_counter(), [])
    writer.write(
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(text)}\r\n\r\n{text}".encode()
    )
    assert b" 200 " in await reader.readline()
    async for line in reader:
        if line.startswith(b"data: {"):
            if b'"error"' in line:
                raise SystemExit(line.decode())
            answer.pieces.append(time.perf_counter())
        elif line.startswith(b"data: [DONE]"):
            break
    writer.close()
    return answer


async def ask_all(port: int, prompts: Sequence[list[int]], new: int) -> list[Answer]:
    """Streams completions of all prompts at once."""
    return await asyncio.gather(*(ask(port, prompt, new) for prompt in prompts))


def rates(answers: Sequence[Answer], new: int) -> dict[str, float]:
    """Of requests that were asked at once: in tokens per second and seconds."""
    first = [answer.pieces[0] - answer.sent for answer in answers]
    between = [(b - a) for answer in answers for a, b in zip(answer.pieces, answer.pieces[1:], strict=False)]
    decoding = max(a.pieces[-1] for a in answers) - min(a.pieces[0] for a in answers)
    whole = max(a.pieces[-1] for a in answers) - min(a.sent for a in answers)
    quantile = lambda q: float(np.quantile(between, q)) if between else 0.0
    return {
        "tokens/s": len(answers) * (new - 1) / decoding if decoding else 0.0,
        "tokens/s with prompts": len(answers) * new / whole,
        "first token, median": statistics.median(first),
        "first token, last": max(first),
        "between tokens, p50": quantile(0.5),
        "between tokens, p99": quantile(0.99),
    }


def prompts(n: int, length: int, seed: int) -> list[list[int]]:
    """Random bytes."""
    return np.random.default_rng(seed).integers(0, 256, (n, length)).tolist()


def measure_requests(args: argparse.Namespace, folder: str, overlap: bool) -> list[dict[str, Any]]:
    """A row for each number of requests."""
    rows = []
    with server(args, folder, args.prompt + args.new, max(args.requests), overlap) as port:
        for n in args.requests:
            for turn in range(2):
                answers = asyncio.run(ask_all(port, prompts(n, args.prompt, 1000 * n + turn), args.new))
            rows.append(
                {"engine": f"overlap {'on' if overlap else 'off'}", "requests": n, **rates(answers, args.new)}
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def measure_prefix(args: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """Seconds to the first token of two prompts with the same beginning."""
    max_len = args.shared + 128
    with server(args, folder, max_len, min(args.requests), args.overlap) as port:
        rows = []
        for turn in range(2):
            [shared] = prompts(1, args.shared, turn)
            ends = prompts(2, 64, 10 + turn)
            asked = [asyncio.run(ask_all(port, [shared + end], 8))[0] for end in ends]
            first, second = (answer.pieces[0] - answer.sent for answer in asked)
            rows = [{"shared tokens": args.shared, "first": first, "second": second, "ratio": second / first}]
        print(json.dumps(rows[0]), flush=True)
    return rows


def measure_generator(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The same with `Generator`, and the ideal."""
    import jax

    from benchmarks.decode_step import random_model
    from mlra_jax.attention.kv_cache import values_per_token
    from mlra_jax.cli.configs import load_config
    from mlra_jax.config import MeshConfig
    from mlra_jax.data.tokenizers import ByteTokenizer
    from mlra_jax.execution.accelerators import find_accelerator
    from mlra_jax.generation.engine import Engine
    from mlra_jax.generation.generator import Generator
    from mlra_jax.sharding import make_mesh

    config = model_config(load_config(args.config).model, args)
    config = dataclasses.replace(config, param_dtype=config.compute_dtype)
    mesh = make_mesh(MeshConfig(1, 1, args.tensor, 1), jax.devices()[: args.tensor])
    with jax.set_mesh(mesh):
        model = random_model(config)
        generator = Generator(Engine(model, mesh, 257), ByteTokenizer())
    of_device = lambda x: x.addressable_shards[0].data.nbytes
    weights = sum(of_device(x) for x in jax.tree.leaves(model) if isinstance(x, jax.Array))
    of_token = (
        values_per_token(config, args.tensor) * config.n_layers * np.dtype(config.compute_dtype).itemsize
    )
    chip = find_accelerator(jax.devices()[0].device_kind)
    rows = []
    for n in args.requests:
        options = {"max_new_tokens": args.new, "ignore_eos": True, "batch_size": n}
        for turn in range(2):
            asked = prompts(n, args.prompt, 1000 * n + turn)
            every = [completion.stats for completion in generator.complete(asked, **options)]
        first = max(stats.seconds_to_first_token for stats in every)
        row = {
            "engine": "Generator",
            "requests": n,
            "tokens/s": n * (args.new - 1) / (max(stats.seconds for stats in every) - first),
            "first token, last": first,
        }
        if chip:
            step = (weights + n * (args.prompt + args.new / 2) * of_token) / chip.bandwidth
            row |= {"ideal tokens/s": n / step}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def model_config(config: Any, args: argparse.Namespace) -> Any:
    """The model that is measured."""
    return dataclasses.replace(config, n_layers=args.layers or config.n_layers)


def write_folder(args: argparse.Namespace, folder: str) -> None:
    """Describes the model to the server."""
    from mlra_jax.cli.configs import load_config
    from mlra_jax.config import DataConfig
    from mlra_jax.serving.huggingface import describe

    config = load_config(args.config)
    config = dataclasses.replace(
        config, model=model_config(config.model, args), data=DataConfig(tokenizer="byte")
    )
    for name, content in describe(config, checkpoint="random").items():
        pathlib.Path(folder, name).write_text(content)


def main() -> int:
    """Measures, prints, and writes results."""
    if sys.argv[1:2] == ["--serve"]:
        return serve(sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="mlra_4")
    parser.add_argument("--layers", type=int, default=0, help="0: the model's")
    parser.add_argument("--tensor", type=int, default=1, help="devices")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of a completion")
    parser.add_argument("--shared", type=int, default=16384, help="tokens of a beginning that comes again")
    parser.add_argument("--page", type=int, default=0, help="tokens of a page; 0: mlra-serve's choice")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--overlap", choices=("both", "yes", "no"), default="both", help="overlap scheduling")
    parser.add_argument("--compiled", default="", help="folder of compiled programs, which starts share")
    parser.add_argument("--out", type=pathlib.Path, help="stem of the files of results")
    args = parser.parse_args()
    overlaps = {"both": (True, False), "yes": (True,), "no": (False,)}[args.overlap]
    args.overlap = overlaps[0]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        args.compiled = args.compiled or f"{folder}/compiled"
        os.mkdir(model := f"{folder}/model")
        write_folder(args, model)
        if "requests" in args.parts:
            for overlap in overlaps:
                rows += measure_requests(args, model, overlap)
        if "prefix" in args.parts:
            rows += measure_prefix(args, model)
    if "generator" in args.parts:
        rows += measure_generator(args)
    if args.out:
        from benchmarks.records import Setting

        record = {**vars(Setting.here("benchmarks.serving", sys.argv[1:])), "rows": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
