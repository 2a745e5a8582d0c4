"""How an op picks one of its back ends, and says why."""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from mlra_jax.ops.back_end import BackEnd

Implementation = str | BackEnd | Sequence[str | BackEnd] | None
"""What ops take as `implementation`: a name or a back end, or several to be tried in order; None: as `choose` says, or
else the first back end that takes the call."""

RENAMED = {"product": "skinny_gemm"}
"""Former names of ops, which `choose` still takes."""

logger = logging.getLogger(__name__)
_logged: set[tuple[str, str]] = set()
_reasons: contextvars.ContextVar[dict[str, dict[str, str | None]] | None] = contextvars.ContextVar(
    "reasons", default=None
)
_chosen: contextvars.ContextVar[Mapping[str, Implementation] | None] = contextvars.ContextVar(
    "chosen", default=None
)

Observer = Callable[[str, str, Mapping[str, NotImplementedError]], None]
"""Called with an op, the back end that takes a call, and those before it with their reasons to decline."""
_observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar("observer", default=None)


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Calls `observer` for each call of an op that is traced inside; nothing is traced for its sake."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


@contextlib.contextmanager
def choose(**implementations: Implementation) -> Iterator[None]:
    """Sets the `implementation` of ops, by name, for all calls that are traced inside and leave it None.

        with choose(skinny_gemm=("mosaic_gpu", "reference")):
            engine.run(...)  # what it compiles

    Functions that were compiled before are not affected. A name that no op has changes nothing.
    """
    for old, new in RENAMED.items():
        if old in implementations:
            logger.warning("The op %r is called %r now; choose(%s=...).", old, new, new)
            implementations.setdefault(new, implementations.pop(old))
    token = _chosen.set({**(_chosen.get() or {}), **implementations})
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen(op: str) -> Implementation:
    """What `choose` says of an op; None: nothing."""
    return (_chosen.get() or {}).get(op)


def dispatch(
    op: str,
    back_ends: Mapping[str, BackEnd],
    implementation: Implementation,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls the first back end that takes these arguments.

    Args:
      op: name of the op, for messages.
      back_ends: those of the op by name, in order of preference.
      implementation: one name or back end is called or fails; several are tried in order; None is what `choose` says,
        or else all of `back_ends`. Why one of several declines is logged once.
      *args: of the call.
      **kwargs: of the call.

    Raises:
      ValueError: an unknown name.
      NotImplementedError: the only one named declines.
      ExceptionGroup: all of several decline; it holds every reason.
    """
    implementation = chosen(op) if implementation is None else implementation
    if implementation is None:
        implementation = tuple(back_ends)
    elif isinstance(implementation, str | BackEnd):
        implementation = (implementation,)
    candidates: dict[str, BackEnd] = {}
    for one in implementation:
        if isinstance(one, BackEnd):
            candidates[getattr(one, "name", type(one).__name__)] = one
        elif one in back_ends:
            candidates[one] = back_ends[one]
        else:
            raise ValueError(f"{op} has no implementation {one!r}; choose from {', '.join(back_ends)}.")
    if (reasons := _reasons.get()) is not None:
        reasons[op] = {name: b.reason_to_decline(*args, **kwargs) for name, b in candidates.items()}
    declined: dict[str, NotImplementedError] = {}
    for name, back_end in candidates.items():
        try:
            result = back_end(*args, **kwargs)
        except NotImplementedError as e:
            if len(candidates) == 1:
                raise
            if (key := (f"{op}:{name}", str(e))) not in _logged:
                _logged.add(key)
                logger.info("%s: %s declines: %s", op, name, e)
            declined[name] = e
            continue
        if (observer := _observer.get()) is not None:
            observer(op, name, declined)
        return result
    raise ExceptionGroup(f"{op}: no implementation takes these arguments", list(declined.values()))


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, dict[str, str | None]]:
    """Says which back ends would take the calls of ops that `function` makes, and why others decline; runs nothing.

        explain(latent_decode_attention, q_nope, q_rope, kv_latent, k_rope, kv_len, scale=0.1)

    Args:
      function: an op, or anything that calls ops.
      *args: its arguments; `jax.ShapeDtypeStruct`s will do for arrays.
      **kwargs: its keywords, as they are.

    Returns:
      For each op its back ends in the order in which they are tried, each with its reason to decline, or None if it
      takes the call. The first None is what runs.
    """
    found: dict[str, dict[str, str | None]] = {}
    token = _reasons.set(found)
    try:
        jax.eval_shape(lambda *args: function(*args, **kwargs), *args)
    finally:
        _reasons.reset(token)
    return found
