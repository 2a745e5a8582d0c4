"""Ahead-of-time tracing and compilation for absent hardware: TPU slices and GPUs that are only described.

To trace for a `Topology`, as the planner does, nothing more is needed. To compile for it, the real compilers run on the
CPU: that for TPUs needs `libtpu` (`pip install libtpu`), that for GPUs JAX's CUDA plugin. Nothing is run or allocated.
"""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from mlra_jax.config import MeshConfig, TrainConfig
from mlra_jax.errors import UserError
from mlra_jax.execution.accelerators import KINDS, described_device, find_accelerator
from mlra_jax.execution.planner import resolve
from mlra_jax.sharding import TRAIN_RULES, abstract_mesh, check_train_layout, make_mesh
from mlra_jax.training.step import abstract_state, make_train_step

GPUS = {name: KINDS[name] for name in ("h100", "h200", "a100", "l4")}
"""JAX's names of GPUs, by short name."""
TPUS = {"v4": (3, 1), "v5e": (2, 1), "v5p": (3, 1), "v6e": (2, 1), "tpu7x": (3, 2)}
"""Dimensions of a slice, and JAX's devices on a chip."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that need not be present, by name; no plugin is needed to plan for them."""

    generation: str
    """A key of `GPUS` or `TPUS`."""
    shape: tuple[int, ...]
    """Chips of a TPU slice along its dimensions; or hosts, if there are several, and GPUs of one."""
    slices: int | None
    """Number of TPU slices, or a further factor of hosts; None: one, unnamed."""

    @classmethod
    def of(cls, name: str) -> Topology:
        """Reads a name such as those in `described_devices`.

        Raises:
          UserError: it is none.
        """
        slices, _, one = name.rpartition("*")
        generation, _, shape = one.partition(":")
        sizes = tuple(map(int, shape.split("x"))) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) else ()
        known = generation in GPUS or (generation in TPUS and len(sizes) == TPUS[generation][0])
        if (slices and not re.fullmatch(r"[1-9]\d*", slices)) or not sizes or not known:
            raise UserError(
                f"{name!r} is not a topology; it has a name such as v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, "
                "2*v5e:16x16 (two slices), h100:8, h100:4x8 (4 hosts of 8), h200:8, a100:8, l4:1."
            )
        return cls(generation, sizes, int(slices) if slices else None)

    @property
    def n_devices(self) -> int:
        """Number of JAX devices."""
        per_chip = 1 if self.generation in GPUS else TPUS[self.generation][1]
        return (self.slices or 1) * math.prod(self.shape) * per_chip

    def abstract_mesh(self, config: MeshConfig) -> AbstractMesh:
        """The mesh that `config` describes over these devices.

        Raises:
          ConfigError: the sizes do not multiply to the number of devices, or do not fit the slices.
        """
        slices = 1 if self.generation in GPUS else self.slices or 1
        return abstract_mesh(config.resolve(self.n_devices), described_device(self.generation), slices)


def described_devices(name: str) -> list[jax.Device]:
    """The devices of a topology, which need not be present.

    Args:
      name: a TPU slice (`v5e:16x16`, `v5p:4x4x4`, `v6e:16x16`, `tpu7x:4x4x4`), several of them (`2*v5e:16x16`), or GPUs
        of one host or several (`h100:8`, `h100:4x8`: 4 hosts of 8); GPUs are those of `GPUS`.

    Raises:
      UserError: no such topology, or the plugin that knows it is not installed.
    """
    t = Topology.of(name)
    if t.generation in GPUS:
        return gpu_devices(GPUS[t.generation], t.shape[-1], hosts=(t.slices or 1) * math.prod(t.shape[:-1]))
    several = {"num_slices": t.slices} if t.slices else {}
    slice_name = name.rpartition("*")[2]
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=slice_name, **several).devices
    except Exception as e:  # whatever the plugin raises
        raise UserError(
            f"The TPU topology {name!r} cannot be described: {e}. It needs `pip install libtpu` and a name such as "
            "v5e:4x4, v5p:2x2x1, v6e:4x4."
        ) from e


def topology_mesh(name: str, config: MeshConfig) -> Mesh:
    """The mesh that `config` describes over the devices of a topology (`described_devices`).

    Raises:
      UserError: no such topology, or its plugin is not installed.
      ConfigError: the mesh does not multiply to its number of devices.
    """
    return make_mesh(config, described_devices(name))


def gpu_devices(kind: str, n: int = 1, hosts: int = 1) -> list[jax.Device]:
    """Describes absent NVIDIA GPUs, for which XLA and kernels can be compiled on a CPU.

    Args:
      kind: JAX's name, such as `NVIDIA H100 80GB HBM3`; one of the GPUs in `mlra_jax.execution.accelerators`.
      n: GPUs per host.
      hosts: number of hosts.

    Raises:
      UserError: an unknown kind, or no CUDA plugin (`pip install jax-cuda13-plugin`).
    """
    chip = find_accelerator(kind)
    if chip is None or not chip.capability:
        raise UserError(f"{kind!r} is not among the GPUs of mlra_jax.execution.accelerators.")
    major, minor = divmod(chip.capability, 10)
    description = f"""
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: {chip.processors}
        shared_memory_per_block: 49152 shared_memory_per_block_optin: {chip.shared_bytes}
        shared_memory_per_core: {chip.shared_bytes + 1024} registers_per_core_limit: 65536
        registers_per_block_limit: 65536 fpus_per_core: 128 clock_rate_ghz: 1.5 memory_bandwidth: 1000000000000
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 l2_cache_size: 41943040
        device_memory_size: {chip.memory} cuda_compute_capability {{ major: {major} minor: {minor} }}
      }}
      platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{kind}"
    """
    shape = f"1x{hosts}x{n}"
    try:
        return topologies.get_topology_desc(
            platform="cuda", topology_name=shape, topology=shape, target_config=description
        ).devices
    except Exception as e:  # whatever the plugin raises
        raise UserError(
            f"The GPU {kind!r} cannot be described: {e}. It needs `pip install jax-cuda13-plugin` of JAX's own version."
        ) from e


def compile_train_step(config: TrainConfig, topology: str | Mesh) -> jax.stages.Compiled:
    """Compiles the train step of `config` without allocating anything.

    Args:
      config: the run; the planner chooses what it leaves open (micro-batch, remat, gather).
      topology: a name (`described_devices`), on which the run's own mesh is laid out; or a mesh over such devices.

    Raises:
      ConfigError: the model or the batch cannot be laid out on the mesh, or does not fit the devices by estimate.
    """
    mesh = topology_mesh(topology, config.mesh) if isinstance(topology, str) else topology
    sizes = MeshConfig(**mesh.shape)
    check_train_layout(config, sizes)
    config, _ = resolve(config, mesh)
    n_data = sizes.data * sizes.fsdp
    accumulation = config.data.accumulation(n_data)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, TRAIN_RULES.spec(None, "batch", "length"))
        shape = (accumulation, config.data.micro_batch * n_data, config.data.seq_len)
        tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
        batch = {"inputs": tokens, "targets": tokens}
        return make_train_step(config).lower(abstract_state(config, mesh), batch).compile()


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory that a compiled program takes on each device, in bytes."""

    arguments: int
    temporaries: int
    outputs: int
    """Outputs that do not reuse donated arguments."""

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> Memory:
        """Reads the compiler's own account."""
        m = compiled.memory_analysis()
        assert m is not None
        return cls(
            m.argument_size_in_bytes, m.temp_size_in_bytes, m.output_size_in_bytes - m.alias_size_in_bytes
        )

    @property
    def total(self) -> int:
        """Upper bound on the peak."""
        return self.arguments + self.temporaries + self.outputs
