"""Compiles and times the decode step of whole attention layers on a mesh, or one device's share of it.

A layer is the package's own module in the decode layout: projections, absorption, append, attention, up-projection and
output, with their collectives, by the kernels that a model's step has. Layers are chained as in a model; a compiled
loop runs over a few of them, each with its own weights and cache, which together exceed a GPU's L2 cache.

One device's share of a layer on T devices is a smaller layer: it has the device's latent (or KV) heads, the query heads
that these serve, and everything that is replicated. It takes as long as the device would if collectives were free.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from benchmarks.decode_step import describe, filled, random_values
from benchmarks.measure import COMPILING_AT_ONCE, Timing, attempt, kernel_ops, measure, rotation, together
from mlra_jax.attention.kv_cache import Cache
from mlra_jax.config import ConfigError, MeshConfig, ModelConfig
from mlra_jax.execution.accelerators import find_accelerator
from mlra_jax.generation.engine import LENGTH_UNIT, compiler_options, free_bytes, round_up
from mlra_jax.ops.all_reduce import Workspace, all_reduce
from mlra_jax.sharding import AxisRules, check_decode_layout, decode_rules, make_mesh, on_mesh

PROGRAM_US = 1500.0
"""Approximate duration of a program."""
MOST_LAYERS = 8
"""Maximum per program: layers smaller than an eighth of the L2 cache are not worth more compile time."""

EXCHANGE = re.compile(
    r"nccl|^(?!loop_|input_|wrapped_).*(all.?reduce|psum|all.?gather|reduce.?scatter|all.?to.?all|collective)",
    re.IGNORECASE,
)
"""Kernels of collectives."""
ATTENTION = re.compile(r"(decode|merge)_attention|/attend/")
"""Kernels of decode attention, by their names or XLA's operation names."""


def share_of(config: ModelConfig, tensor: int) -> ModelConfig:
    """A model as large as one device's share of `config` split over `tensor` devices.

    For MLRA the share is that of the layout with whole query heads (`--split-heads no`): W_qb and W_o are replicated,
    and a layer's only collective sums the devices' outputs. Where a device's latent heads serve only some query heads
    (MLRA-2 on four devices), attention counts all of them, which reads no more cache.

    Raises:
      ConfigError: a size does not divide.
    """
    a = config.attention
    faults = [
        f"{name}={size} cannot be cut into {tensor} shares."
        for name, size in (
            ("n_heads", config.n_heads),
            ("d_ff", config.d_ff),
            ("vocab_size", config.vocab_size),
        )
        if size % tensor
    ]
    held, copies = divmod(config.cached_heads, tensor)
    if copies and (held or tensor % config.cached_heads or a.n_branches > 1):
        faults.append(f"{config.cached_heads} latent or KV heads cannot be cut into {tensor} shares.")
    if faults:
        raise ConfigError(faults)
    held = max(held, 1)
    return dataclasses.replace(
        config,
        attention=a.share(held),
        n_heads=config.n_heads if a.n_branches > 1 else config.n_heads // tensor,
        d_ff=config.d_ff // tensor,
        vocab_size=config.vocab_size // tensor,
    )


@dataclasses.dataclass(frozen=True)
class Place:
    """A model's layout on devices."""

    variant: str
    config: ModelConfig
    """The whole model."""
    tensor: int = 1
    data: int = 1
    split_heads: bool = True
    """Whether the query heads of W_qb and W_o are split over `tensor`."""
    share: bool = False
    """Whether to run only one device's share, without collectives."""
    split_tokens: bool = False
    """Whether the devices split the tokens of the cache instead of its heads (decode context parallelism)."""

    @property
    def name(self) -> str:
        """For messages."""
        tokens = " split tokens" if self.split_tokens else ""
        return f"{self.variant} tensor {self.tensor} {self.heads}{tokens}"

    @property
    def heads(self) -> str:
        """Layout of the query heads."""
        return "split" if self.split_heads or self.tensor == 1 else "whole"

    @property
    def runs(self) -> ModelConfig:
        """The model to run."""
        return share_of(self.config, self.tensor) if self.share else self.config

    @property
    def rules(self) -> AxisRules:
        """The decoding table."""
        return decode_rules(self.split_heads, split_tokens=self.split_tokens)

    def mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """A mesh of the first devices, of all or of those given.

        Raises:
          ConfigError: the model cannot be laid out.
        """
        sizes = MeshConfig(data=1) if self.share else MeshConfig(data=self.data, tensor=self.tensor)
        check_decode_layout(self.runs, sizes, self.split_heads)
        devices = jax.devices() if devices is None else devices
        return make_mesh(sizes, devices[: sizes.data * sizes.tensor])


def places(variant: str, config: ModelConfig, tensor: int, n_devices: int) -> list[Place]:
    """The layouts of a model split over `tensor` devices: on them, or as a share if there are fewer.

    MLRA has two layouts: with query heads split, and whole. MLA has its whole cache on each device, or splits the
    cache's tokens, with query heads split and whole; the latter two need the devices.
    """
    share = tensor > n_devices
    if tensor == 1:
        return [Place(variant, config, share=share)]
    if config.attention.n_branches > 1:
        found = [Place(variant, config, tensor, split_heads=split) for split in (True, False)]
        return [dataclasses.replace(found[-1], share=True)] if share else found
    found = [Place(variant, config, tensor, share=share)]
    if config.cached_heads == 1 and not share:
        found += [Place(variant, config, tensor, split_heads=s, split_tokens=True) for s in (True, False)]
    return found


@dataclasses.dataclass(frozen=True)
class Row:
    """Measurement of a layer's decode step."""

    variant: str
    tensor: int
    data: int
    heads: str
    share: bool
    batch: int
    """Batch size over all devices that ran."""
    context: int
    """Tokens that each row attends to, the new one included."""
    timing: Timing
    """Device time from a profile, in which XLA launches kernels one by one, with gaps where the host is slow."""
    wall_us: float
    """Host time without a profile, from a program's call to its result, per layer."""
    attention_us: float | None
    """Kernels of attention over the cache; None where the profile shows no GPU."""
    exchange_us: float | None
    """Collectives, including waiting for other devices."""
    weight_bytes: int
    """Per device."""
    cache_bytes: int
    """Read in a step, per device."""
    bandwidth: float | None
    """Memory bandwidth of a device by its data sheet, in bytes per second."""
    split_tokens: bool = False
    """See `Place`."""

    @property
    def bound_us(self) -> float | None:
        """Time to read weights and cache once, in us."""
        return 1e6 * (self.weight_bytes + self.cache_bytes) / self.bandwidth if self.bandwidth else None

    @property
    def us(self) -> float:
        """Time of a layer: the smaller of the two measurements, each of which is at least the devices' time."""
        return min(self.timing.us, self.wall_us)

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self) | {"us": self.us, "bound_us": self.bound_us}


def split_kernels(kernels: Mapping[str, float], hlo: str) -> tuple[float | None, float | None]:
    """Sums a layer's kernels (us by name): those of attention over the cache, and those of collectives."""
    if not kernels:
        return None, None
    ops = kernel_ops(hlo)
    exchanges = {name for name in kernels if EXCHANGE.search(name)}
    attention = {name for name in kernels if ATTENTION.search(name) or ATTENTION.search(ops.get(name, ""))}
    total = lambda names: sum(kernels[name] for name in names)
    return total(attention - exchanges), total(exchanges)


def device_bytes(tree: Any) -> int:
    """Bytes per device of arrays, concrete or abstract."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


class Layers:
    """A few attention layers in a compiled loop.

    Args:
      place: layout of the layers.
      batch: rows, over all devices that run.
      contexts: context lengths to measure, in tokens.
      devices: devices to use, possibly only described; None: all present ones.

    Raises:
      ConfigError: the model cannot be laid out.
    """

    def __init__(
        self, place: Place, batch: int, contexts: Sequence[int], devices: Sequence[jax.Device] | None = None
    ):
        self.place, self.batch, self.mesh = place, batch, place.mesh(devices)
        config, rules = place.runs, place.rules
        self._workspace = Workspace.shapes(self.mesh, rules, config.d_model)
        capacity = round_up(max(contexts), LENGTH_UNIT)

        def abstract(n: int) -> tuple[Any, Cache, Any]:
            """`n` layers, their caches, and the input of the first."""
            sizes = dataclasses.replace(config, n_layers=n)
            new = lambda: config.attention.module()(config, rngs=nnx.Rngs(0), rules=rules, layout="decode")
            cache = jax.eval_shape(functools.partial(Cache.create, sizes, rules, batch, capacity))
            zeros = lambda: jnp.zeros((batch, 1, config.d_model), config.compute_dtype)
            x = jax.eval_shape(lambda: rules.constrain(zeros(), "batch", None, None))
            return describe(lambda: nnx.List([new() for _ in range(n)])), cache, x

        with jax.set_mesh(self.mesh):
            layer, cache, _ = abstract(1)
            self.weight_bytes = device_bytes(layer)
            self._bytes_per_token = device_bytes(cache.layers) / cache.capacity
            size = self.weight_bytes + int(self._bytes_per_token * min(contexts))
            self.n_layers, calls = rotation(size, PROGRAM_US)
            self.n_layers = min(self.n_layers, MOST_LAYERS)
            self.calls = max(1, calls // self.n_layers) * self.n_layers
            self._abstract = abstract(self.n_layers)

    def compile(self) -> jax.stages.Compiled:
        """Compiles the program: from the layers' leaves, caches (donated) and first input to caches and last output.

        On present devices, also compiles what `fill` needs.
        """
        layers, cache, x = self._abstract
        leaves, treedef = jax.tree.flatten((layers, self._workspace))
        rounds = self.calls // self.n_layers

        def many(leaves: list[Any], cache: Cache, x_BTD: jax.Array) -> tuple[Cache, jax.Array]:
            layers, workspace = jax.tree.unflatten(treedef, leaves)
            one_B = jnp.ones_like(cache.lengths)

            def once(_: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
                caches, x_BTD = list(carry[0]), carry[1]
                for i, layer in enumerate(layers):
                    reduce = workspace is None
                    x_BTD, caches[i] = layer.decode(x_BTD, caches[i], cache.lengths, one_B, reduce=reduce)
                    if workspace is not None:
                        x_BTD = self._sum(x_BTD, workspace)
                return tuple(caches), x_BTD

            caches, x_BTD = jax.lax.fori_loop(0, rounds, once, (cache.layers, x_BTD))
            return Cache(caches, cache.lengths), x_BTD

        with jax.set_mesh(self.mesh):
            if self.mesh.devices.flat[0] in jax.devices():
                fill = lambda key: (random_values(layers, key), filled(cache, key))
                self._random = jax.jit(fill).lower(jax.random.key(0)).compile()
            lowered = jax.jit(many, donate_argnums=1).lower(*on_mesh((leaves, cache, x), self.mesh))
            return lowered.compile(compiler_options=compiler_options(self.mesh))

    def _sum(self, parts: jax.Array, workspace: Workspace) -> jax.Array:
        """What the devices' parts of a layer's output [P, B, 1, D] add up to, in the compute type."""
        part, row = ("mlp",), ("batch", None, None)
        add = lambda y, workspace: all_reduce(y[0], workspace, axis="tensor").astype(self._abstract[2].dtype)
        names = ((*part, *row), Workspace(part, part))
        return self.place.rules.shard_map(add, names, row, check_vma=False)(parts, workspace)

    def fill(self) -> tuple[list[jax.Array], Cache, jax.Array]:
        """Makes random arguments of the compiled program: leaves, caches without lengths, and input.

        Raises:
          ConfigError: the devices have too little memory.
        """
        needed = device_bytes(self._abstract)
        for device in self.mesh.local_devices:
            if needed > (free := free_bytes(device)):
                raise ConfigError(
                    f"{self.n_layers} layers with a batch of {self.batch} and their caches need "
                    f"{needed / 2**30:.1f} GiB; {device} has {free / 2**30:.1f} GiB free."
                )
        *_, x = self._abstract
        with jax.set_mesh(self.mesh):
            layers, cache = self._random(jax.random.key(0))
        draw = np.random.default_rng(0).standard_normal(x.shape, np.float32)
        workspace = Workspace.create(self.mesh, self.place.rules, self.place.runs.d_model)
        return jax.tree.leaves((layers, workspace)), cache, self._by_row(draw.astype(x.dtype))

    def _by_row(self, value: np.ndarray) -> jax.Array:
        """Lays out the rows of a batch on the mesh."""
        with jax.set_mesh(self.mesh):
            return jax.device_put(value, NamedSharding(self.mesh, self.place.rules.spec("batch")))

    def at(self, cache: Cache, context: int) -> Cache:
        """Sets the lengths of the caches so that the next token attends to `context` tokens, itself included."""
        return dataclasses.replace(cache, lengths=self._by_row(np.full(self.batch, context - 1, np.int32)))

    def measure(self, program: jax.stages.Compiled, contexts: Sequence[int], runs: int) -> list[Row]:
        """Times the compiled program at each context, with random weights, caches and inputs.

        Raises:
          ConfigError: the devices have too little memory.
        """
        place = self.place
        leaves, cache, x_BTD = self.fill()
        state: list[Any] = [cache, x_BTD]
        del cache  # each run gives a new one for it
        rows = []
        for context in contexts:
            state[0] = self.at(state[0], context)

            def once() -> Any:
                state[0], state[1] = program(leaves, state[0], x_BTD)
                return state

            timing = measure(once, (), calls=self.calls, runs=runs)
            wall = []
            for _ in range(runs):
                start = time.perf_counter()
                jax.block_until_ready(once())
                wall.append(1e6 * (time.perf_counter() - start) / self.calls)
            chip = find_accelerator(self.mesh.devices.flat[0].device_kind)
            rows.append(
                Row(
                    place.variant,
                    place.tensor,
                    place.data,
                    place.heads,
                    place.share,
                    self.batch,
                    context,
                    timing,
                    statistics.median(wall),
                    *split_kernels(timing.kernels, program.as_text() or ""),
                    self.weight_bytes,
                    int(self._bytes_per_token * context),
                    chip.bandwidth if chip else None,
                    place.split_tokens,
                )
            )
        return rows


def measure_layers(
    jobs: Sequence[tuple[Place, int]], contexts: Mapping[int, Sequence[int]], runs: int
) -> Iterator[list[Row] | tuple[str, str]]:
    """Measures each layout and batch in turn; yields rows, or a name and why it could not be measured.

    Args:
      jobs: layouts, and batch sizes on the devices that run.
      contexts: context lengths by batch size.
      runs: timed runs of each.
    """
    for start in range(0, len(jobs), COMPILING_AT_ONCE):
        group = jobs[start : start + COMPILING_AT_ONCE]

        def compile_it(place: Place, batch: int) -> tuple[Layers, jax.stages.Compiled]:
            layers = Layers(place, batch, contexts[batch])
            return layers, layers.compile()

        programs = together([functools.partial(compile_it, *job) for job in group])
        for (place, batch), made in zip(group, programs, strict=True):
            rows: Any = made
            if not isinstance(made, Exception):
                layers, program = made
                rows = attempt(functools.partial(layers.measure, program, contexts[batch], runs))
                gc.collect()  # the next ones need the memory
            if isinstance(rows, Exception):
                yield (
                    f"{place.name} batch {batch}",
                    f"{type(rows).__name__}: {str(rows).strip().splitlines()[0]}",
                )
            else:
                yield rows
