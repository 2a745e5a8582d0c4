"""vLLM's JAX back end on a CPU: whether its greedy tokens are those of `Generator`.

    python tests/serving/vllm_on_cpu.py --tensor 4             in this process
    python tests/serving/vllm_on_cpu.py --tensor 4 --http      through `vllm serve`

Run from the repository's root, in an environment with vLLM, tpu-inference and mlra_jax (docs/vllm.md). It makes a model
with random weights, exports it, lets `Generator` and vLLM complete 40 prompts that share prefixes, and prints a line
for each; the exit status says whether all tokens are equal. tpu-inference means TPUs, and needs five shims on a CPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import types
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

PROMPTS, NEW = 40, 12
PREFIXES = [
    "The quick brown fox jumps over the lazy dog; " * 2,
    "In the beginning was the word, and the word was long enough for several pages of sixteen tokens each, ",
    "To be",
    "",
]


class Answer(NamedTuple):
    """What an engine says to a prompt."""

    prompt: list[int]
    """Its ids."""
    tokens: list[int]
    """Of the completion."""
    cached: int
    """Tokens of the prompt that came from the prefix cache."""


Complete = Callable[[Sequence[str]], list[Answer]]


def prompts() -> list[str]:
    """40 texts of 3 to 120 bytes; each ten begin alike."""
    tails = [
        "a",
        "and a tail",
        "or another one",
        "é漢",
        "12345",
        "!",
        "the end of it all",
        "x" * 15,
        "--",
        "so",
    ]
    return [prefix + tail + str(i) for i, prefix in enumerate(PREFIXES) for tail in tails]


def apply_shims() -> None:
    """Lets tpu-inference 0.32.0 run on a CPU; call it before vLLM is imported. On a TPU none of them is needed."""
    # vLLM takes its JAX back end only where `import libtpu` works: else "Device string must not be empty".
    sys.modules.setdefault("libtpu", types.ModuleType("libtpu"))
    # The CPU's compiler refuses options of the TPU's: "No such compile option: 'xla_tpu_...'". Others import these two
    # functions by name, so they are replaced before that.
    from tpu_inference.models.common import compiler_options

    compiler_options.get_step_fn_compiler_options = dict  # which gives {}
    compiler_options.get_sampling_compiler_options = dict
    from tpu_inference import utils

    # CPU devices do not say how much memory they have, from which the size of the cache follows ("Expected TPU
    # devices").
    utils.hbm_usage_bytes = lambda devices: [(0, 4 * 2**30) for _ in devices]
    # A CPU's array may be the NumPy array itself, which the engine overwrites for the next step while one runs.
    put = utils.general_device_put
    utils.general_device_put = lambda tree, *args, **kwargs: put(copied(tree), *args, **kwargs)


def copied(tree: Any) -> Any:
    """A tree whose NumPy arrays are others' no more."""
    import jax
    import numpy as np

    return jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, tree)


def make_run(folder: str) -> None:
    """A checkpoint with random weights, under which greedy text does not repeat itself."""
    import jax
    from flax import nnx

    from mlra_jax.attention.latent import LatentAttentionConfig
    from mlra_jax.checkpoints import save_params
    from mlra_jax.config import DataConfig, ModelConfig, TrainConfig
    from mlra_jax.model import Transformer

    model = ModelConfig(
        vocab_size=384,
        n_layers=3,
        d_model=192,
        n_heads=8,
        d_ff=512,
        attention=LatentAttentionConfig(q_lora_rank=96, kv_lora_rank=128, d_nope=32, d_rope=16),
        output_init="normal",
        init_std=0.15,
        compute_dtype="float32",
    )
    config = TrainConfig(model=model, data=DataConfig(tokenizer="byte", seq_len=512))
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(Transformer(model, rngs=nnx.Rngs(0)), nnx.Param)))()
    save_params(folder, params, config)


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Of the engine."""
    n_devices = args.tensor * args.data
    return {
        "dtype": "float32",
        "tensor_parallel_size": args.tensor,
        "data_parallel_size": args.data,
        # On a TPU the devices are found without this.
        "additional_config": {"sharding": {"sharding_strategy": {"device_indexes": list(range(n_devices))}}},
        "block_size": 16,
        "num_gpu_blocks_override": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,  # so that prompts of more tokens come in chunks
    }


@contextlib.contextmanager
def in_process(model: str, args: argparse.Namespace) -> Iterator[Complete]:
    """The engine in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    apply_shims()
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, **options(args))
    sampling = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)

    def complete(texts: Sequence[str]) -> list[Answer]:
        answers = llm.generate(list(texts), sampling, use_tqdm=False)
        return [
            Answer(a.prompt_token_ids, list(a.outputs[0].token_ids), a.num_cached_tokens or 0)
            for a in answers
        ]

    yield complete


@contextlib.contextmanager
def over_http(model: str, args: argparse.Namespace) -> Iterator[Complete]:
    """`vllm serve`, asked by eight clients at once."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        __file__,
        "vllm",
        "serve",
        model,
        "--served-model-name",
        "mlra",
        "--port",
        str(port),
    ]
    command.append("--enable-prompt-tokens-details")
    for name, value in options(args).items():
        command += [
            f"--{name.replace('_', '-')}",
            json.dumps(value) if isinstance(value, dict) else str(value),
        ]
    server = subprocess.Popen(command)
    at = f"http://localhost:{port}"

    def one(text: str) -> Answer:
        asked = {"model": "mlra", "prompt": text, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        body = json.dumps(asked | {"return_token_ids": True}).encode()
        request = urllib.request.Request(f"{at}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)
        details, [choice] = answer["usage"].get("prompt_tokens_details") or {}, answer["choices"]
        return Answer(choice["prompt_token_ids"], choice["token_ids"], details.get("cached_tokens") or 0)

    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{at}/health"):
                break
            if server.poll() is not None:
                raise RuntimeError("vllm serve has ended")
            time.sleep(1)
        with concurrent.futures.ThreadPoolExecutor(8) as clients:
            yield lambda texts: list(clients.map(one, texts))
    finally:
        server.terminate()
        server.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tensor", type=int, default=1, help="devices over which latent heads are split")
    parser.add_argument(
        "--data", type=int, default=1, help="groups of such devices, each with its own requests"
    )
    parser.add_argument("--rounds", type=int, default=2, help="times that all prompts are completed")
    parser.add_argument(
        "--http", action="store_true", help="through `vllm serve` rather than in this process"
    )
    args = parser.parse_args()
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={args.tensor * args.data}",
        "SKIP_JAX_PRECOMPILE": "1",  # compile shapes when they first come
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }

    from mlra_jax.cli import export
    from mlra_jax.generation.generator import Generator

    # The first round fills the prefix cache, the others read from it.
    equal, cached, total = 0, 0, args.rounds * PROMPTS
    with tempfile.TemporaryDirectory() as folder:
        run, model = f"{folder}/run", f"{folder}/model"
        make_run(run)
        export.main([run, "--out", model, "--max-file-gb", "0.002"])
        generator = Generator.from_checkpoint(run)
        asked = {"max_new_tokens": NEW, "temperature": 0, "ignore_eos": True}
        expected = [
            (generator.tokenizer.encode(text), list(c.tokens))
            for text, c in zip(prompts(), generator.complete(prompts(), **asked), strict=True)
        ]
        with (over_http if args.http else in_process)(model, args) as complete:
            for _ in range(args.rounds):
                for wanted, answer in zip(expected, complete(prompts()), strict=True):
                    same = (answer.prompt, answer.tokens) == wanted
                    equal, cached = equal + same, cached + answer.cached
                    verdict = "equal" if same else f"DIFFERENT: {answer}, Generator {wanted}"
                    print(f"prompt of {len(answer.prompt)} tokens, {answer.cached} cached: {verdict}")
    how = f"tensor {args.tensor}, data {args.data}, {'vllm serve' if args.http else 'in process'}"
    print(
        f"{how}: {equal} of {total} completions equal to Generator's; {cached} tokens of prompts from the cache"
    )
    return equal != total


if __name__ == "__mp_main__":  # a process of `vllm serve`
    apply_shims()
elif __name__ == "__main__" and sys.argv[1:2] == ["vllm"]:  # the command `vllm`
    apply_shims()
    from vllm.entrypoints.cli.main import main as vllm

    del sys.argv[1]
    vllm()
elif __name__ == "__main__":
    sys.exit(main())
