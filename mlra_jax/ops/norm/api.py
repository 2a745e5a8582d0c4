"""The public op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
from jaxtyping import Array, Float

from mlra_jax.ops.dispatch import dispatch, lazily
from mlra_jax.ops.norm import reference

IMPLEMENTATIONS: Mapping[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "mosaic_gpu": lazily("mlra_jax.ops.norm.mosaic_gpu", "add_rms_norm"),
    "reference": reference.add_rms_norm,
}
"""Back ends, best first."""


def add_rms_norm(
    x: Float[Array, "*rows D"],
    y: Float[Array, "*rows D"],
    gain: Float[Array, "D"],
    *,
    eps: float,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows D"]]:
    """x + y, and its root-mean-square norm times a gain.

    Args:
      x: float32, the residual stream.
      y: what is added.
      gain: of the norm.
      eps: added to the mean square.
      implementation: None (the first that takes the arguments), or one name or several of `IMPLEMENTATIONS`.

    Returns:
      The sum in float32, and its norm in the type of `y`; statistics and the product with the gain are float32.

    Raises:
      NotImplementedError: the named implementation does not take these arguments.
    """
    return dispatch("add_rms_norm", IMPLEMENTATIONS, implementation, x, y, gain, eps=eps)
