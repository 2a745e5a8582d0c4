"""What the kernels of decode attention share as back ends: the sizes by which they are tuned."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

from mlra_jax.ops.back_end import C, Kernel
from mlra_jax.ops.decode.shape import Shape

TUNED = pathlib.Path(__file__).parent / "tuned"
"""The folder of tuned tables of decode attention."""


class DecodeKernel(Kernel[Shape, C]):
    """A kernel for decode attention; called with `mlra_jax.ops.decode.reference.Arguments`."""

    tuned_tables: ClassVar[pathlib.Path | None] = TUNED

    def tuning_key(self, shape: Shape) -> Mapping[str, Any]:
        """See `Kernel.tuning_key`."""
        return shape.tuning_key
