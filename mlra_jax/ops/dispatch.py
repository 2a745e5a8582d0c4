"""How an op picks one of its implementations, and says why."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

logger = logging.getLogger(__name__)
_explained: set[tuple[str, str]] = set()
_asked: contextvars.ContextVar[dict[str, dict[str, str | None]] | None] = contextvars.ContextVar(
    "asked", default=None
)
_chosen: contextvars.ContextVar[Mapping[str, str | Sequence[str]] | None] = contextvars.ContextVar(
    "chosen", default=None
)


@contextlib.contextmanager
def choose(**implementations: str | Sequence[str]) -> Iterator[None]:
    """While functions are traced inside, `implementation` of each op named, where it is None.

        with choose(product=("mosaic_gpu", "reference")):
            engine.run(...)  # what it compiles

    What was compiled before stays as it is. A name that no op has changes nothing.
    """
    token = _chosen.set({**(_chosen.get() or {}), **implementations})
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen(op: str) -> str | Sequence[str] | None:
    """What `choose` says of an op; None: nothing."""
    return (_chosen.get() or {}).get(op)


def lazily(module: str, name: str) -> Callable[..., Any]:
    """The implementation `name` of a module that is imported when it is first asked for.

    It declines where the module does not import: libraries have no such part on this platform, or in this version.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            implementation = getattr(importlib.import_module(module), name)
        except Exception as e:
            raise NotImplementedError(
                f"{module} does not work with JAX {jax.__version__} here ({type(e).__name__}: {e})."
            ) from e
        return implementation(*args, **kwargs)

    return call


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
      implementation: a name takes that one or fails; a sequence of names is tried in order; None is what `choose`
        says, or else tries all in order and logs once why one declined.
      *args: passed on.
      **kwargs: passed on.

    Raises:
      ValueError: an unknown name.
      NotImplementedError: the one named implementation declines.
      ExceptionGroup: all of several decline; it holds every reason.
    """
    implementation = chosen(op) if implementation is None else implementation
    if implementation is None:
        names: Sequence[str] = tuple(implementations)
    else:
        names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    for name in names:
        if name not in implementations:
            raise ValueError(
                f"{op} has no implementation {name!r}; choose from {', '.join(implementations)}."
            )
    if (asked := _asked.get()) is not None:
        asked[op] = {name: _reason(implementations[name], *args, **kwargs) for name in names}
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


def _reason(implementation: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    try:
        implementation(*args, **kwargs)
    except NotImplementedError as e:
        return str(e)
    return None


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, dict[str, str | None]]:
    """Why each implementation of the ops that `function` calls would or would not take its call; nothing is run.

        explain(latent_decode_attention, q_nope, q_rope, kv_latent, k_rope, kv_len, scale=0.1)

    Args:
      function: an op, or anything that calls ops.
      *args: its arguments; `jax.ShapeDtypeStruct`s will do for arrays.
      **kwargs: its keywords, as they are.

    Returns:
      For each op the names in the order in which they are tried, each with its reason to decline, or None: it takes
      the call. The first None is what `implementation=None` runs.
    """
    found: dict[str, dict[str, str | None]] = {}
    token = _asked.set(found)
    try:
        jax.eval_shape(lambda *args: function(*args, **kwargs), *args)
    finally:
        _asked.reset(token)
    return found
