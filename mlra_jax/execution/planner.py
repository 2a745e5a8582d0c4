"""Plans a train step before anything is compiled: estimates its memory and time, and chooses settings that fit.

Parameters, moments and gradients are counted exactly; what each layer saves for the backward pass is read off the
traced program of one layer, so that it follows the attention kernels and the mesh. XLA's other needs (one layer's
backward pass, a chunk of logits) are estimated; docs/scaling.md compares the sum with the compiler's own count.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mlra_jax.config import ConfigError, ExecutionConfig, Gather, ModelConfig, Remat, TrainConfig
from mlra_jax.execution.accelerators import GIB, device_memory, find_accelerator
from mlra_jax.execution.roofline import Costs, step_costs
from mlra_jax.model import Transformer, cast_weights, from_params
from mlra_jax.model.transformer import REMAT_POLICIES
from mlra_jax.sharding import ZIGZAG_RULES, on_mesh
from mlra_jax.training.losses import logit_chunks
from mlra_jax.training.step import abstract_state, unrolls_layers

HEADROOM = 0.96
"""Fraction of a device's memory that a plan may fill; the rest is for fragmentation and what the estimate misses."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to run a train step, with its estimated memory and time on each device.

    Attributes:
      remat: what layers save (`ExecutionConfig.remat`).
      micro_batch: sequences per data-parallel device and micro-batch.
      accumulation: micro-batches in a step.
      gather: when weights that fsdp splits are gathered (`ExecutionConfig.gather`).
      memory: bytes per device, by use.
      capacity: memory of a device in bytes; None: unknown.
      costs: FLOPs and bytes of a step.
    """

    remat: Remat
    micro_batch: int
    accumulation: int
    gather: Gather
    memory: dict[str, int]
    capacity: int | None
    costs: Costs

    @property
    def total(self) -> int:
        """Total bytes per device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether it fits, as far as the memory is known."""
        return self.capacity is None or self.total <= HEADROOM * self.capacity

    def __str__(self) -> str:
        of = f" of {_shown(self.capacity)}" if self.capacity else ""
        parts = ", ".join(f"{what} {_shown(size)}" for what, size in self.memory.items() if size)
        gathered = ", weights gathered once a step" if self.gather == "step" else ""
        return (
            f"micro-batch {self.micro_batch} (x {self.accumulation}), remat {self.remat}{gathered}, about "
            f"{_shown(self.total)}{of} of each device ({parts})"
        )


def _shown(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size > GIB / 10 else f"{size / 2**20:.1f} MiB"


def device_bytes(tree: Any, mesh: Mesh | AbstractMesh, gathered: bool = False) -> int:
    """Bytes per device of `mesh` of the abstract arrays of `tree`; `gathered`: without splitting over fsdp."""

    def one(x: Any) -> int:
        spec = x.sharding.spec if x.sharding is not None else PartitionSpec()
        if gathered:
            spec = PartitionSpec(*(None if entry == "fsdp" else entry for entry in spec))
        return math.prod(NamedSharding(mesh, spec).shard_shape(x.shape)) * x.dtype.itemsize

    return sum(one(x) for x in jax.tree.leaves(tree))


@functools.lru_cache(maxsize=64)
def _kept(model: ModelConfig, execution: ExecutionConfig, seq_len: int, mesh: AbstractMesh) -> int:
    """`Planner.kept`, read off the traced program of one layer."""
    with jax.sharding.use_abstract_mesh(mesh):
        new = lambda: nnx.to_pure_dict(nnx.state(Transformer(model, rngs=nnx.Rngs(0)), nnx.Param))
        weights = on_mesh(jax.eval_shape(lambda: cast_weights(model, new())), mesh)
        states = lambda weights: from_params(model, weights).scanned_layer()[1]
        state = jax.eval_shape(lambda weights: jax.tree.map(lambda x: x[0], states(weights)), weights)
        shape = (mesh.shape["data"] * mesh.shape["fsdp"], seq_len, model.d_model)
        spec = ZIGZAG_RULES.spec("batch", "length", None)
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

        def pullback(x: jax.Array, state: Any) -> Any:
            layer = from_params(model, weights, rules=ZIGZAG_RULES, execution=execution).scanned_layer()[0]
            return jax.vjp(layer, x, state)[1]

        jaxpr = jax.make_jaxpr(pullback)(x, state).jaxpr
    saved = {v for v in jaxpr.outvars if not hasattr(v, "val")} - {*jaxpr.invars, *jaxpr.constvars}
    once = {_origin(jaxpr, v): v.aval for v in saved}
    return device_bytes([x, *once.values()], mesh)


def _origin(jaxpr: Any, var: Any) -> tuple[Any, ...]:
    """Identifies the value of `var`: the same for two results of a call that are one value in the called program.

    A kernel's output that is also a residual is such a pair; XLA keeps it once.
    """
    for i, equation in enumerate(jaxpr.eqns):
        if var in equation.outvars:
            called = equation.params.get("jaxpr")
            called = getattr(called, "jaxpr", called)
            if called is None or len(called.outvars) != len(equation.outvars):
                break
            return i, *_origin(called, called.outvars[equation.outvars.index(var)])
    return (var,)


class Planner:
    """Estimates the train step of `config` on `mesh`; what does not depend on the plan is computed once.

    All is traced for the kind of device that the mesh is of, which may be one that is only described: the estimate for
    it is the same wherever it is made with the same versions of JAX and of optional libraries.

    Args:
      config: the run; its own mesh is ignored.
      mesh: mesh of present or described devices (`abstract_mesh`).
      capacity: memory of one device in bytes; None: what the device or the table of accelerators says, if known.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh | AbstractMesh, capacity: int | None = None):
        self.config, self.mesh = config, mesh.abstract_mesh
        self.n_data = mesh.shape["data"] * mesh.shape["fsdp"]
        device = self.mesh.abstract_device
        chip = find_accelerator(device.device_kind)
        self._on_gpu = device.platform in ("gpu", "cuda")
        if capacity is None and isinstance(mesh, Mesh):
            capacity = device_memory(mesh.devices.flat[0])
        elif capacity is None and chip is not None:
            capacity = chip.memory
        self.capacity = capacity
        # For comparing plans; an unknown device is taken to have an H100's proportions.
        self._chip = chip or find_accelerator("H100")
        self._state = abstract_state(config, self.mesh)
        with jax.sharding.use_abstract_mesh(self.mesh):
            self._weights = jax.eval_shape(lambda p: cast_weights(config.model, p), self._state.params)

    def _bytes(self, tree: Any, gathered: bool = False) -> int:
        return device_bytes(tree, self.mesh, gathered)

    def kept(self, remat: Remat) -> int:
        """Bytes that one layer saves, its input included, for one sequence per data-parallel device."""
        execution = dataclasses.replace(self.config.execution, remat=remat)
        return _kept(self.config.model, execution, self.config.data.seq_len, self.mesh)

    def plan(self, micro_batch: int, remat: Remat, gather: Gather = "layer") -> Plan:
        """Estimates this choice; `micro_batch` must divide the sequences of a data-parallel device."""
        config, mesh = self.config, self.mesh
        accumulation = config.data.global_batch // (micro_batch * self.n_data)
        gather = gather if accumulation > 1 else "layer"
        model, once = config.model, gather == "step"
        execution = dataclasses.replace(config.execution, gather=gather)
        layers = self._weights["layers"]
        # With unrolled layers, each one's gradients are added to the sum as soon as they are computed.
        with jax.sharding.use_abstract_mesh(mesh):
            added_at_once = accumulation > 1 and unrolls_layers(execution, accumulation)
        cast = [w for w in jax.tree.leaves(layers) if w.dtype != model.param_dtype]
        gathered = 2 * jnp.dtype(model.compute_dtype).itemsize * self._layer_size()  # and their gradients
        tokens = micro_batch * config.data.seq_len // mesh.shape["context"]
        vocab = model.vocab_size // mesh.shape["tensor"]
        size = logit_chunks(tokens, vocab)[1]
        width = jnp.dtype(model.compute_dtype).itemsize
        # The backward pass of a layer holds everything that its forward pass produced, at once.
        layer = micro_batch * max(self.kept("none") - self.kept(remat), 0) + gathered
        # Logits, their gradient, and the token matrix: cast, and its gradient.
        logits = (4 + width) * size * vocab + (4 + width) * vocab * model.d_model
        if once:
            weights = {"gathered weights": self._bytes(self._weights, True)}
        else:
            weights = {f"{model.compute_dtype} weights": self._bytes(cast)}
        memory = {
            "parameters": self._bytes(self._state.params),
            "moments": self._bytes((self._state.opt_state, self._state.step)),
            **weights,
            "gradients": self._bytes(self._weights["embedding"] if added_at_once else self._weights, once),
            "accumulated gradients": self._float32_bytes(gathered=once) if accumulation > 1 else 0,
            "activations": micro_batch * model.n_layers * self.kept(remat),
            "working space": max(layer, logits),
        }
        count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
        costs = step_costs(
            config,
            mesh.shape,
            micro_batch=micro_batch,
            remat=remat,
            n_params=count(self._weights),
            layer_params=count(layers) // model.n_layers,
            operands=self.kept("products"),
            kept=self.kept(remat),
            gather=gather,
        )
        return Plan(remat, micro_batch, accumulation, gather, memory, self.capacity, costs)

    def _layer_size(self) -> int:
        """The number of elements of one layer's gathered weights on a device."""
        whole = self.mesh.shape["fsdp"]
        return self._float32_bytes(self._state.params["layers"]) // 4 * whole // self.config.model.n_layers

    def _float32_bytes(self, tree: Any = None, gathered: bool = False) -> int:
        tree = self._state.params if tree is None else tree
        as_float32 = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
        return self._bytes(jax.tree.map(as_float32, tree), gathered)

    def micro_batches(self) -> list[int]:
        """The micro-batch sizes that divide the global batch."""
        sequences = self.config.data.global_batch // self.n_data
        return [n for n in range(1, sequences + 1) if sequences % n == 0]

    def choose(self) -> Plan:
        """The fastest plan that fits; chooses micro-batch (0), remat and gather where the run leaves them open.

        If the devices' memory is unknown (a CPU), these are 1, full and layer.

        Raises:
          ConfigError: nothing fits; says what takes the memory, and what to change.
        """
        asked_batch, asked_remat = self.config.data.micro_batch, self.config.execution.remat
        batches = [asked_batch] if asked_batch else self.micro_batches()
        remats: Iterable[Remat] = REMAT_POLICIES if asked_remat == "auto" else [asked_remat]
        gathers = self._gathers()
        if self.capacity is None:
            return self.plan(batches[0], "full" if asked_remat == "auto" else asked_remat, gathers[0])
        plans = [self.plan(b, r, g) for b in batches for r in remats for g in gathers]
        if fitting := [p for p in plans if p.fits]:
            assert self._chip is not None
            chip = self._chip
            return min(fitting, key=lambda p: (p.costs.in_sequence(chip), p.total))
        raise ConfigError(self._refusal(min(plans, key=lambda p: p.total)))

    def _gathers(self) -> list[Gather]:
        """The choices of `ExecutionConfig.gather`, the one that takes least memory first."""
        mesh, asked = self.mesh.shape, self.config.execution.gather
        if asked != "auto":
            return [asked]
        alone = mesh["fsdp"] > 1 and mesh["tensor"] == mesh["context"] == 1
        return ["layer", "step"] if alone and self._on_gpu else ["layer"]

    def _refusal(self, least: Plan) -> str:
        mesh, changes = self.mesh.shape, []
        if self.config.data.micro_batch > 1:
            changes.append("--data.micro-batch 0 (what fits)")
        if self.config.execution.remat not in ("auto", "full"):
            changes.append("--execution.remat auto (what fits)")
        if least.gather == "step":
            changes.append("--execution.gather auto (what fits)")
        state = sum(v for k, v in least.memory.items() if k not in ("activations", "working space"))
        if state > least.total / 2:
            changes.append(
                f"more devices on --mesh.fsdp (now {mesh['fsdp']}), which split parameters and moments"
            )
            if mesh["data"] > 1:
                changes.append(f"--mesh.fsdp {mesh['data'] * mesh['fsdp']} --mesh.data 1 on these")
        else:
            changes.append(
                f"more devices on --mesh.context (now {mesh['context']}) or --mesh.tensor (now {mesh['tensor']}), "
                "which split activations"
            )
        return f"The train step does not fit: {least}. Try {', or '.join(changes)}."


def resolve(
    config: TrainConfig, mesh: Mesh | AbstractMesh, capacity: int | None = None
) -> tuple[TrainConfig, Plan]:
    """Chooses a run's micro-batch, remat and gather; returns the run with them, and the plan.

    Args:
      config: the run.
      mesh: its devices.
      capacity: see `Planner`; must be the same on all processes.

    Raises:
      ConfigError: it does not fit.
    """
    plan = Planner(config, mesh, capacity).choose()
    execution = dataclasses.replace(config.execution, remat=plan.remat, gather=plan.gather)
    data = dataclasses.replace(config.data, micro_batch=plan.micro_batch)
    return dataclasses.replace(config, execution=execution, data=data), plan
