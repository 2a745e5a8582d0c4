"""Small models of every attention, and their engines on simulated meshes, made once for all tests."""

import functools
from collections.abc import Callable

import jax
import numpy as np
import pytest
from flax import nnx

from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.checkpoints import Checkpoints
from mlra_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from mlra_jax.data.tokenizers import ByteTokenizer
from mlra_jax.generation.engine import STEPS_PER_RUN, Engine, Request
from mlra_jax.generation.generator import Generator
from mlra_jax.generation.loop import GenerationLoop
from mlra_jax.model import Transformer, from_params, to_decode
from mlra_jax.sharding import decode_rules, make_mesh
from mlra_jax.training.step import TrainState, abstract_state

N_VOCAB = 257
LATENT = {"q_lora_rank": 20, "kv_lora_rank": 64, "d_nope": 16, "d_rope": 8}
ATTENTION = {
    "mlra_4": LatentAttentionConfig(4, 4, **LATENT),
    "mlra_2": LatentAttentionConfig(4, 2, **LATENT),
    "gla_2": LatentAttentionConfig(2, 1, **LATENT),
    "mla": LatentAttentionConfig(1, 1, **LATENT),
    "gqa": GroupedAttentionConfig(n_kv_heads=2, d_head=16),
}

ids = np.random.default_rng(0).integers(0, N_VOCAB, 100).tolist()
PROMPTS = [ids[:5], ids[5:26], ids[26:27], ids[27:36]]


def model_config(variant: str) -> ModelConfig:
    """Two layers, 264 rows for 257 ids, and an initialisation under which greedy text does not repeat itself."""
    return ModelConfig(
        vocab_size=264,
        n_layers=2,
        d_model=48,
        n_heads=8,
        d_ff=80,
        attention=ATTENTION[variant],
        output_init="normal",
        init_std=0.4,
        compute_dtype="float32",
    )


@functools.cache
def stored_params(variant: str) -> dict:
    """Parameters in the training layout, on the host."""
    model = jax.jit(lambda: Transformer(model_config(variant), rngs=nnx.Rngs(0)))()
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


@functools.cache
def make_engine(
    variant: str,
    sizes: tuple[int, int, int] = (1, 1, 1),
    split_heads: bool = True,
    split_tokens: bool = False,
) -> Engine:
    """On data x tensor x context devices."""
    data, tensor, context = sizes
    mesh = make_mesh(MeshConfig(data, 1, tensor, context), jax.devices()[: data * tensor * context])
    with jax.set_mesh(mesh):
        rules = decode_rules(split_heads, split_tokens=split_tokens)
        model = to_decode(model_config(variant), stored_params(variant), rules)
    return Engine(model, mesh, N_VOCAB)


@functools.cache
def full_forward(variant: str) -> Callable[[np.ndarray], jax.Array]:
    """The compiled model without cache or mesh: logits [4, 64, V] of tokens [4, 64]."""
    params = jax.tree.map(jax.numpy.asarray, stored_params(variant))
    return jax.jit(lambda tokens_BT: from_params(model_config(variant), params)(tokens_BT))


@pytest.fixture(scope="session")
def rollout() -> Callable[[str, list[list[int]], int], list[list[int]]]:
    """`rollout(variant, prompts, n)`: n greedy tokens for each of at most 4 prompts, from full forward passes."""

    def roll(variant: str, prompts: list[list[int]], n: int) -> list[list[int]]:
        rows = [list(prompt) for prompt in prompts]
        for _ in range(n):
            tokens = np.zeros((4, 64), np.int32)
            for padded, row in zip(tokens, rows, strict=False):
                padded[: len(row)] = row
            logits = np.asarray(full_forward(variant)(tokens))[..., :N_VOCAB]
            for i, row in enumerate(rows):
                row.append(int(logits[i, len(row) - 1].argmax()))
        return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]

    return roll


@pytest.fixture(scope="session")
def logits_of() -> Callable[[list[int]], np.ndarray]:
    """`logits_of(tokens)`: those of MLRA-4 after each token, [T, 257], from a full forward pass."""

    def of(tokens: list[int]) -> np.ndarray:
        padded = np.zeros((4, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(full_forward("mlra_4")(padded))[0, : len(tokens), :N_VOCAB]

    return of


@pytest.fixture(scope="session")
def engine() -> Callable[..., Engine]:
    """`engine(variant, (data, tensor, context), split_heads, split_tokens)`."""
    return make_engine


@pytest.fixture(scope="session")
def generator() -> Generator:
    """MLRA-4 on data 2 x tensor 2 x context 2 devices, with byte tokens."""
    return Generator(make_engine("mlra_4", (2, 2, 2)), ByteTokenizer())


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Token ids of prompts of different lengths, one of them a single token."""
    return PROMPTS


@pytest.fixture(scope="session")
def config_of() -> Callable[[str], ModelConfig]:
    """`config_of(variant)`."""
    return model_config


@pytest.fixture(scope="session")
def tokens_of() -> Callable[..., list[list[int]]]:
    """`tokens_of(engine, prompts, limits, ...)`: all tokens of each prompt, in a compiled loop, or `stepwise`.

    `rows` is 4 unless given; other keywords are fields of `Request`.
    """

    def finish(
        engine: Engine | GenerationLoop,
        prompts: list[list[int]],
        limits: list[int],
        *,
        rows: int = 4,
        max_len: int = 64,
        stepwise: bool = False,
        **fields: object,
    ) -> list[list[int]]:
        loop = engine if isinstance(engine, GenerationLoop) else GenerationLoop(engine, rows, max_len)
        pairs = zip(prompts, limits, strict=True)
        made = {loop.submit(Request(*pair, **fields)): [] for pair in pairs}
        while loop.busy:
            for event in loop.step(1 if stepwise else STEPS_PER_RUN):
                made[event.request] += event.tokens
        return list(made.values())

    return finish


@pytest.fixture(scope="session")
def params_of() -> Callable[[str], dict]:
    """`params_of(variant)`: parameters in the training layout, on the host."""
    return stored_params


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    """The folder of a run whose step 7, saved on a training mesh of eight devices, holds the MLRA-4 model."""
    run = tmp_path_factory.mktemp("runs") / "mlra_4"
    config = TrainConfig(
        name="test", model=model_config("mlra_4"), data=DataConfig(seq_len=16), compilation_cache=""
    )
    mesh = make_mesh(MeshConfig(2, 2, 2, 1))
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh).params)
    params = jax.device_put(stored_params("mlra_4"), shardings)
    state = TrainState(
        params, opt_state=jax.numpy.zeros(()), step=jax.numpy.int32(7)
    )  # decoding reads no optimizer
    checkpoints = Checkpoints(run, config.checkpoint)
    checkpoints.save(7, state, config)
    checkpoints.close()
    return str(run)
