"""How an op picks one of its implementations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)
_explained: set[tuple[str, str]] = set()


def dispatch(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | Sequence[str] | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls the first implementation that takes these arguments.

    Args:
      op: name of the op, for messages.
      implementations: name to function, best first. A function declines by raising `NotImplementedError`.
      implementation: None tries all in order and logs once why one declined; a name takes that one or fails; a
        sequence of names is tried in order.
      *args: passed on.
      **kwargs: passed on.

    Raises:
      ValueError: an unknown name.
      NotImplementedError: the one named implementation declines.
      ExceptionGroup: all of several decline; it holds every reason.
    """
    if implementation is None:
        names: Sequence[str] = tuple(implementations)
    else:
        names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    for name in names:
        if name not in implementations:
            raise ValueError(
                f"{op} has no implementation {name!r}; choose from {', '.join(implementations)}."
            )
    reasons: list[NotImplementedError] = []
    for name in names:
        try:
            return implementations[name](*args, **kwargs)
        except NotImplementedError as e:
            if len(names) == 1:
                raise
            if (key := (f"{op}:{name}", str(e))) not in _explained:
                _explained.add(key)
                logger.info("%s: %s declines: %s", op, name, e)
            reasons.append(e)
    raise ExceptionGroup(f"{op}: no implementation takes these arguments", reasons)
