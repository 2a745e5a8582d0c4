"""A model with random weights, and servers of it in processes of their own."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.checkpoints import save_params
from mlra_jax.config import DataConfig, ModelConfig, TrainConfig
from mlra_jax.model import Transformer

# Under this initialisation greedy text does not repeat itself.
MODEL = ModelConfig(
    vocab_size=264,
    n_layers=2,
    d_model=48,
    n_heads=8,
    d_ff=80,
    attention=LatentAttentionConfig(4, 4, q_lora_rank=20, kv_lora_rank=64, d_nope=16, d_rope=8),
    output_init="normal",
    init_std=0.4,
    compute_dtype="float32",
)
LENGTH = 256


def random_params() -> dict[str, Any]:
    """In the training layout, on the host."""
    model = jax.jit(lambda: Transformer(MODEL, rngs=nnx.Rngs(0)))()
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def write_run(folder: pathlib.Path, params: dict[str, Any]) -> str:
    """Saves a run with these parameters."""
    data = DataConfig(tokenizer="byte", seq_len=LENGTH)
    save_params(folder, params, TrainConfig(name="test", model=MODEL, data=data, compilation_cache=""))
    return str(folder)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a run with random parameters and byte tokens."""
    return write_run(tmp_path_factory.mktemp("served") / "tiny", random_params())


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """`mlra-serve` in a process of its own."""

    def __init__(
        self, arguments: Sequence[str], compiled: pathlib.Path, devices: int, log: pathlib.Path, port: int
    ):
        self.url, self.log = f"http://127.0.0.1:{port}", log
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
            "TMPDIR": str(log.parent),
        }
        command = [sys.executable, "-m", "mlra_jax.cli.serve", *arguments, f"--port={port}"]
        command.insert(4, f"--compilation-cache={compiled / 'serving'}")
        if "--" in command:  # what follows is the engine's
            command.insert(command.index("--"), command.pop())
        with open(log, "w") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def ready(self, path: str = "/health") -> Server:
        """Waits until it answers."""
        import httpx

        end = time.monotonic() + 400
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + path, timeout=30).status_code == 200:
                    return self
            time.sleep(0.2)
        raise AssertionError(f"The server did not start:\n{self.log.read_text()}")

    def post(self, path: str = "/v1/completions", **request: Any) -> Any:
        """The answer to a request."""
        import httpx

        return httpx.post(self.url + path, json=request, timeout=120)

    def metric(self, name: str) -> float:
        """One of the server's metrics."""
        import httpx

        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"mlra_{name} ")))

    def is_idle(self) -> bool:
        """Whether nothing runs, and every page is free or holds a prefix."""
        free, kept = self.metric("pool_tokens_free"), self.metric("pool_tokens_of_prefixes")
        active = self.metric("requests_running") + self.metric("requests_waiting")
        return active == 0 and free + kept == self.metric("pool_tokens")

    def becomes_idle(self, seconds: float = 30) -> bool:
        """Whether it is idle, soon."""
        end = time.monotonic() + seconds
        while not self.is_idle():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def stop(self) -> None:
        """Ends it, if it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


# One bucket of each kind is compiled; prompts of more than 64 tokens take several steps.
ENGINE = ("--", "--precompile-bs-paddings", "8", "--precompile-token-paddings", "64")
SIZES = ("--max-requests=8", "--page-size=16", "--prefill-chunk=64", "--pool-tokens=1056")
FOUR_DEVICES = ("--mesh.tensor=4", *SIZES)


@pytest.fixture
def start_server(compiled: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[Any]:
    """`start_server(*arguments, devices=1)`: not yet ready."""
    pytest.importorskip("sgl_jax")
    servers: list[Server] = []

    def start(*arguments: str, devices: int = 1, port: int = 0) -> Server:
        log = tmp_path / f"log{len(servers)}"
        servers.append(Server([*arguments, *ENGINE], compiled, devices, log, port or free_port()))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(run: str, compiled: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on four devices, whose pool holds four requests of the greatest length."""
    pytest.importorskip("sgl_jax")
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = [run, *FOUR_DEVICES, "--max-body-mb=0.1", *ENGINE]
    served = Server(arguments, compiled, 4, log, free_port())
    yield served.ready()
    served.stop()
