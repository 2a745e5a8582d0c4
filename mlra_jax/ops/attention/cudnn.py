"""Causal attention on GPUs by cuDNN's flash attention, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from mlra_jax.ops import device
from mlra_jax.ops.attention.qk_parts import check_square
from mlra_jax.ops.back_end import Kernel
from mlra_jax.ops.libraries import declining
from mlra_jax.ops.shard_map_utils import unchecked


class CuDNN(Kernel[None, None]):
    """Values narrower than keys are padded: cuDNN wants one width."""

    name: ClassVar[str] = "cudnn"

    def check(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKV: jax.Array,
        *,
        scale: float,
        q_start: jax.Array | int,
    ) -> None:
        """Whether it takes a call."""
        kind, chip = device.require_ampere()
        check_square(q_BTNH, k_BSKH, q_start)
        h, v_width = q_BTNH.shape[-1], v_BSKV.shape[-1]
        most = 256 if chip.capability >= 90 else 128
        if h % 8 or h > most or v_width > h:
            raise NotImplementedError(
                f"It takes keys of a multiple of 8 features, {most} at most on this GPU, and values no wider; "
                f"got {h} and {v_width}."
            )
        if device.default_device()[0] != "gpu":
            raise NotImplementedError(f"cuDNN compiles only where the GPU is; this is compiled for a {kind}.")

    def run(
        self,
        shape: None,
        config: None,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKV: jax.Array,
        *,
        scale: float,
        q_start: jax.Array | int,
    ) -> jax.Array:
        """Calls cuDNN."""
        padding = q_BTNH.shape[-1] - v_BSKV.shape[-1]

        def attend(_: None, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            padded = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, padding)))
            with declining("jax", remedy="pip install --upgrade 'mlra_jax[cuda]'"):
                out = jax.nn.dot_product_attention(
                    q, k, padded, scale=scale, is_causal=True, implementation="cudnn"
                )
            return out[..., : v.shape[-1]]

        return unchecked(attend)(None, q_BTNH, k_BSKH, v_BSKV)
