"""Which back end each op takes, said when programs are traced, and where a faster one was to be expected."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from mlra_jax.ops.device import WrongDeviceError, current_device
from mlra_jax.ops.dispatch import observing


class BackEnds(contextlib.ExitStack):
    """A context manager that observes the ops of all programs that are traced inside; its text is the summary.

    Where attention does without a back end that is preferred and made for the device, one line says why, once for each
    op. (The reasons of other ops are their sizes, which `mlra_jax.explain` tells.)

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

    def _observe(self, op: str, name: str, declined: Mapping[str, NotImplementedError]) -> None:
        taken = self._taken.setdefault(op, [])
        if name in taken:
            return
        better = [other for other, e in declined.items() if not isinstance(e, WrongDeviceError)]
        if better and not taken and op.endswith("attention"):
            self._say(
                f"warning: {op} runs as {name}; {better[0]}, which is made for the {current_device()[1]}, would be "
                f"faster, but: {declined[better[0]]}"
            )
        taken.append(name)

    def __str__(self) -> str:
        taken = ", ".join(f"{op} {' and '.join(names)}" for op, names in self._taken.items())
        return f"Back ends: {taken or 'none, as no op has been traced'}."
