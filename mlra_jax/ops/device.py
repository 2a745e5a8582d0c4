"""What a traced function is compiled for. No other module of `ops` reads the ambient mesh or JAX's devices."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AbstractMesh

from mlra_jax.execution.accelerators import Accelerator, find_accelerator


def default_device() -> tuple[str, str]:
    """Platform (`cpu`, `gpu` or `tpu`) and kind (such as `NVIDIA H100 80GB HBM3`) of JAX's default device."""
    device = jax.config.values["jax_default_device"] or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    return _named(device.platform, device.device_kind)


def current_device() -> tuple[str, str]:
    """Platform and kind of the device that is compiled for.

    That is a device of the current mesh, which may be one that is only described (ahead-of-time compilation), or the
    default device if there is no mesh.
    """
    mesh: AbstractMesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.abstract_device is None:
        return default_device()
    return _named(mesh.abstract_device.platform, mesh.abstract_device.device_kind)


def _named(platform: str, kind: str) -> tuple[str, str]:
    return ("gpu" if platform in ("cuda", "rocm") else platform), kind


def inside_shard_map() -> bool:
    """Whether what is traced runs on each device by itself, in `jax.shard_map`."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


class WrongDeviceError(NotImplementedError):
    """A back end declines because it is made for other devices than the one that is compiled for."""


def require_tpu() -> None:
    """Raises `WrongDeviceError` unless a TPU is compiled for."""
    if current_device()[0] != "tpu":
        raise WrongDeviceError("It needs a TPU.")


def require_hopper() -> Accelerator:
    """The data sheet of the NVIDIA GPU of the Hopper generation that is compiled for.

    Raises:
      WrongDeviceError: it is none.
    """
    platform, kind = current_device()
    chip = find_accelerator(kind)
    if platform != "gpu" or chip is None or chip.capability != 90:
        raise WrongDeviceError(f"the Mosaic GPU kernel runs on Hopper GPUs; this is a {kind}.")
    return chip


def tpu_info() -> Any:
    """The `pltpu.TpuInfo` of the device that is compiled for.

    Raises:
      WrongDeviceError: it is no TPU.
    """
    from jax.experimental.pallas import tpu as pltpu  # not every platform has it

    try:
        return pltpu.get_tpu_info()
    except ValueError as e:
        raise WrongDeviceError("It needs a TPU.") from e


def require_ampere() -> tuple[str, Accelerator]:
    """Kind and data sheet of the NVIDIA GPU that is compiled for.

    Raises:
      WrongDeviceError: it is none, or older than Ampere.
      NotImplementedError: it is none that we know.
    """
    platform, kind = current_device()
    chip = find_accelerator(kind) if platform == "gpu" else None
    if chip is None and platform == "gpu":
        raise NotImplementedError(f"It does not know {kind}; add it to mlra_jax.execution.accelerators.")
    if chip is None or chip.capability < 80:
        raise WrongDeviceError(f"It needs an NVIDIA GPU of the Ampere generation or later; this is a {kind}.")
    return kind, chip
