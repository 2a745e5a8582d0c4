"""The device that a traced function is for, and what kernels must know of GPUs."""

from __future__ import annotations

import dataclasses
import re

import jax
from jax.sharding import AbstractMesh


def current_device() -> tuple[str, str]:
    """Platform (`cpu`, `gpu` or `tpu`) and kind (such as `NVIDIA H100 80GB HBM3`) of what is being compiled for.

    That is the device of the current mesh, which may be one that is only described (ahead-of-time compilation), and
    the default device where there is no mesh.
    """
    mesh: AbstractMesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        platform, kind = mesh.abstract_device.platform, mesh.abstract_device.device_kind
    else:
        device = jax.config.values["jax_default_device"] or jax.devices()[0]
        if isinstance(device, str):
            device = jax.devices(device)[0]
        platform, kind = device.platform, device.device_kind
    return ("gpu" if platform in ("cuda", "rocm") else platform), kind


@dataclasses.dataclass(frozen=True)
class Chip:
    """What kernels must know of an NVIDIA GPU."""

    capability: int
    """Compute capability: 80 for 8.0."""
    processors: int
    """Streaming multiprocessors."""

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one program at most (CUDA C++ Programming Guide, table of compute capabilities)."""
        return {80: 163, 86: 99, 87: 163, 89: 99, 90: 227}[self.capability] * 1024


CHIPS = {
    r"A100": Chip(80, 108),
    r"A30": Chip(80, 56),
    r"A10G": Chip(86, 80),
    r"A10": Chip(86, 72),
    r"A40|A6000": Chip(86, 84),
    r"RTX 3090": Chip(86, 82),
    r"L4": Chip(89, 58),
    r"L40S?": Chip(89, 142),
    r"RTX 4090": Chip(89, 128),
    r"H100 PCIe": Chip(90, 114),
    r"H20": Chip(90, 78),
    r"H100|H200|H800|GH200": Chip(90, 132),
}
"""By what their names in JAX (`NVIDIA A100-SXM4-40GB`) hold; numbers from NVIDIA's data sheets."""


def find_chip(kind: str) -> Chip | None:
    """The chip that a JAX device kind names; None: unknown."""
    return next((chip for name, chip in CHIPS.items() if re.search(rf"\b({name})\b", kind)), None)
