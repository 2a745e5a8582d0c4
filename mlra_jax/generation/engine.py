"""Generation on the device: a batch of rows, of which any may be filled with a prompt while the others go on.

*Prefill* runs prompts into rows of the cache in padded chunks, a *step* makes a token for each row that is not done.
It runs one call at a time (`Rows.step`, to show each token as it comes) or many times inside one compiled
`lax.while_loop` (`Rows.run`). The cache is donated from call to call, so only one exists. All processes of a cluster
see the same tokens, and so make the same decisions. Which prompt goes where, and when, is decided in `loop.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from mlra_jax.attention.kv_cache import Cache, put_rows, take_rows
from mlra_jax.config import ConfigError, ModelConfig, Range
from mlra_jax.generation.sampling import (
    GREEDY,
    NO_NUMBER,
    RowSampling,
    Sampling,
    Seen,
    log_probabilities,
    sample,
)
from mlra_jax.model import Transformer
from mlra_jax.ops.all_reduce import Workspace
from mlra_jax.ops.device import current_device
from mlra_jax.sharding import AxisRules, on_mesh

NO_TOKEN = -1
"""The token of a row that is done, in the output of a step."""

CHUNK_SIZES = (16, 64, 256, 1024, 4096)
"""Tokens per row of a chunk of the prompts; few, since each is compiled with each number of rows (`row_buckets`)."""
SMALL_CHUNK = 256
"""A chunk of fewer positions than this, over all rows of a device, takes as long: it reads the weights as well."""
PREFILL_BYTES = 2**30
"""Bytes of activations that one chunk of the prompts may take on a device, unless each row has only the smallest of
`CHUNK_SIZES`. For the 2.9 B models these are 4096 tokens, many times what products need to be bound by arithmetic."""
STEPS_PER_RUN = 64
"""Most steps of one compiled loop."""
LENGTH_UNIT = 256
"""Default cache lengths are multiples of this, so that a slightly longer prompt does not recompile."""


Logprobs = Annotated[int, Range(ge=0, le=20)]
"""How many of the most probable tokens may be listed."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One text to generate."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    max_new_tokens: int
    """Most tokens of the completion, at least 1."""
    sampling: Sampling = GREEDY
    """How its tokens are chosen."""
    seed: int = 0
    """Sampling seed."""
    sample: int = 0
    """Its number among the samples of the prompt, which all draw other tokens."""
    eos_id: int | None = None
    """The token that ends it; None: none does."""
    logprobs: Logprobs | None = None
    """Also give the log-probability of each token, and of this many most probable ones; None: neither."""
    may_stop: bool = False
    """Whether the caller may cancel it for what it reads (a stop string): tokens come in short runs then."""


class Chosen(NamedTuple):
    """The tokens of a step, and on request their log-probabilities; of a run, with a leading axis of steps."""

    id_B: Any
    """int32; `NO_TOKEN` for a row that got none, `NO_NUMBER` for one whose logits leave no choice."""
    logprob_B: Any = None
    """Float32."""
    top_id_BK: Any = None
    """The most probable tokens."""
    top_logprob_BK: Any = None
    """Theirs."""

    @classmethod
    def none(cls, *shape: int, top: int | None) -> Chosen:
        """No token anywhere, with room for the log-probabilities of `top` tokens, or of none at all."""
        ids = jnp.full(shape, NO_TOKEN)
        if top is None:
            return cls(ids)
        many = jnp.zeros((*shape, top), jnp.int32)
        return cls(ids, jnp.zeros(shape), many, many.astype(jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The input and output of a step. Everything but the cache and `seen` is whole on every device."""

    cache: Cache
    token_B: Any
    """The last token of each row, which is not in the cache yet: int32."""
    left_B: Any
    """How many more tokens each row gets, 0 if it is done: int32."""
    eos_B: Any
    """Id that ends each row, or `NO_TOKEN`: int32."""
    sampling: RowSampling
    """How each row's tokens are chosen."""
    seen: Seen | None = None
    """What penalties look at, if any row may have some."""


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


def row_buckets(rows: int) -> list[int]:
    """How many of a device's rows may be filled at once: powers of four up to a quarter of them, and all.

    All are filled in place. Fewer are copied out of the cache and back, which takes at most a quarter of its memory.
    """
    return [4**k for k in range(16) if 4 * 4**k <= rows] + [rows]


def chunk_shapes(config: ModelConfig, rows: int, max_len: int) -> list[tuple[int, int]]:
    """The shapes in which prompts may run: rows of a device, and tokens of each.

    Args:
      config: the model's configuration.
      rows: rows of the cache on each device.
      max_len: tokens per row.
    """
    # Twice: the input and the output of an operation exist at the same time.
    tokens = PREFILL_BYTES // (2 * activation_bytes(config))
    smallest, *larger = CHUNK_SIZES
    fits = lambda n, size: n * size <= tokens and size <= max_len
    buckets = row_buckets(rows)
    return [(n, smallest) for n in buckets] + [(n, size) for size in larger for n in buckets if fits(n, size)]


def next_chunk(left: Sequence[Sequence[int]], shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The shape of the next chunk: the one with the most tokens of prompts for its time.

    That is taken for proportional to its positions, at least `SMALL_CHUNK`, and a quarter of these for the call itself.

    Args:
      left: for each part of the batch, the tokens that its rows still have to run.
      shapes: see `chunk_shapes`.
    """

    def worth(shape: tuple[int, int]) -> tuple[float, int]:
        n, size = shape
        tokens = sum(sum(sorted((min(x, size) for x in part), reverse=True)[:n]) for part in left)
        return tokens / (max(n * size, SMALL_CHUNK) + SMALL_CHUNK / 4), tokens

    return max(shapes, key=worth)


def prefill(
    model: Transformer,
    cache: Cache,
    logits_BV: jax.Array,
    tokens_PT: jax.Array,
    n_new_P: jax.Array,
    start_P: jax.Array,
    row_P: jax.Array | None = None,
) -> tuple[Cache, jax.Array]:
    """Runs one chunk of some rows' prompts.

    Args:
      model: in the decode layout.
      cache: of all rows.
      logits_BV: those after the last token of each row's prompt so far.
      tokens_PT: the chunk, padded.
      n_new_P: tokens of each row, 0 for none.
      start_P: tokens that each row has already.
      row_P: which rows of their device these are (`take_rows`); None: all.

    Returns:
      The cache and the logits with the new ones; those of the other rows are as before.
    """
    if row_P is None:
        cache = dataclasses.replace(cache, lengths=jnp.where(n_new_P > 0, start_P, cache.lengths))
        new_B1V, cache = model.decode(tokens_PT, cache, n_new_P, logits="last")
        return cache, jnp.where(n_new_P[:, None] > 0, new_B1V[:, 0], logits_BV)
    new_P1V, part = model.decode(tokens_PT, cache.take(row_P, start_P), n_new_P, logits="last")
    logits_BV = put_rows(model.rules, logits_BV, row_P, new_P1V[:, 0], "batch", "vocab")
    return cache.put(row_P, part), logits_BV


def copy(
    rules: AxisRules,
    cache: Cache,
    logits_BV: jax.Array,
    from_P: jax.Array,
    to_P: jax.Array,
    length_P: jax.Array,
) -> tuple[Cache, jax.Array]:
    """Copies the first `length_P` tokens of rows, and their logits, to other rows of the same device."""
    logits_PV = take_rows(rules, logits_BV, from_P, "batch", "vocab")
    logits_BV = put_rows(rules, logits_BV, to_P, logits_PV, "batch", "vocab")
    return cache.put(to_P, cache.take(from_P, length_P)), logits_BV


def begin(
    rules: AxisRules,
    n_vocab: int,
    top: int | None,
    state: State,
    logits_BV: jax.Array,
    fresh_B: jax.Array,
    left_B: jax.Array,
    eos_B: jax.Array,
    sampling: RowSampling,
    prompt_BV: jax.Array | None,
) -> tuple[State, Chosen]:
    """Samples the first token of the rows `fresh_B`, bool, whose prompts have been run; the others stay as they are."""
    seen = None
    if prompt_BV is not None:
        fresh_B1 = rules.constrain(fresh_B, "batch")[:, None]
        count_BV, before_BV = jnp.zeros_like(prompt_BV, jnp.int32), prompt_BV
        if state.seen is not None:
            count_BV, before_BV = state.seen.count_BV, state.seen.prompt_BV
        seen = Seen(jnp.where(fresh_B1, prompt_BV, before_BV), jnp.where(fresh_B1, 0, count_BV))
    left_B = jnp.where(fresh_B, left_B, state.left_B)
    state = State(state.cache, state.token_B, left_B, eos_B, sampling, seen)
    return _with_next(rules, n_vocab, top, state, logits_BV, fresh_B)


def step(model: Transformer, n_vocab: int, state: State, top: int | None = None) -> tuple[State, Chosen]:
    """One more token for each row that is not done: the new state, and the tokens.

    A row that is done gets `NO_TOKEN`; a row whose logits leave no choice gets `NO_NUMBER` and is done.
    """
    rules = model.rules
    active_B = state.left_B > 0
    n_new_B = rules.constrain(active_B.astype(jnp.int32), "batch")
    tokens_B1 = rules.constrain(jnp.maximum(state.token_B, 0)[:, None], "batch", None)
    logits_B1V, cache = model.decode(tokens_B1, state.cache, n_new_B, logits="last")
    state = dataclasses.replace(state, cache=cache)
    with jax.named_scope("sample"):
        return _with_next(rules, n_vocab, top, state, logits_B1V[:, 0], active_B, model.workspace)


def _steps_at_once() -> int:
    """Steps between checks whether any row is left, a divisor of `STEPS_PER_RUN`.

    At each check a GPU waits for its host. Once all rows are done, further steps change nothing.
    """
    return 4 if current_device()[0] == "gpu" else 1


def run(
    model: Transformer,
    n_vocab: int,
    state: State,
    n_steps: jax.Array,
    n_idle: jax.Array,
    top: int | None = None,
) -> tuple[State, Chosen]:
    """Up to `n_steps` steps, fewer if only `n_idle` rows or fewer still are not done.

    Returns:
      The new state, and the tokens, [STEPS_PER_RUN, B].
    """
    Carry = tuple[jax.Array, State, Chosen]

    def go_on(carry: Carry) -> jax.Array:
        return jnp.sum(carry[1].left_B > 0) > n_idle

    def one(_: int, carry: Carry) -> Carry:
        i, state, out = carry
        state, chosen = step(model, n_vocab, state, top)
        write = functools.partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
        return i + 1, state, jax.tree.map(write, out, chosen)

    several = functools.partial(jax.lax.fori_loop, 0, _steps_at_once(), one)
    out = Chosen.none(STEPS_PER_RUN, len(state.token_B), top=top)
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
    rules: AxisRules,
    n_vocab: int,
    top: int | None,
    state: State,
    logits_BV: jax.Array,
    active_B: jax.Array,
    workspace: Workspace | None = None,
) -> tuple[State, Chosen]:
    """The state with a token sampled for each of the rows `active_B`, and these tokens."""
    position_B, seen = state.cache.lengths, state.seen
    token_B = sample(
        rules, logits_BV, state.sampling, n_vocab, position_B=position_B, seen=seen, workspace=workspace
    )
    token_B = rules.constrain(token_B, None)
    chosen = Chosen(jnp.where(active_B, token_B, NO_TOKEN))
    if top is not None:
        chosen = Chosen(chosen.id_B, *log_probabilities(rules, logits_BV, token_B, n_vocab, top))
    if seen is not None:
        made_B1 = rules.constrain(chosen.id_B, "batch")[:, None]
        count_BV = seen.count_BV + (made_B1 == jnp.arange(seen.count_BV.shape[1]))
        seen = dataclasses.replace(seen, count_BV=count_BV)
    state = dataclasses.replace(state, token_B=jnp.where(active_B, token_B, state.token_B), seen=seen)
    left_B = jnp.where(_ended(state), 0, state.left_B - 1)
    return dataclasses.replace(state, left_B=jnp.where(active_B, left_B, state.left_B)), chosen


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

        def one(leaves: list[jax.Array], state: State) -> tuple[State, Chosen]:
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

    def clock(self) -> float:
        """The time in seconds, from some beginning on, without what compiling took."""
        return time.perf_counter() - self.compile_seconds

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

    def chunk_shapes(self, rows: int, max_len: int) -> list[tuple[int, int]]:
        """The shapes in which the prompts of this many rows may run; see `chunk_shapes`."""
        with jax.set_mesh(self.mesh):
            return chunk_shapes(self.config, self.padded(rows) // self.rules.size("batch"), max_len)

    def filling_bytes(self, rows: int, max_len: int) -> int:
        """Bytes that running prompts into this many rows of `max_len` tokens takes on a device, besides the cache."""
        shapes = self.chunk_shapes(rows, max_len)
        local = max(n for n, _ in shapes)
        tokens = max(n * size for n, size in shapes)
        copied = max((n for n, _ in shapes if n < local), default=0)
        cache = self.cache_bytes(rows, max_len) * copied // local
        # Each row also has two sets of logits: this chunk's and the previous one's.
        return cache + 2 * activation_bytes(self.config) * tokens + local * 2 * 4 * self.config.vocab_size

    def check_memory(self, rows: int, max_len: int) -> None:
        """Checks that generation fits into the free memory of the devices, which hold the weights already.

        Args:
          rows: rows of the batch.
          max_len: tokens per row.

        Raises:
          ConfigError: it does not fit; the message says what is needed and what is free.
        """
        cache, filling = self.cache_bytes(rows, max_len), self.filling_bytes(rows, max_len)
        for device in self.mesh.local_devices:
            if cache + filling > (free := free_bytes(device)):
                raise ConfigError(
                    f"The KV cache of {rows} row(s) of {max_len} tokens needs {cache / 2**30:.2f} GiB on each "
                    f"device, and filling it {filling / 2**30:.2f} GiB more; besides the weights, {device} "
                    f"has {free / 2**30:.2f} GiB free: generate fewer rows at a time, or shorter ones, or use a "
                    "larger mesh (tensor, data or context)."
                )

    def padded(self, rows: int) -> int:
        """`rows` rounded up to a multiple of the devices along `data`."""
        with jax.set_mesh(self.mesh):
            parts = self.rules.size("batch")
        return round_up(rows, parts)


def _kind(sampling: Sampling) -> Hashable:
    """What of it makes the program: its class and the fields that it sets."""
    fields = dataclasses.fields(sampling)
    return type(sampling), frozenset(f.name for f in fields if getattr(sampling, f.name) != f.default)


class Rows:
    """A batch of rows on the device, each of them empty, generating, or done, which is as good as empty.

    A row's prompt is run into the cache by `fill` (in one or several chunks) or `copy`; then `begin` samples its first
    token, and `step` and `run` the others. No call waits for the device.

    Args:
      engine: the model.
      batch: number of rows, rounded up so that all devices along `data` have as many (`part_rows`).
      max_len: tokens that the cache holds per row.
      known: ways of sampling that will occur. Any other one compiles steps anew if it uses other fields.
      top: log-probabilities of how many tokens are computed besides those of the chosen one; None: of none at all.
    """

    def __init__(
        self,
        engine: Engine,
        batch: int,
        max_len: int,
        *,
        known: Sequence[Sampling] = (),
        top: int | None = None,
    ):
        self.batch, self.max_len, self.top = engine.padded(batch), max_len, top
        self._engine = engine
        self._known = {_kind(sampling): sampling for sampling in known}
        self._own = [Request((), 0, next(iter(known), GREEDY))] * self.batch
        with jax.set_mesh(engine.mesh):
            self.n_parts = engine.rules.size("batch")
            create = functools.partial(engine._create, self.batch, max_len)
            cache, self.logits_BV = engine.call(("create", self.batch, max_len), create)
            zeros = np.zeros(self.batch, np.int32)
            none = np.full_like(zeros, NO_TOKEN)
            sampling = self._row_sampling()
            seen = None
            if sampling.has_penalties:
                shape = self.batch, engine.config.vocab_size
                seen = Seen(
                    *(engine.put(np.zeros(shape, dtype), "batch", None) for dtype in (bool, np.int32))
                )
            token_B, left_B, eos_B, sampling = jax.tree.map(engine.put, (none, zeros, none, sampling))
            self.state = State(cache, token_B, left_B, eos_B, sampling, seen)
        self.part_rows = self.batch // self.n_parts
        """Rows on each device."""
        self.cache_bytes_per_device = cache.bytes_per_device()

    @property
    def _key(self) -> tuple[Hashable, ...]:
        return self.batch, self.max_len, self.top, jax.tree.structure((self.state.sampling, self.state.seen))

    def _row_sampling(self) -> RowSampling:
        samplings, seeds, samples = zip(*((r.sampling, r.seed, r.sample) for r in self._own), strict=True)
        return RowSampling.of(samplings, seeds, samples, [*self._known.values()])

    def _places(self, n: int, rows: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """Where each of `rows` is among `n` rows of each device, and which row of the device is in each place."""
        next_place = [part * n for part in range(self.n_parts)]
        row_P = np.full(n * self.n_parts, self.part_rows, np.int32)
        places = []
        for row in rows:
            part, local = divmod(row, self.part_rows)
            if n == self.part_rows:
                next_place[part] = row
            row_P[next_place[part]] = local
            places.append(next_place[part])
            next_place[part] += 1
        return places, row_P

    def fill(self, chunks: Mapping[int, tuple[int, Sequence[int]]], n: int, size: int) -> None:
        """Runs a chunk of some rows' prompts.

        Args:
          chunks: for each of these rows, how many tokens it has already, and the next ones, at most `size`.
          n: rows of each device that are run, at least as many as any device has in `chunks`; `part_rows`, or fewer.
          size: padded tokens of each.
        """
        engine, whole = self._engine, n == self.part_rows
        places, row_P = self._places(n, [*chunks])
        tokens_PT = np.zeros((len(row_P), size), np.int32)
        n_new_P, start_P = np.zeros((2, len(row_P)), np.int32)
        for place, (start, tokens) in zip(places, chunks.values(), strict=True):
            tokens_PT[place, : len(tokens)] = tokens
            n_new_P[place], start_P[place] = len(tokens), start
        arrays = (tokens_PT, n_new_P, start_P, *([] if whole else [row_P]))
        chunk = lambda leaves, *args: prefill(engine.model(leaves), *args)
        with jax.set_mesh(engine.mesh):
            args = self.state.cache, self.logits_BV, *(engine.put(x, "batch") for x in arrays)
            key = ("prefill", self.batch, self.max_len, n, size)
            cache, self.logits_BV = engine.call(key, chunk, engine.leaves, *args, donate=(1, 2))
        self.state = dataclasses.replace(self.state, cache=cache)

    def copy(self, copies: Mapping[int, tuple[int, int]]) -> None:
        """Copies the first tokens of rows to others, which then have these alone.

        Args:
          copies: for each row that gets some, the row that has them, of the same device, and their number.
        """
        engine = self._engine
        most = max(sum(row // self.part_rows == part for row in copies) for part in range(self.n_parts))
        buckets = [b for b in row_buckets(self.part_rows) if b < self.part_rows] or [1]
        n = next((b for b in buckets if b >= most), buckets[-1])
        todo: list[dict[int, tuple[int, int]]] = [{}]
        for row, copied in copies.items():
            part = row // self.part_rows
            if sum(other // self.part_rows == part for other in todo[-1]) == n:
                todo.append({})
            todo[-1][row] = copied
        one = functools.partial(copy, engine.rules)
        for group in todo:
            places, to_P = self._places(n, [*group])
            from_P, length_P = np.zeros((2, len(to_P)), np.int32)
            for place, (source, length) in zip(places, group.values(), strict=True):
                from_P[place], length_P[place] = source % self.part_rows, length
            with jax.set_mesh(engine.mesh):
                args = (engine.put(x, "batch") for x in (from_P, to_P, length_P))
                key = ("copy", self.batch, self.max_len, n)
                found = engine.call(key, one, self.state.cache, self.logits_BV, *args, donate=(0, 1))
            cache, self.logits_BV = found
            self.state = dataclasses.replace(self.state, cache=cache)

    def begin(self, requests: Mapping[int, Request]) -> Chosen:
        """Samples the first token of these rows, whose prompts are in the cache; the others get `NO_TOKEN`."""
        engine = self._engine
        for row, request in requests.items():
            self._own[row] = request
            self._known.setdefault(_kind(request.sampling), request.sampling)
            if request.logprobs is not None:
                self.top = max(request.logprobs, self.top or 0)
        sampling = self._row_sampling()
        fresh_B = np.isin(np.arange(self.batch), [*requests])
        left_B = np.array([r.max_new_tokens for r in self._own], np.int32)
        eos_B = np.array([NO_TOKEN if r.eos_id is None else r.eos_id for r in self._own], np.int32)
        with jax.set_mesh(engine.mesh):
            args = jax.tree.map(engine.put, (fresh_B, left_B, eos_B, sampling))
            prompt_BV = None
            if sampling.has_penalties:
                seen_BV = np.zeros((self.batch, engine.config.vocab_size), bool)
                for row, request in requests.items():
                    seen_BV[row, list(request.prompt)] = True
                prompt_BV = engine.put(seen_BV, "batch", None)
            first = functools.partial(begin, engine.rules, engine.n_vocab, self.top)
            key = ("begin", *self._key, jax.tree.structure(sampling))
            cache = self.state.cache
            without = dataclasses.replace(self.state, cache=Cache((), cache.lengths))
            state, chosen = engine.call(key, first, without, self.logits_BV, *args, prompt_BV)
        self.state = dataclasses.replace(state, cache=cache)
        return chosen

    def step(self) -> Chosen:
        """One more token of each row."""
        engine, top = self._engine, self.top  # `one` must not keep `self`, and so the cache, alive

        def one(leaves: list[jax.Array], state: State) -> tuple[State, Chosen]:
            return step(engine.model(leaves), engine.n_vocab, state, top)

        with jax.set_mesh(engine.mesh):
            args = engine.leaves, self.state
            self.state, chosen = engine.call(("step", *self._key), one, *args, donate=(1,))
        return chosen

    def run(self, n_steps: int = STEPS_PER_RUN, n_idle: int = 0) -> Chosen:
        """Up to `n_steps` more tokens of each row, fewer once at most `n_idle` rows still generate."""
        engine, top = self._engine, self.top

        def many(
            leaves: list[jax.Array], state: State, n_steps: jax.Array, n_idle: jax.Array
        ) -> tuple[State, Chosen]:
            return run(engine.model(leaves), engine.n_vocab, state, n_steps, n_idle, top)

        with jax.set_mesh(engine.mesh):
            limits = (engine.put(np.int32(x)) for x in (min(n_steps, STEPS_PER_RUN), n_idle))
            args = engine.leaves, self.state, *limits
            self.state, out = engine.call(("run", *self._key), many, *args, donate=(1,))
        return out

    def stop(self, rows: Sequence[int]) -> None:
        """Ends these rows."""
        keep_B = np.ones(self.batch, np.int32)
        keep_B[list(rows)] = 0
        with jax.set_mesh(self._engine.mesh):
            left_B = self.state.left_B * self._engine.put(keep_B)
        self.state = dataclasses.replace(self.state, left_B=left_B)
