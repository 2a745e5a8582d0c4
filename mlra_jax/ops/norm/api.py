"""The public op: add to the residual stream and normalise the sum."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Array, Float

from mlra_jax.ops import device
from mlra_jax.ops.back_end import BackEnd, Function, Lazy
from mlra_jax.ops.dispatch import Implementation, dispatch
from mlra_jax.ops.norm import reference

IMPLEMENTATIONS: Mapping[str, BackEnd] = {
    "mosaic_gpu": Lazy("mlra_jax.ops.norm.mosaic_gpu", "MosaicGPU", device.require_hopper),
    "reference": Function(reference.add_rms_norm),
}
"""Back ends, in order of preference."""


def add_rms_norm(
    x: Float[Array, "*rows D"],
    y: Float[Array, "*rows D"],
    gain: Float[Array, "D"],
    *,
    eps: float,
    implementation: Implementation = None,
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows D"]]:
    """x + y, and its root-mean-square norm times a gain.

    Args:
      x: float32, the residual stream.
      y: the output of a block, to be added.
      gain: of the norm.
      eps: added to the mean square.
      implementation: a name in `IMPLEMENTATIONS`, or a back end, or several to be tried in order; None: the first that
        takes the call.

    Returns:
      The sum in float32, and its norm in the type of `y`; statistics and the product with the gain are float32.

    Raises:
      NotImplementedError: the named implementation does not take these arguments.
    """
    return dispatch("add_rms_norm", IMPLEMENTATIONS, implementation, x, y, gain, eps=eps)
