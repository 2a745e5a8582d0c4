"""Processes that run a script of the repository, forked from one that has imported all that it needs.

Importing JAX and the rest takes more CPU time than a short run does.
"""

import ast
import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence

import jax

import mlra_jax.cli.train
import mlra_jax.training.determinism
import mlra_jax.training.loop
import mlra_jax.watchdog  # noqa: F401

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
warnings.filterwarnings("ignore", message="os.fork")  # JAX runs no threads before it has devices


class Process:
    """`python SCRIPT ...` with what `subprocess.Popen` has; its output goes to a file."""

    def __init__(self, argv: Sequence[str], folder: str, environment: Mapping[str, str]):
        descriptor, self._log = tempfile.mkstemp()
        os.close(descriptor)
        args = argv, folder, dict(environment), self._log
        self._process = CONTEXT.Process(target=_run, args=args, daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self._process.join(timeout)
        if self.poll() is None:
            raise TimeoutError(f"It has not ended after {timeout} s.")
        with open(self._log, errors="replace") as file:
            return file.read(), None


def _run(argv: Sequence[str], folder: str, environment: Mapping[str, str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    os.environ.update(environment)
    for name, value in environment.items():  # which JAX has read when it was imported
        if name.startswith("JAX_") and name.lower() in jax.config.values:
            is_text = isinstance(jax.config.values[name.lower()], str | None)
            jax.config.update(name.lower(), value if is_text else ast.literal_eval(value))
    sys.argv = list(argv)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # as an interpreter does: JAX takes leave of the other processes
        sys.stdout.flush()
        sys.stderr.flush()
