"""`mlra-serve CHECKPOINT_OR_DIR`: an HTTP server with OpenAI's API, on sglang-jax or on our own loop."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import ipaddress
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from mlra_jax.checkpoints import find_step, load_config
from mlra_jax.cli import command
from mlra_jax.config import (
    OPTION,
    ConfigError,
    MeshConfig,
    NotNegative,
    Positive,
    PositiveFloat,
    Range,
    TrainConfig,
    Validated,
)
from mlra_jax.distributed import DistributedConfig, take_args
from mlra_jax.errors import UserError
from mlra_jax.execution.compilation_cache import keep_compiled
from mlra_jax.generation.load import ONE_DEVICE, splits_heads
from mlra_jax.serving.huggingface import check_served, describe, is_exported, open_exported
from mlra_jax.sharding import check_decode_layout

SPARE = 6
"""Tokens by which the engine's own limit on a request is below its context."""


@dataclasses.dataclass(frozen=True)
class ServeArgs(Validated):
    """Serves a model over HTTP with OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics.

    The engine is sglang-jax (docs/serving.md says how to install it) or, on GPUs, this package's own. On several hosts,
    run the same command on each with --distributed.coordinator HOST:PORT, --distributed.processes N and
    --distributed.process_id I; the first one answers. sglang-jax's own options follow after `--`:
    mlra-serve runs/tiny --engine sglang -- --schedule-policy lpm
    """

    at: ClassVar[str] = OPTION
    model: tyro.conf.Positional[str]
    """A run's folder (or bucket URL), one of its checkpoints, or a folder that mlra-export wrote."""
    step: NotNegative | None = None
    """Step of the checkpoint; None: the latest."""
    engine: Literal["auto", "loop", "sglang"] = "auto"
    """What runs the requests. loop: this package's batch, whose rows are refilled, in one process; sglang: sglang-jax;
    auto: loop on the GPUs of one host, else sglang."""
    mesh: MeshConfig = ONE_DEVICE
    """Device mesh. tensor splits the weights and the cache's latent heads, data the requests."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all of this machine's, for which an API key is advisable."""
    port: Annotated[int, Range(ge=1, le=65535)] = 8000
    """Port to listen on."""
    api_key: str = ""
    """What clients must send as `Authorization: Bearer KEY`; empty: the environment's MLRA_API_KEY, or else nothing."""
    name: str = ""
    """Name of the model for clients; empty: that of its folder."""
    tokenizer: str = ""
    """Tokenizer of a checkpoint's model (see data.tokenizer); empty: the one that the run was trained with."""
    max_len: NotNegative = 0
    """Tokens of a prompt and its completion; 0: the length of the training sequences, or what the folder says."""
    max_requests: NotNegative = 0
    """Requests that run at the same time, others wait; 0: 16 on CPUs, else 128."""
    max_waiting: NotNegative = 0
    """loop: completions that may wait, more are refused with 503; 0: 8 for each of max_requests, at least 64."""
    pool_tokens: NotNegative = 0
    """sglang: tokens that the cache holds, of all requests and of prefixes that may come again; 0: what fits into
    the memory, but on CPUs no more than max_requests times max_len."""
    memory_fraction: Annotated[float, Range(gt=0, le=0.98)] = 0.85
    """sglang: fraction of an accelerator's memory for weights and cache; the rest is for a step's temporary arrays."""
    page_size: NotNegative = 0
    """sglang: tokens per page, a power of two; 0: 16 on CPUs, 64 on GPUs, 128 on TPUs. Prefixes are shared in
    whole pages."""
    prefill_chunk: NotNegative = 0
    """sglang: tokens of prompts that a step takes; 0: 256 on CPUs, else 2048. Prompts that are longer take
    several steps."""
    overlap: Literal["auto", "yes", "no"] = "auto"
    """sglang: prepare a step on the host while the one before runs; auto: except on CPUs."""
    precompile: Literal["auto", "yes", "no"] = "auto"
    """Compile all batch sizes before the first request; auto: except on CPUs, where each is compiled when it comes."""
    max_body_mb: PositiveFloat = 4.0
    """Size in MB (10^6 bytes) above which a request is refused."""
    shutdown_seconds: Positive = 30
    """How long running requests may go on after SIGTERM or Ctrl-C; a second Ctrl-C ends them at once."""
    compilation_cache: str | None = None
    """Folder for XLA's persistent compilation cache, empty: none; default: the run's own setting."""

    def conflicts(self) -> list[str]:
        faults = []
        if self.mesh.fsdp != 1 or self.mesh.context != 1:
            faults.append(
                "mesh.fsdp and mesh.context must be 1 for serving; use --mesh.tensor and --mesh.data."
            )
        if self.page_size & (self.page_size - 1):
            faults.append(f"--page-size {self.page_size} must be a power of two.")
        if self.page_size and self.prefill_chunk % self.page_size:
            faults.append(
                f"--prefill-chunk {self.prefill_chunk} must be a multiple of --page-size {self.page_size}."
            )
        return faults

    def faults_of(self, engine: str, of_other: Sequence[str]) -> list[str]:
        """Which options of the other engine are given."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return [
            f"--{name.replace('_', '-')} is no option of --engine {engine}; leave it out, or choose the other one."
            for name in of_other
            if getattr(self, name) != defaults[name]
        ]


OF_SGLANG = ("pool_tokens", "memory_fraction", "page_size", "prefill_chunk", "overlap")
OF_LOOP = ("max_waiting",)


def _devices(several_hosts: bool) -> tuple[str, int]:
    """The platform of JAX's devices, and their number, as another process sees them: this one must hold none."""
    if several_hosts:  # which JAX would wait for
        return os.environ.get("JAX_PLATFORMS") or ("gpu" if Path("/dev/nvidiactl").exists() else "tpu"), 0
    code = "import jax; print(jax.devices()[0].platform, len(jax.devices()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise ConfigError(f"JAX finds no device here: {lines[-1]}")
    platform, count = result.stdout.split()[-2:]
    return platform, int(count)


def _mesh(args: ServeArgs, platform: str, count: int) -> MeshConfig:
    """The mesh, whose sizes multiply to at most `count` devices (0: unknown)."""
    sizes = args.mesh
    if -1 in dataclasses.astuple(sizes):
        if not count:
            raise ConfigError("Give the size of every mesh axis on several hosts, not -1.")
        return sizes.resolve(count)
    n = math.prod(dataclasses.astuple(sizes))
    if count and n > count:
        hint = ""
        if platform == "cpu":
            hint = f"; simulate them with XLA_FLAGS=--xla_force_host_platform_device_count={n} in the environment"
        raise ConfigError(
            f"A mesh of data={sizes.data} x tensor={sizes.tensor} needs {n} devices; JAX sees {count} "
            f"({platform}){hint}."
        )
    return sizes


def _engine(args: ServeArgs, platform: str, several_hosts: bool, of_engine: Sequence[str]) -> str:
    """Which engine runs: that it is installed, and the options that are given are its own, is checked."""
    gpu = platform in ("gpu", "cuda", "rocm")
    engine = args.engine
    if engine == "auto":
        engine = "loop" if gpu and not several_hosts else "sglang"
    if faults := args.faults_of(engine, OF_SGLANG if engine == "loop" else OF_LOOP):
        raise ConfigError(faults)
    if engine == "loop" and several_hosts:
        raise ConfigError("The engine loop runs in one process; on several hosts use --engine sglang.")
    if engine == "loop" and of_engine:
        raise ConfigError(
            f"What follows after `--` ({of_engine[0]} ...) is for sglang-jax; leave it out, or use --engine sglang."
        )
    if engine == "sglang" and importlib.util.find_spec("sgl_jax") is None:
        raise UserError(
            "sglang-jax is not installed (docs/serving.md says how, for Python 3.12 or later); install it, or use "
            "--engine loop."
        )
    if engine == "loop" and any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn")):
        raise UserError("mlra-serve needs Starlette and Uvicorn: pip install 'mlra_jax[serve]'.")
    return engine


def _name(args: ServeArgs) -> str:
    """What clients call the model."""
    return args.name or Path(args.model).expanduser().absolute().name


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def engine_options(
    args: ServeArgs, folder: str, mesh: MeshConfig, platform: str, count: int, max_len: int
) -> list[str]:
    """The engine's command line, without what the user adds.

    Args:
      args: ours.
      folder: with the model's description.
      mesh: sizes of all axes.
      platform: of the devices.
      count: of the devices; 0: unknown.
      max_len: tokens of a prompt and its completion.
    """
    cpu = platform == "cpu"
    n = mesh.data * mesh.tensor
    page = args.page_size or {"cpu": 16, "tpu": 128}.get(platform, 64)
    chunk = args.prefill_chunk or (256 if cpu else 2048)
    requests = args.max_requests or (16 if cpu else 128)
    chunk = max(page, chunk // page * page)
    options: dict[str, Any] = {
        "model-path": folder,
        "served-model-name": _name(args),
        "device": platform,
        "tp-size": n,
        "dp-size": mesh.data,
        "host": args.host,
        "port": args.port,
        "context-length": max_len + SPARE,
        "json-model-override-args": json.dumps({"max_position_embeddings": max_len + SPARE}),
        "page-size": page,
        "chunked-prefill-size": chunk,
        "max-prefill-tokens": chunk,
        "max-running-requests": max(requests // mesh.data, 1) * mesh.data,
        "attention-backend": "native",  # the others prepare arrays for kernels that are not called
        "grammar-backend": "none",
        "log-level": "error",
    }
    # A page for each request's last tokens; the engine's own limit is below the pool by as much as SPARE.
    of_requests = requests * -(-(max_len + SPARE + 1) // page) * page
    if tokens := args.pool_tokens or (of_requests if cpu else 0):
        options["max-total-tokens"] = tokens
    if not cpu:
        options["mem-fraction-static"] = args.memory_fraction
    flags = ["skip-server-warmup", "enable-deterministic-sampling", "enable-cache-report"]
    if args.overlap == "no" or (args.overlap == "auto" and cpu):
        flags.append("disable-overlap-schedule")
    if args.precompile == "no" or (args.precompile == "auto" and cpu):
        flags.append("disable-precompile")
    line = [f"--{name}={value}" for name, value in options.items()] + [f"--{flag}" for flag in flags]
    if count > n:
        line += ["--device-indexes", *map(str, range(n))]
    return line


def _of_hosts(distributed: DistributedConfig) -> list[str]:
    """The engine's options for several hosts."""
    distributed.validate()
    if distributed.auto:
        raise ConfigError(
            "mlra-serve does not find other hosts itself: give --distributed.coordinator HOST:PORT, "
            "--distributed.processes N and --distributed.process_id I on each."
        )
    if not distributed.coordinator:
        return []
    return [
        f"--dist-init-addr={distributed.coordinator}",
        f"--nnodes={distributed.processes}",
        f"--node-rank={distributed.process_id}",
    ]


def _write_folder(files: dict[str, str], folder: str) -> str:
    for name, content in files.items():
        Path(folder, name).write_text(content, encoding="utf-8")
    return folder


@command
def main(argv: Sequence[str]) -> int:
    """Serves until it is told to stop; returns the exit status."""
    # Read when JAX is initialized, in a process that the engine starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the folder
    argv = list(argv)
    split = argv.index("--") if "--" in argv else len(argv)
    of_engine = argv[split + 1 :]
    distributed, argv = take_args(argv[:split])
    args = tyro.cli(ServeArgs, args=argv, prog="mlra-serve")
    args.validate()
    exported = is_exported(args.model)
    config: TrainConfig = open_exported(args.model).config if exported else load_config(args.model, args.step)
    if exported and (args.step is not None or args.tokenizer):
        raise ConfigError(
            f"--step and --tokenizer are for checkpoints; {args.model} was written by mlra-export."
        )
    of_hosts = _of_hosts(distributed)
    platform, count = _devices(bool(of_hosts))
    engine = _engine(args, platform, bool(of_hosts), of_engine)
    if engine == "sglang":
        check_served(config.model)
    mesh = _mesh(args, platform, count)
    if os.environ.get("JAX_PLATFORMS"):  # which the engine wants to be the device's name, and no list
        platform = "cuda" if platform == "gpu" else platform
        os.environ["JAX_PLATFORMS"] = platform
    check_decode_layout(config.model, mesh, splits_heads("auto", config.model, mesh.tensor, platform))
    if platform in ("gpu", "cuda"):
        # As for our own steps (`mlra_jax.generation.engine.compiler_options`); the engine passes no options on.
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_dot_merger_threshold_mb=0".strip()
    api_key = args.api_key or os.environ.get("MLRA_API_KEY", "")
    if not api_key and not _is_local(args.host):
        print(
            f"note: anyone who reaches {args.host}:{args.port} can use it; give --api-key.", file=sys.stderr
        )
    cache = config.compilation_cache if args.compilation_cache is None else args.compilation_cache
    max_len = args.max_len or config.data.seq_len
    if exported and not args.max_len:
        described = json.loads(Path(args.model, "config.json").expanduser().read_text(encoding="utf-8"))
        max_len = described["max_position_embeddings"]
    max_body = int(args.max_body_mb * 1e6)
    if engine == "loop":
        from mlra_jax.serving import loop_server

        keep_compiled(os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache)
        loop_server.serve(
            loop_server.load(args.model, mesh, step=args.step, tokenizer=args.tokenizer),
            name=_name(args),
            tokenizer=args.tokenizer,
            rows=args.max_requests or (16 if platform == "cpu" else 128),
            max_len=max_len,
            max_waiting=args.max_waiting,
            warm=args.precompile == "yes" or (args.precompile == "auto" and platform != "cpu"),
            host=args.host,
            port=args.port,
            api_key=api_key,
            max_body=max_body,
            shutdown_seconds=args.shutdown_seconds,
        )
        return 0
    if cache:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser(cache))

    with tempfile.TemporaryDirectory(prefix="mlra-serve-") as folder:
        if exported:
            folder = str(Path(args.model).expanduser().absolute())
        else:
            checkpoint = str(find_step(args.model, args.step))
            files = describe(config, tokenizer=args.tokenizer, max_len=max_len, checkpoint=checkpoint)
            _write_folder(files, folder)
        line = [*engine_options(args, folder, mesh, platform, count, max_len), *of_hosts, *of_engine]

        from sgl_jax.srt.server_args import ServerArgs

        from mlra_jax.serving.server import serve

        parser = argparse.ArgumentParser(prog="mlra-serve MODEL ... --", description="Options of sglang-jax.")
        ServerArgs.add_cli_args(parser)
        server_args = ServerArgs.from_cli_args(parser.parse_args(line))
        server_args.api_key = api_key
        serve(
            server_args,
            max_len=max_len,
            max_body=max_body,
            shutdown_seconds=args.shutdown_seconds,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
