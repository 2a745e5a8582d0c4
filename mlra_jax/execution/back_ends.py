"""Which back end each op takes, said when programs are traced, and where a faster one was to be expected."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from mlra_jax.execution.accelerators import find_accelerator
from mlra_jax.ops import device
from mlra_jax.ops.dispatch import observing


def made_for(name: str, platform: str, kind: str) -> bool:
    """Whether a back end of this name is made for devices of this platform and kind, whatever the call."""
    chip = find_accelerator(kind)
    capability = chip.capability if chip and platform == "gpu" else 0
    return {
        "mosaic_gpu": capability == 90,
        "triton": capability >= 80,
        "tokamax": capability >= 80,
        "cudnn": capability >= 80,
        "splash": platform == "tpu",
        "mosaic_tpu": platform == "tpu",
    }.get(name, False)


class BackEnds(contextlib.ExitStack):
    """A context manager that observes the ops of all programs that are traced inside; its text is the summary.

    Where an op does without a back end that is preferred and made for the device, one line says why, once for each op.

    Args:
      say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]):
        super().__init__()
        self._say = say
        self._taken: dict[str, list[str]] = {}

    def __enter__(self) -> BackEnds:
        super().__enter__()
        self.enter_context(observing(self._observe))
        return self

    def _observe(self, op: str, name: str, declined: Mapping[str, str]) -> None:
        taken = self._taken.setdefault(op, [])
        if name in taken:
            return
        first = not taken
        taken.append(name)
        platform, kind = device.current_device()
        better = next((other for other in declined if made_for(other, platform, kind)), None)
        if first and better is not None:
            self._say(
                f"warning: {op} runs as {name}; {better}, which is made for the {kind}, would be faster, but declines: "
                f"{declined[better]}"
            )

    def __str__(self) -> str:
        taken = ", ".join(f"{op} {' and '.join(names)}" for op, names in self._taken.items())
        return f"Back ends: {taken or 'no op has been traced'}."
