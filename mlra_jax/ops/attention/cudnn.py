"""Causal attention on GPUs by cuDNN's flash attention, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mlra_jax.ops import device
from mlra_jax.ops.attention.qk_parts import Joined
from mlra_jax.ops.back_end import Kernel
from mlra_jax.ops.libraries import declining
from mlra_jax.ops.shard_map_utils import unchecked


class CuDNN(Kernel[None, None]):
    """Values narrower than keys are padded: cuDNN wants one width."""

    name: ClassVar[str] = "cudnn"

    def check(self, args: Joined) -> None:
        """Whether it takes a call."""
        kind, chip = device.require_ampere()
        args.require_gpu_library()
        h, v_width = args.q.shape[-1], args.v.shape[-1]
        most = 256 if chip.capability >= 90 else 128
        if h % 8 or h > most or v_width > h:
            raise NotImplementedError(
                f"It takes keys of a multiple of 8 features, {most} at most on this GPU, and values no wider; "
                f"got {h} and {v_width}."
            )
        if device.default_device()[0] != "gpu":
            raise NotImplementedError(f"cuDNN compiles only where the GPU is; this is compiled for a {kind}.")

    def run(self, shape: None, config: None, args: Joined) -> jax.Array:
        """Calls cuDNN."""
        padding = args.q.shape[-1] - args.v.shape[-1]

        def attend(_: None, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            padded = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, padding)))
            options: dict[str, Any] = {"scale": args.scale, "is_causal": True, "implementation": "cudnn"}
            with declining("jax", remedy="pip install --upgrade 'mlra_jax[cuda]'"):
                return jax.nn.dot_product_attention(q, k, padded, **options)[..., : v.shape[-1]]

        return unchecked(attend)(None, args.q, args.k, args.v)
