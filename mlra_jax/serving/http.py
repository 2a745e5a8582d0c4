"""The HTTP server that engines' applications run in."""

from __future__ import annotations

import signal
from typing import Any

import uvicorn


def make_server(app: Any, host: str, port: int, shutdown_seconds: float) -> uvicorn.Server:
    """A server whose `run` ends on SIGTERM or SIGINT, once what runs has finished.

    Args:
      app: an ASGI application.
      host: address to listen on.
      port: port to listen on.
      shutdown_seconds: how long requests may go on after a signal.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=max(1, round(shutdown_seconds)),
    )
    return uvicorn.Server(config)


def ignore_repeated_signals() -> None:
    """Keeps the process alive when uvicorn repeats the signal that has stopped it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
