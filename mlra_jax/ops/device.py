"""The device that a traced function is for."""

from __future__ import annotations

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
