"""The console commands, and what they share: how they start, and how errors and signals end them.

`mlra-train`, `mlra-plan`, `mlra-decode`, `mlra-evaluate`, `mlra-prepare`, `mlra-plot`, `mlra-convert`, `mlra-export`,
`mlra-serve` and `mlra-describe` are the `main` functions of the modules in this package. This module imports nothing
heavy, so that Ctrl-C is handled before JAX is loaded.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NoReturn

from mlra_jax.errors import explain, naming

INTERRUPTED = 130
"""Exit status after Ctrl-C, by convention 128 + SIGINT."""

_interrupted = False


def _interrupt(signum: int, frame: FrameType | None) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Repeats an interrupt that came where Python cannot raise, as in JAX's garbage-collection callback."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


def _prepare_process() -> None:
    """Lets `_ending` know of Ctrl-C whenever it comes, and makes all text printable on any terminal."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _unraisable
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _end_interrupted(whole_process: bool) -> NoReturn:
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        print("interrupted", file=sys.stderr, flush=True)
    if whole_process:
        os._exit(INTERRUPTED)  # XLA's threads may be at work, and crash in an interpreter that shuts down
    raise SystemExit(INTERRUPTED) from None


def _flush() -> None:
    """Flushes standard output now, so that an error is raised here and not reported by the interpreter at exit."""
    if sys.stdout is None or sys.stdout.closed:
        return
    try:
        with naming("standard output"):
            sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):  # buffered text must not raise again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


@contextlib.contextmanager
def _ending(whole_process: bool) -> Iterator[None]:
    """Turns an exception that ends a command into a sentence and an exit status; see `command`."""
    try:
        try:
            yield
        finally:
            _flush()
    except BaseException as error:
        # Libraries turn an interrupt into errors of their own, but it stays one.
        if isinstance(error, KeyboardInterrupt) or (whole_process and _interrupted):
            _end_interrupted(whole_process)
        if isinstance(error, BrokenPipeError):
            raise SystemExit(1) from None
        sentence = explain(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        raise SystemExit(2) from error


def command(main: Callable[[Sequence[str]], int | None]) -> Callable[..., int | None]:
    """Makes `main(argv)` a console command: called without `argv` it takes `sys.argv[1:]`, and the process is its own.

    Errors that `explain` has a sentence for (a user's mistake; a path, disk or stream that fails) print `error: ...` to
    standard error and exit with status 2; all others keep their traceback and exit with status 1. Ctrl-C ends the
    process at once with status 130. A closed pipe (`mlra-decode ... | head`) exits quietly with status 1. Characters
    that the terminal cannot encode are printed as backslash escapes.
    """

    @functools.wraps(main)
    def entry(argv: Sequence[str] | None = None) -> int | None:
        whole_process = argv is None
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs a traceback of what it then raises
        if whole_process:
            _prepare_process()
        with _ending(whole_process):
            return main(sys.argv[1:] if argv is None else argv)

    return entry


def run(name: str) -> int | None:
    """Runs the console command `name` as this process: imports its module, and calls its `main`."""
    _prepare_process()
    with _ending(whole_process=True):
        module = importlib.import_module(f"{__name__}.{name}")
    return module.main()
