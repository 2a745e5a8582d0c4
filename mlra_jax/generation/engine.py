"""Generation on the device: prompts fill the cache in padded chunks, then one compiled step makes a token for each row.

The step runs one call at a time (`Rows.step`, to show each token as it comes) or many times inside one compiled
`lax.while_loop` (`Rows.run`). The cache is donated from call to call, so there is one of it. What the host decides
with (tokens) is the same on every process of a cluster.
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
from mlra_jax.ops.device import current_device
from mlra_jax.sharding import AxisRules, on_mesh

NO_TOKEN = -1
"""Stands in the output of a step for a row that is done."""

SMALLEST_BUCKET = 16
LARGEST_BUCKET = 4096
"""Prompts are run in chunks of this many tokens of each row at most; shorter ones are padded to a power of two."""
SMALL_CHUNK = 512
"""Tokens whose products take no less time than reading the weights: to pad up to here costs little."""
PREFILL_BYTES = 2**30
"""Of activations that one chunk of the prompts may take on a device (if each row gets `SMALLEST_BUCKET`). In the 2.9 B
models that is 4096 tokens, many times what makes a product with the weights as fast as the arithmetic."""
STEPS_PER_RUN = 64
"""Most steps of one compiled loop."""
LENGTH_UNIT = 256
"""Cache lengths that are not asked for are multiples of it, so that a little longer prompt does not recompile."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a step takes and gives. All but the cache is whole on every device."""

    cache: Cache
    token_B: Any
    """The last token of each row, not in the cache yet: int32."""
    left_B: Any
    """How many more tokens each row gets; 0: it is done. int32."""
    eos_B: Any
    """Id that ends each row, or `NO_TOKEN`: int32."""
    sampling: RowSampling
    """How each row's tokens are chosen."""


def free_bytes(device: jax.Device) -> float:
    """Memory that the device can still give, in bytes; infinite if it does not say."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0)


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not less than `n`."""
    return -(-n // multiple) * multiple


def activation_bytes(config: ModelConfig) -> int:
    """Bytes that one token of a chunk takes, at most, while its layer is computed on one device.

    The residual stream and its norm are there all the time; beside them either the MLP's products or attention's
    queries and outputs, the latter in float32 too.
    """
    width = jnp.dtype(config.compute_dtype).itemsize
    attention = config.attention.activation_bytes(config.n_heads, width)
    return 2 * 4 * config.d_model + max(3 * width * config.d_ff, attention)


def largest_chunk(config: ModelConfig, rows_per_device: int) -> int:
    """Most tokens of each row in one chunk: a power of two, so that few sizes are compiled."""
    # Twice: what one operation reads and the next one writes are there at the same time.
    tokens = PREFILL_BYTES // (2 * activation_bytes(config) * rows_per_device)
    fitting = 1 << max(tokens, 1).bit_length() - 1
    return min(max(fitting, SMALLEST_BUCKET), LARGEST_BUCKET)


def chunk_sizes(longest: int, largest: int) -> list[int]:
    """Padded sizes of the chunks in which prompts of at most `longest` tokens are run: powers of two, none wasteful.

    Up to `SMALL_CHUNK` tokens a prompt is one chunk; beyond, no more than an eighth of the last one is padding.
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
    """Runs one chunk of the prompts; `logits_BV` are those after each row's last token so far, before and after it."""
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
    """Makes `n` rows of each row of the cache and samples their first tokens: the state, and the tokens [B]."""
    if n > 1:
        cache, logits_BV = cache.repeat(n), repeat_rows(rules, n, logits_BV, "batch", "vocab")
    state = State(cache, jnp.full_like(left_B, NO_TOKEN), left_B, eos_B, sampling)
    state = _with_next(rules, n_vocab, state, logits_BV)
    return state, state.token_B


def step(model: Transformer, n_vocab: int, state: State) -> tuple[State, jax.Array]:
    """One more token for each row that is not done: the new state, and the tokens [B].

    They are `NO_TOKEN` for rows that are done; a row whose logits leave no choice gets `NO_NUMBER` and is done.
    """
    rules = model.rules
    active_B = state.left_B > 0
    n_new_B = rules.constrain(active_B.astype(jnp.int32), "batch")
    tokens_B1 = rules.constrain(jnp.maximum(state.token_B, 0)[:, None], "batch", None)
    logits_B1V, cache = model.decode(tokens_B1, state.cache, n_new_B, logits="last")
    state = dataclasses.replace(state, cache=cache)
    with jax.named_scope("sample"):
        state = _with_next(rules, n_vocab, state, logits_B1V[:, 0])
    return state, jnp.where(active_B, state.token_B, NO_TOKEN)


def _steps_at_once() -> int:
    """Steps between two looks at whether a row is left, a divisor of `STEPS_PER_RUN`.

    A GPU waits for its host each time. When all rows are done, a step changes nothing.
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
    """Rows whose last token is the last one of its kind, bool [B]."""
    return (state.token_B == state.eos_B) | (state.token_B == NO_NUMBER)


def _with_next(rules: AxisRules, n_vocab: int, state: State, logits_BV: jax.Array) -> State:
    """The state with a token sampled for each row that is not done."""
    token_B = sample(rules, logits_BV, state.sampling, n_vocab, position_B=state.cache.lengths)
    token_B = rules.constrain(token_B, None)
    active_B = state.left_B > 0
    state = dataclasses.replace(state, token_B=jnp.where(active_B, token_B, state.token_B))
    left_B = jnp.where(active_B & ~_ended(state), state.left_B - 1, 0)
    return dataclasses.replace(state, left_B=left_B)


def compiler_options(mesh: Mesh) -> dict[str, Any]:
    """How XLA shall compile prefill and steps for the devices of a mesh."""
    if mesh.devices.flat[0].platform not in ("gpu", "cuda"):
        return {}
    # XLA would make one product of those that share an input, and join their weights for it at every step.
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
    """The decode step compiled for a mesh ahead of time: nothing is allocated, and the devices need not be there.

    Args:
      config: of the model.
      rules: the decoding table.
      mesh: with explicit axes.
      batch: rows.
      max_len: tokens that the cache holds for each row.
      sampling: of every row.
    """
    with jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), rules=rules, layout="decode"))
        cache = jax.eval_shape(lambda: Cache.create(config, rules, batch, max_len))
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
      model: in the decode layout (`mlra_jax.model.to_decode`), on `mesh`.
      mesh: with explicit axes.
      n_vocab: ids that the tokenizer knows; the rows of the embedding after them are padding and never generated.
    """

    def __init__(self, model: Transformer, mesh: Mesh, n_vocab: int):
        self.config, self.rules, self.mesh, self.n_vocab = model.config, model.rules, mesh, n_vocab
        # Flat, because a call with a module would flatten it in Python at every step.
        self.leaves, self._treedef = jax.tree.flatten(model)
        self.compiler_options = compiler_options(mesh)
        self.programs: dict[Hashable, jax.stages.Compiled] = {}
        """What has been compiled, by key (see `call`)."""
        self.compile_seconds = 0.0
        """Time that compiling has taken so far."""

    def model(self, leaves: list[jax.Array]) -> Transformer:
        """The model whose parameters are `leaves`, inside a compiled function that takes them."""
        return jax.tree.unflatten(self._treedef, leaves)

    def call(
        self, key: Hashable, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()
    ) -> Any:
        """`function(*args)`, compiled at the first call with this key, which must tell all shapes apart."""
        if key not in self.programs:
            start = time.perf_counter()
            lowered = jax.jit(function, donate_argnums=donate).lower(*args)
            self.programs[key] = lowered.compile(compiler_options=self.compiler_options)
            self.compile_seconds += time.perf_counter() - start
        return self.programs[key](*args)

    def put(self, value: Any, *names: str | None) -> jax.Array:
        """A NumPy array or scalar, the same on every process, laid out on the mesh."""
        sharding = NamedSharding(self.mesh, self.rules.spec(*names))
        return jax.make_array_from_callback(value.shape, sharding, lambda index: np.asarray(value)[index])

    def _create(self, rows: int, max_len: int) -> tuple[Cache, jax.Array]:
        cache = Cache.create(self.config, self.rules, rows, max_len)
        logits = jnp.zeros((rows, self.config.vocab_size), jnp.float32)
        return cache, self.rules.constrain(logits, "batch", "vocab")

    def cache_bytes(self, rows: int, max_len: int) -> int:
        """Bytes of keys, values or latents that each device will hold for so many rows; nothing is allocated."""
        with jax.set_mesh(self.mesh):
            cache, _ = jax.eval_shape(functools.partial(self._create, self.padded(rows), max_len))
        layers = jax.tree.leaves(cache.layers)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in layers)

    def activation_bytes(self, rows: int, max_len: int) -> int:
        """Bytes that prompts of at most `max_len` tokens of so many rows take on a device while they are run."""
        with jax.set_mesh(self.mesh):
            rows = self.padded(rows) // self.rules.size("batch")
        chunk = max(chunk_sizes(max_len, largest_chunk(self.config, rows)))
        # Of each row: its last hidden state becomes logits, held besides those of the chunk before.
        return rows * (2 * activation_bytes(self.config) * chunk + 2 * 4 * self.config.vocab_size)

    def check_memory(self, batch: int, n: int, max_len: int) -> None:
        """Refuses what does not fit into the memory that the devices have free, the weights being there already.

        Args:
          batch: prompts.
          n: samples of each.
          max_len: tokens of each row.

        Raises:
          ConfigError: says what is needed and what there is.
        """
        cache = self.cache_bytes(batch * n, max_len) + (self.cache_bytes(batch, max_len) if n > 1 else 0)
        needed = cache + self.activation_bytes(batch, max_len)
        for device in self.mesh.local_devices:
            if needed > (free := free_bytes(device)):
                raise ConfigError(
                    f"The KV cache of {batch * n} row(s) of {max_len} tokens needs {cache / 2**30:.2f} GiB on each "
                    f"device, and filling it {(needed - cache) / 2**30:.2f} GiB more; beside the weights, {device} "
                    f"has {free / 2**30:.2f} GiB free: generate fewer rows at a time, or shorter ones, or use a "
                    "larger mesh (tensor, data or context)."
                )

    def padded(self, rows: int) -> int:
        """`rows` rounded up so that every device of the `data` axis gets the same number."""
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
          max_new_tokens: of each prompt, at least 1.
          n: samples of each prompt: rows n*p to n*p + n - 1 are those of prompt p.
          sampling: how tokens are chosen, for all prompts or for each.
          seed: of the sampling, for all prompts or for each.
          eos_id: id after which a row is done, for all prompts or for each.
          max_len: tokens that the cache holds for each row; None: what is needed, rounded up to `LENGTH_UNIT`.
          batch: fewer prompts than this are padded, so that a last smaller batch does not recompile.

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
            # Each padded prompt would become n rows: the samples are run as prompts of their own instead.
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
            # The cache of n rows for each prompt is another one: it has no use for the memory of the first.
            donate = (0, 2, 3, 4) if n == 1 else (2, 3, 4)
            key = ("begin", shape, n, jax.tree.structure(row_sampling))
            state, token_B = self.call(key, first, *args, donate=donate)
        return Rows(self, state, token_B, max_len)

    def _fill(self, prompts: Sequence[Sequence[int]], batch: int, max_len: int) -> tuple[Cache, jax.Array]:
        """A cache that holds the prompts, and the logits [B, V] after each."""
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
    """A batch in generation.

    Args:
      engine: that started it.
      state: donated by every call and replaced.
      first_B: the first token of each row.
      max_len: tokens that the cache was asked to hold for each row.
    """

    def __init__(self, engine: Engine, state: State, first_B: jax.Array, max_len: int):
        self.first_B, self.state = first_B, state
        self.cache_bytes_per_device = state.cache.bytes_per_device()
        self._engine = engine
        self._key = (len(first_B), max_len, jax.tree.structure(state.sampling))

    def step(self) -> jax.Array:
        """One more token of each row, [B], `NO_TOKEN` where a row is done. Returns before the device is ready."""
        engine = self._engine  # `one` must not hold on to `self`: to its cache

        def one(leaves: list[jax.Array], state: State) -> tuple[State, jax.Array]:
            return step(engine.model(leaves), engine.n_vocab, state)

        with jax.set_mesh(engine.mesh):
            args = engine.leaves, self.state
            self.state, token_B = engine.call(("step", *self._key), one, *args, donate=(1,))
        return token_B

    def run(self, n_steps: int = STEPS_PER_RUN) -> jax.Array:
        """Up to `n_steps` more tokens of each row, [STEPS_PER_RUN, B], `NO_TOKEN` where there is none."""
        engine = self._engine

        def many(leaves: list[jax.Array], state: State, n_steps: jax.Array) -> tuple[State, jax.Array]:
            return run(engine.model(leaves), engine.n_vocab, state, n_steps)

        with jax.set_mesh(engine.mesh):
            args = engine.leaves, self.state, engine.put(np.int32(min(n_steps, STEPS_PER_RUN)))
            self.state, out = engine.call(("run", *self._key), many, *args, donate=(1,))
        return out

    def stop(self, rows: Sequence[int]) -> None:
        """No more tokens for these rows."""
        keep_B = np.ones(len(self.first_B), np.int32)
        keep_B[list(rows)] = 0
        with jax.set_mesh(self._engine.mesh):
            left_B = self.state.left_B * self._engine.put(keep_B)
        self.state = dataclasses.replace(self.state, left_B=left_B)
