"""Generation on the device: prompts fill the cache in padded chunks, then a compiled step makes a token for each row.

The step runs one call at a time (`Rows.step`, to show each token as it comes) or many times inside one compiled
`lax.while_loop` (`Rows.run`). The cache is donated from call to call, so only one exists. All processes of a cluster
see the same tokens, and so make the same decisions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from mlra_jax.attention.kv_cache import Cache, repeat_rows
from mlra_jax.config import ConfigError, ModelConfig
from mlra_jax.generation.sampling import GREEDY, NO_NUMBER, RowSampling, Sampling, sample
from mlra_jax.model import Transformer
from mlra_jax.ops.all_reduce import Workspace
from mlra_jax.ops.device import current_device
from mlra_jax.sharding import AxisRules, on_mesh

NO_TOKEN = -1
"""The token of a row that is done, in the output of a step."""

SMALLEST_BUCKET = 16
LARGEST_BUCKET = 4096
"""Prompts run in chunks of at most this many tokens per row; shorter ones are padded to a power of two."""
SMALL_CHUNK = 512
"""Up to this many tokens, products are bound by reading the weights, so padding costs little."""
PREFILL_BYTES = 2**30
"""Bytes of activations that one chunk of the prompts may take on a device, unless each row has only `SMALLEST_BUCKET`
tokens. For the 2.9 B models these are 4096 tokens, many times what products need to be bound by arithmetic."""
STEPS_PER_RUN = 64
"""Most steps of one compiled loop."""
LENGTH_UNIT = 256
"""Default cache lengths are multiples of this, so that a slightly longer prompt does not recompile."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The input and output of a step. Everything but the cache is whole on every device."""

    cache: Cache
    token_B: Any
    """The last token of each row, which is not in the cache yet: int32."""
    left_B: Any
    """How many more tokens each row gets, 0 if it is done: int32."""
    eos_B: Any
    """Id that ends each row, or `NO_TOKEN`: int32."""
    sampling: RowSampling
    """How each row's tokens are chosen."""


def free_bytes(device: jax.Device) -> float:
    """Free memory of the device, in bytes; infinite if it does not report it."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0)


def round_up(n: int, multiple: int) -> int:
    """`n` rounded up to a multiple of `multiple`."""
    return -(-n // multiple) * multiple


def activation_bytes(config: ModelConfig) -> int:
    """Most bytes that one token of a chunk takes on a device while a layer is computed.

    The residual stream and its norm are always present; besides, either the MLP's products or attention's queries and
    outputs, the latter in float32 too.
    """
    width = jnp.dtype(config.compute_dtype).itemsize
    attention = config.attention.activation_bytes(config.n_heads, width)
    return 2 * 4 * config.d_model + max(3 * width * config.d_ff, attention)


def largest_chunk(config: ModelConfig, rows_per_device: int) -> int:
    """Most tokens per row in one chunk: a power of two, so that few sizes are compiled."""
    # Twice: the input and the output of an operation exist at the same time.
    tokens = PREFILL_BYTES // (2 * activation_bytes(config) * rows_per_device)
    fitting = 1 << max(tokens, 1).bit_length() - 1
    return min(max(fitting, SMALLEST_BUCKET), LARGEST_BUCKET)


def chunk_sizes(longest: int, largest: int) -> list[int]:
    """Padded sizes of the chunks in which prompts of at most `longest` tokens run: powers of two with little padding.

    Up to `SMALL_CHUNK` tokens there is one chunk; beyond, at most an eighth of the last one is padding.
    """
    sizes = []
    while longest > 0:
        size = min(largest, max(SMALLEST_BUCKET, 1 << (longest - 1).bit_length()))
        if size > SMALL_CHUNK and size - longest > size // 8:
            size //= 2
        sizes.append(size)
        longest -= size
    return sizes


def prefill(
    model: Transformer, cache: Cache, logits_BV: jax.Array, tokens_BT: jax.Array, n_new_B: jax.Array
) -> tuple[Cache, jax.Array]:
    """Runs one chunk of the prompts; `logits_BV`, in and out, are those after each row's last token so far."""
    new_B1V, cache = model.decode(tokens_BT, cache, n_new_B, logits="last")
    return cache, jnp.where(n_new_B[:, None] > 0, new_B1V[:, 0], logits_BV)


def begin(
    rules: AxisRules,
    n_vocab: int,
    n: int,
    cache: Cache,
    logits_BV: jax.Array,
    left_B: jax.Array,
    eos_B: jax.Array,
    sampling: RowSampling,
) -> tuple[State, jax.Array]:
    """Repeats each row of the cache `n` times and samples the first tokens: the state, and the tokens [B]."""
    if n > 1:
        cache, logits_BV = cache.repeat(n), repeat_rows(rules, n, logits_BV, "batch", "vocab")
    state = State(cache, jnp.full_like(left_B, NO_TOKEN), left_B, eos_B, sampling)
    state = _with_next(rules, n_vocab, state, logits_BV)
    return state, state.token_B


def step(model: Transformer, n_vocab: int, state: State) -> tuple[State, jax.Array]:
    """One more token for each row that is not done: the new state, and the tokens [B].

    A row that is done gets `NO_TOKEN`; a row whose logits leave no choice gets `NO_NUMBER` and is done.
    """
    rules = model.rules
    active_B = state.left_B > 0
    n_new_B = rules.constrain(active_B.astype(jnp.int32), "batch")
    tokens_B1 = rules.constrain(jnp.maximum(state.token_B, 0)[:, None], "batch", None)
    logits_B1V, cache = model.decode(tokens_B1, state.cache, n_new_B, logits="last")
    state = dataclasses.replace(state, cache=cache)
    with jax.named_scope("sample"):
        state = _with_next(rules, n_vocab, state, logits_B1V[:, 0], model.workspace)
    return state, jnp.where(active_B, state.token_B, NO_TOKEN)


def _steps_at_once() -> int:
    """Steps between checks whether any row is left, a divisor of `STEPS_PER_RUN`.

    At each check a GPU waits for its host. Once all rows are done, further steps change nothing.
    """
    return 4 if current_device()[0] == "gpu" else 1


def run(model: Transformer, n_vocab: int, state: State, n_steps: jax.Array) -> tuple[State, jax.Array]:
    """Up to `n_steps` steps, fewer if all rows are done: the new state, and the tokens [STEPS_PER_RUN, B]."""

    def go_on(carry: tuple[jax.Array, State, jax.Array]) -> jax.Array:
        return jnp.any(carry[1].left_B > 0)

    def one(_: int, carry: tuple[jax.Array, State, jax.Array]) -> tuple[jax.Array, State, jax.Array]:
        i, state, out = carry
        state, token_B = step(model, n_vocab, state)
        return i + 1, state, jax.lax.dynamic_update_index_in_dim(out, token_B, i, axis=0)

    several = functools.partial(jax.lax.fori_loop, 0, _steps_at_once(), one)
    out = jnp.full((STEPS_PER_RUN, *state.token_B.shape), NO_TOKEN)
    left_B = jnp.minimum(state.left_B, n_steps)
    beyond_B = state.left_B - left_B
    state = dataclasses.replace(state, left_B=left_B)
    _, state, out = jax.lax.while_loop(go_on, several, (jnp.int32(0), state, out))
    left_B = jnp.where(_ended(state), 0, state.left_B + beyond_B)
    return dataclasses.replace(state, left_B=left_B), out


def _ended(state: State) -> jax.Array:
    """Whether each row's last token ends it, bool [B]."""
    return (state.token_B == state.eos_B) | (state.token_B == NO_NUMBER)


def _with_next(
    rules: AxisRules, n_vocab: int, state: State, logits_BV: jax.Array, workspace: Workspace | None = None
) -> State:
    """The state with a token sampled for each row that is not done."""
    position_B = state.cache.lengths
    token_B = sample(rules, logits_BV, state.sampling, n_vocab, position_B=position_B, workspace=workspace)
    token_B = rules.constrain(token_B, None)
    active_B = state.left_B > 0
    state = dataclasses.replace(state, token_B=jnp.where(active_B, token_B, state.token_B))
    left_B = jnp.where(active_B & ~_ended(state), state.left_B - 1, 0)
    return dataclasses.replace(state, left_B=left_B)


def compiler_options(mesh: Mesh) -> dict[str, Any]:
    """XLA options for compiling prefill and steps for the devices of a mesh."""
    if mesh.devices.flat[0].platform not in ("gpu", "cuda"):
        return {}
    # XLA would merge products that share an input, and concatenate their weights for that at every step.
    return {"xla_gpu_dot_merger_threshold_mb": 0}


def compile_step(
    config: ModelConfig,
    rules: AxisRules,
    mesh: Mesh,
    *,
    batch: int,
    max_len: int,
    sampling: Sampling = GREEDY,
) -> jax.stages.Compiled:
    """Compiles the decode step for a mesh ahead of time; nothing is allocated, and the devices may be absent.

    Args:
      config: the model's configuration.
      rules: the decoding table.
      mesh: a mesh with explicit axes.
      batch: number of rows.
      max_len: tokens that the cache holds per row.
      sampling: how each row's tokens are chosen.
    """
    with jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), rules=rules, layout="decode"))
        cache = jax.eval_shape(lambda: Cache.create(config, rules, batch, max_len))
        model.workspace = Workspace.shapes(mesh, rules, config.d_model)
        leaves, treedef = jax.tree.flatten(model)
        rows = RowSampling.of([sampling] * batch, [0] * batch, [0] * batch)
        rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rows)
        by_row = jax.ShapeDtypeStruct((batch,), jnp.int32)
        state = State(cache, by_row, by_row, by_row, rows)

        def one(leaves: list[jax.Array], state: State) -> tuple[State, jax.Array]:
            return step(jax.tree.unflatten(treedef, leaves), config.vocab_size, state)

        lowered = jax.jit(one, donate_argnums=1).lower(*on_mesh((leaves, state), mesh))
        return lowered.compile(compiler_options=compiler_options(mesh))


class Engine:
    """Compiled generation with one model on one mesh.

    Args:
      model: a model in the decode layout (`mlra_jax.model.to_decode`), on `mesh`.
      mesh: a mesh with explicit axes.
      n_vocab: number of ids that the tokenizer has; later rows of the embedding are padding and never generated.

    Raises:
      NotImplementedError: the model is in the training layout.
    """

    def __init__(self, model: Transformer, mesh: Mesh, n_vocab: int):
        model.require_layout("decode")
        self.config, self.rules, self.mesh, self.n_vocab = model.config, model.rules, mesh, n_vocab
        workspace = Workspace.create(mesh, model.rules, model.config.d_model)
        # Flat, because passing a module would flatten it in Python at every step.
        self.leaves, self._treedef = jax.tree.flatten((model, workspace))
        self.compiler_options = compiler_options(mesh)
        self.programs: dict[Hashable, jax.stages.Compiled] = {}
        """The compiled programs, by key (see `call`)."""
        self.compile_seconds = 0.0
        """Total time spent compiling so far."""

    def model(self, leaves: list[jax.Array]) -> Transformer:
        """The model whose parameters are `leaves`, inside a compiled function that takes them."""
        model, workspace = jax.tree.unflatten(self._treedef, leaves)
        model.workspace = workspace
        return model

    def call(
        self, key: Hashable, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()
    ) -> Any:
        """`function(*args)`, compiled at the first call with this key, which must be unique for the shapes."""
        if key not in self.programs:
            start = time.perf_counter()
            lowered = jax.jit(function, donate_argnums=donate).lower(*args)
            self.programs[key] = lowered.compile(compiler_options=self.compiler_options)
            self.compile_seconds += time.perf_counter() - start
        return self.programs[key](*args)

    def put(self, value: Any, *names: str | None) -> jax.Array:
        """Lays out a NumPy array or scalar, equal on every process, on the mesh."""
        sharding = NamedSharding(self.mesh, self.rules.spec(*names))
        return jax.make_array_from_callback(value.shape, sharding, lambda index: np.asarray(value)[index])

    def _create(self, rows: int, max_len: int) -> tuple[Cache, jax.Array]:
        cache = Cache.create(self.config, self.rules, rows, max_len)
        logits = jnp.zeros((rows, self.config.vocab_size), jnp.float32)
        return cache, self.rules.constrain(logits, "batch", "vocab")

    def cache_bytes(self, rows: int, max_len: int) -> int:
        """Bytes of the cache's arrays that each device would hold for this many rows; nothing is allocated."""
        with jax.set_mesh(self.mesh):
            cache, _ = jax.eval_shape(functools.partial(self._create, self.padded(rows), max_len))
        layers = jax.tree.leaves(cache.layers)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in layers)

    def activation_bytes(self, rows: int, max_len: int) -> int:
        """Bytes that running the prompts of this many rows, at most `max_len` tokens each, takes on a device."""
        with jax.set_mesh(self.mesh):
            rows = self.padded(rows) // self.rules.size("batch")
        chunk = max(chunk_sizes(max_len, largest_chunk(self.config, rows)))
        # Each row also has two sets of logits: this chunk's and the previous one's.
        return rows * (2 * activation_bytes(self.config) * chunk + 2 * 4 * self.config.vocab_size)

    def check_memory(self, batch: int, n: int, max_len: int) -> None:
        """Checks that generation fits into the free memory of the devices, which hold the weights already.

        Args:
          batch: number of prompts.
          n: samples per prompt.
          max_len: tokens per row.

        Raises:
          ConfigError: it does not fit; the message says what is needed and what is free.
        """
        cache = self.cache_bytes(batch * n, max_len) + (self.cache_bytes(batch, max_len) if n > 1 else 0)
        needed = cache + self.activation_bytes(batch, max_len)
        for device in self.mesh.local_devices:
            if needed > (free := free_bytes(device)):
                raise ConfigError(
                    f"The KV cache of {batch * n} row(s) of {max_len} tokens needs {cache / 2**30:.2f} GiB on each "
                    f"device, and filling it {(needed - cache) / 2**30:.2f} GiB more; besides the weights, {device} "
                    f"has {free / 2**30:.2f} GiB free: generate fewer rows at a time, or shorter ones, or use a "
                    "larger mesh (tensor, data or context)."
                )

    def padded(self, rows: int) -> int:
        """`rows` rounded up to a multiple of the devices along `data`."""
        with jax.set_mesh(self.mesh):
            parts = self.rules.size("batch")
        return round_up(rows, parts)

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        *,
        n: int = 1,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        seed: int | Sequence[int] = 0,
        eos_id: int | Sequence[int | None] | None = None,
        max_len: int | None = None,
        batch: int = 0,
    ) -> Rows:
        """Fills a cache with the prompts and samples the first token of each row.

        Args:
          prompts: token ids, at least one each.
          max_new_tokens: for each prompt, at least 1.
          n: samples per prompt: rows n*p to n*p + n - 1 belong to prompt p.
          sampling: how tokens are chosen, for all prompts or for each.
          seed: sampling seed, for all prompts or for each.
          eos_id: id after which a row is done, for all prompts or for each; None: no id.
          max_len: tokens that the cache holds per row; None: what is needed, rounded up to `LENGTH_UNIT`.
          batch: fewer prompts than this are padded to it, so that a smaller last batch does not recompile.

        Raises:
          ValueError: a prompt is empty, or does not fit together with its new tokens.
        """
        needed = max(len(p) + new for p, new in zip(prompts, max_new_tokens, strict=True))
        if min(map(len, prompts)) < 1 or min(max_new_tokens) < 1:
            raise ValueError("Every prompt must have at least one token, and get at least one.")
        max_len = round_up(needed, LENGTH_UNIT) if max_len is None else max_len
        if needed > max_len:
            raise ValueError(f"A prompt and its new tokens are {needed} tokens; the cache holds {max_len}.")
        each = lambda x: x if isinstance(x, Sequence) else [x] * len(prompts)
        eos_ids = [NO_TOKEN if eos is None else eos for eos in each(eos_id)]
        by_prompt = zip(max_new_tokens, eos_ids, each(sampling), each(seed), strict=True)
        rows = [(*values, sample) for values in by_prompt for sample in range(n)]
        batch = max(batch, len(prompts))
        if self.padded(batch) != batch:
            # Each padding prompt would become n rows: samples run as prompts of their own instead.
            prompts, batch, n = [p for p in prompts for _ in range(n)], batch * n, 1
        batch = self.padded(batch)
        rows += [(0, *rows[-1][1:])] * (batch * n - len(rows))  # done from the start
        left_B, eos_B, *of_sampling = zip(*rows, strict=True)
        row_sampling = RowSampling.of(*of_sampling)
        by_row = np.array(left_B, np.int32), np.array(eos_B, np.int32), row_sampling

        with jax.set_mesh(self.mesh):
            shape = (batch, max_len)
            cache, logits_BV = self._fill(prompts, *shape)
            first = functools.partial(begin, self.rules, self.n_vocab, n)
            args = cache, logits_BV, *jax.tree.map(self.put, by_row)
            # With n > 1 rows per prompt a new, larger cache is made, which cannot reuse the memory of the first.
            donate = (0, 2, 3, 4) if n == 1 else (2, 3, 4)
            key = ("begin", shape, n, jax.tree.structure(row_sampling))
            state, token_B = self.call(key, first, *args, donate=donate)
        return Rows(self, state, token_B, max_len)

    def _fill(self, prompts: Sequence[Sequence[int]], batch: int, max_len: int) -> tuple[Cache, jax.Array]:
        """A cache filled with the prompts, and the logits [B, V] after each."""
        length_B = np.array([len(p) for p in prompts] + [0] * (batch - len(prompts)), np.int32)
        create = functools.partial(self._create, batch, max_len)
        cache, logits_BV = self.call(("create", batch, max_len), create)
        chunk = lambda leaves, *args: prefill(self.model(leaves), *args)
        done = 0
        largest = largest_chunk(self.config, batch // self.rules.size("batch"))
        for size in chunk_sizes(int(length_B.max()), largest):
            tokens_BT = np.zeros((batch, size), np.int32)
            for row, prompt in zip(tokens_BT, prompts, strict=False):
                part = prompt[done : done + size]
                row[: len(part)] = part
            n_new_B = np.clip(length_B - done, 0, size).astype(np.int32)
            args = cache, logits_BV, self.put(tokens_BT, "batch"), self.put(n_new_B, "batch")
            key = ("prefill", batch, max_len, size)
            cache, logits_BV = self.call(key, chunk, self.leaves, *args, donate=(1, 2))
            done += size
        return cache, logits_BV


class Rows:
    """A batch that is being generated.

    Args:
      engine: the engine that started it.
      state: the current state; every call donates and replaces it.
      first_B: the first token of each row.
      max_len: the requested length of the cache, in tokens per row.
    """

    def __init__(self, engine: Engine, state: State, first_B: jax.Array, max_len: int):
        self.first_B, self.state = first_B, state
        self.cache_bytes_per_device = state.cache.bytes_per_device()
        self._engine = engine
        self._key = (len(first_B), max_len, jax.tree.structure(state.sampling))

    def step(self) -> jax.Array:
        """One more token of each row, [B], `NO_TOKEN` where a row is done. Does not wait for the device."""
        engine = self._engine  # `one` must not keep `self`, and so the cache, alive

        def one(leaves: list[jax.Array], state: State) -> tuple[State, jax.Array]:
            return step(engine.model(leaves), engine.n_vocab, state)

        with jax.set_mesh(engine.mesh):
            args = engine.leaves, self.state
            self.state, token_B = engine.call(("step", *self._key), one, *args, donate=(1,))
        return token_B

    def run(self, n_steps: int = STEPS_PER_RUN) -> jax.Array:
        """Up to `n_steps` more tokens of each row, [STEPS_PER_RUN, B], padded with `NO_TOKEN`."""
        engine = self._engine

        def many(leaves: list[jax.Array], state: State, n_steps: jax.Array) -> tuple[State, jax.Array]:
            return run(engine.model(leaves), engine.n_vocab, state, n_steps)

        with jax.set_mesh(engine.mesh):
            args = engine.leaves, self.state, engine.put(np.int32(min(n_steps, STEPS_PER_RUN)))
            self.state, out = engine.call(("run", *self._key), many, *args, donate=(1,))
        return out

    def stop(self, rows: Sequence[int]) -> None:
        """Ends these rows."""
        keep_B = np.ones(len(self.first_B), np.int32)
        keep_B[list(rows)] = 0
        with jax.set_mesh(self._engine.mesh):
            left_B = self.state.left_B * self._engine.put(keep_B)
        self.state = dataclasses.replace(self.state, left_B=left_B)
