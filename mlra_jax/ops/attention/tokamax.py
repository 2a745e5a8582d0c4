"""Causal attention on GPUs by Tokamax, an optional dependency."""

from __future__ import annotations

from typing import ClassVar

import jax

from mlra_jax.ops import device
from mlra_jax.ops.attention.qk_parts import Joined
from mlra_jax.ops.back_end import Kernel
from mlra_jax.ops.libraries import declining, name, version
from mlra_jax.ops.shard_map_utils import unchecked

OLDEST = (0, 0, 17)
"""Of Tokamax; it needs JAX 0.11.1, so Python 3.12."""
REMEDY = "pip install --upgrade 'mlra_jax[tokamax]' (Python 3.12)"


class Tokamax(Kernel[str, None]):
    """The kernels of Tokamax: Mosaic GPU's on Hopper and later, Triton's before."""

    name: ClassVar[str] = "tokamax"

    def check(self, args: Joined) -> str:
        """Which of Tokamax's kernels take a call."""
        kind, chip = device.require_ampere()
        if (installed := version("tokamax")) is None:
            raise NotImplementedError(f"Tokamax is not installed: {REMEDY}.")
        if installed < OLDEST or jax.__version_info__ < (0, 11, 1):
            raise NotImplementedError(
                f"It needs Tokamax 0.0.17 and JAX 0.11.1 or later; these are {name('tokamax', 'jax')}: {REMEDY}."
            )
        args.require_gpu_library()
        if (default := device.default_device()[1]) != kind:
            raise NotImplementedError(
                f"Tokamax compiles for the default device, a {default}; for a {kind} set `jax.default_device`."
            )
        return "mosaic" if chip.capability >= 90 else "triton"

    def run(self, shape: str, config: None, args: Joined) -> jax.Array:
        """Calls Tokamax."""

        def attend(_: None, *qkv: jax.Array) -> jax.Array:
            options = {"scale": args.scale, "is_causal": True, "implementation": shape}
            with declining("tokamax", "jax", remedy=REMEDY):
                import tokamax

                return tokamax.dot_product_attention(*qkv, **options)

        return unchecked(attend)(None, args.q, args.k, args.v)
