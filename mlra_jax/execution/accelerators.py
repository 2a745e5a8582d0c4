"""The one table of accelerators: what they can do at best and what kernels must know of them.

From their makers' data sheets. One JAX device is meant: a whole GPU, a whole TPU v4, v5p, v5e or v6e chip, half a TPU7x
chip.
"""

from __future__ import annotations

import dataclasses
import re

import jax
from jax.sharding import AbstractDevice

from mlra_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """Peak rates and memory of one JAX device."""

    flops: float
    """Dense bfloat16 matrix FLOP/s (T4 has no bfloat16: float16)."""
    memory: int
    """Bytes of memory that programs may use."""
    bandwidth: float
    """Bytes per second between it and the chip."""
    links: float
    """Bytes per second that all links to other devices of the slice or host send at once; half of the bidirectional
    figure of the data sheet."""
    capability: int = 0
    """Compute capability of a GPU: 80 for 8.0; 0: not an NVIDIA GPU."""
    processors: int = 1
    """Streaming multiprocessors of a GPU, or cores of a TPU."""

    @property
    def ridge(self) -> float:
        """FLOPs per byte of memory from which on a computation is bound by arithmetic, not by memory."""
        return self.flops / self.bandwidth

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one program at most (CUDA C++ Programming Guide, table of compute capabilities)."""
        return {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227}[self.capability] * 1024


def _of(
    tflops: float, gib: float, gb_per_second: float, links: float, capability: int = 0, processors: int = 1
) -> Accelerator:
    return Accelerator(
        tflops * 1e12, int(gib * GIB), gb_per_second * 1e9, links * 1e9, capability, processors
    )


# NVIDIA's data sheets and Google Cloud's pages on TPU system architecture; the first pattern that matches counts.
_ACCELERATORS = (
    (r"H100 PCIe", _of(756, 79.6, 2000, 300, 90, 114)),
    (r"H100 NVL", _of(835, 93.6, 3900, 300, 90, 132)),
    (r"H200 NVL", _of(835, 139.8, 4800, 450, 90, 132)),
    (r"GH200 480GB", _of(989, 94.5, 4000, 450, 90, 132)),
    (r"H200|GH200", _of(989, 139.8, 4800, 450, 90, 132)),
    (r"H100", _of(989, 79.1, 3350, 450, 90, 132)),
    (r"H800", _of(989, 79.1, 3350, 200, 90, 132)),
    (r"H20", _of(148, 94.9, 4000, 450, 90, 78)),
    (r"A100.*80GB", _of(312, 79.2, 2039, 300, 80, 108)),
    (r"A100", _of(312, 39.4, 1555, 300, 80, 108)),
    (r"A30", _of(165, 23.5, 933, 100, 80, 56)),
    (r"A10G", _of(70, 22.0, 600, 32, 86, 80)),
    (r"A10", _of(125, 22.0, 600, 32, 86, 72)),
    (r"A40", _of(150, 44.4, 696, 56, 86, 84)),
    (r"A6000", _of(155, 47.4, 768, 56, 86, 84)),
    (r"RTX 3090", _of(71, 23.5, 936, 56, 86, 82)),
    (r"L4", _of(121, 22.0, 300, 32, 89, 58)),
    (r"L40S", _of(362, 44.4, 864, 32, 89, 142)),
    (r"L40", _of(181, 44.4, 864, 32, 89, 142)),
    (r"RTX 4090", _of(165, 23.5, 1008, 32, 89, 128)),
    (r"T4", _of(65, 14.6, 300, 16, 75, 40)),
    (r"TPU v4$", _of(275, 32, 1228, 300, processors=2)),
    (r"TPU (v5e|v5 lite)$", _of(197, 16, 819, 200)),
    (r"TPU (v5p|v5)$", _of(459, 95, 2765, 600, processors=2)),
    (r"TPU (v6e|v6 lite)$", _of(918, 32, 1640, 400)),
    (r"TPU ?7x$", _of(1153.5, 96, 3690, 600)),
)


def find_accelerator(kind: str) -> Accelerator | None:
    """What is known of the devices of this `jax.Device.device_kind`; None: nothing."""
    return next((chip for pattern, chip in _ACCELERATORS if re.search(rf"\b(?:{pattern})\b", kind)), None)


KINDS = {
    "h100": "NVIDIA H100 80GB HBM3",
    "h100-nvl": "NVIDIA H100 NVL",
    "h100-pcie": "NVIDIA H100 PCIe",
    "h200": "NVIDIA H200",
    "gh200": "NVIDIA GH200 480GB",
    "a100": "NVIDIA A100-SXM4-80GB",
    "a100-40gb": "NVIDIA A100-SXM4-40GB",
    "l4": "NVIDIA L4",
    "t4": "Tesla T4",
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "tpu7x": "TPU7x",
}
"""Short names, and what JAX calls the devices."""


def named_accelerator(name: str) -> Accelerator:
    """The accelerator with a short name of `KINDS`, or of a `jax.Device.device_kind`.

    Raises:
      UserError: it is not known; names those that are.
    """
    chip = find_accelerator(KINDS.get(name.lower(), name))
    if chip is None:
        raise UserError(
            f"No accelerator {name!r} is known; known are {', '.join(KINDS)}, or what JAX calls a device."
        )
    return chip


def described_device(name: str) -> AbstractDevice:
    """The accelerator with this name (see `named_accelerator`), for tracing programs where it is absent.

    Raises:
      UserError: it is not known.
    """
    chip, kind = named_accelerator(name), KINDS.get(name.lower(), name)
    return AbstractDevice(kind, num_cores=chip.processors, platform="gpu" if chip.capability else "tpu")


def device_memory(device: jax.Device) -> int | None:
    """Bytes that a program may use of the device; None: unknown (a CPU, or a device not in the table).

    A device that is there says so itself; of one that is only described the whole memory counts.
    """
    if device.platform == "cpu":
        return None
    try:
        stats = device.memory_stats()
    except Exception:  # whatever the plugin of a described device raises
        stats = None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    chip = find_accelerator(device.device_kind)
    return chip.memory if chip else None
