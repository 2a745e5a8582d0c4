"""Ends all processes of a run when one of them dies or hangs, and makes each say why.

JAX alone leaves a process blocked in a collective whose partner is gone, until the coordination service aborts it from
C++ without a Python exception. Here a thread of each process, which runs even while the main thread is blocked, reports
to process 0 through the same service that it is alive; process 0 tells all of them when one is not. If process 0 itself
hangs, and the service with it, calls to the service do not return, which a second thread of each other process notices.
Processes that answer but no longer train, because a collective or a device hangs, are noticed by what their main
threads say that they are doing (`Watchdog.doing`): where that does not change for too long, all end, and say where each
one is. A death that leaves a process no time to report (SIGKILL, lack of memory, the abort when process 0 is gone) is
reported by a small child process that waits for the end of its parent.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import threading
import time
from typing import Any

# JAX has no public way to the key-value store of its coordination service; Orbax goes the same way.
from jax._src import distributed

_FOLDER = "mlra_jax/watchdog"
_CHILD = """
import sys
words = ""
for line in sys.stdin:
    words = line.strip()
if words:
    print(words, file=sys.stderr, flush=True)
"""


class LastWords:
    """Prints `words` to standard error if this process ends without `dismiss`, whatever ends it."""

    def __init__(self, words: str):
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # not reached by signals to the terminal's processes
        )
        self._say(words)

    def _say(self, words: str) -> None:
        assert self._child.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._child.stdin.write(words.replace("\n", " ") + "\n")
            self._child.stdin.flush()

    def dismiss(self) -> None:
        """Cancels them: this process reports its end itself."""
        self._say("")
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):
            self._child.stdin.close()
        self._child.wait()


class Watchdog:
    """A context manager that watches the processes of a run; a single process only for progress, and its last words.

    Args:
      timeout: seconds within which all processes end when one of them dies.
      advice: what to do; the end of every message.
      step_timeout: seconds within which what the main thread is `doing` must change; 0: no limit.
    """

    def __init__(self, timeout: float, advice: str, step_timeout: float = 0.0):
        state = distributed.global_state
        self._client: Any = state.client
        self._id, self._n = state.process_id, state.num_processes
        self._timeout, self._advice = timeout, advice
        self._interval = timeout / 8
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._heard = time.monotonic()  # when the service last answered
        self._step_timeout = step_timeout
        self._doing, self._limit, self._waited = "starting", math.inf, 0.0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self._client is None or self._n == 1

    def doing(self, what: str, patience: float = 1.0) -> None:
        """Says what the main thread does from now on.

        Args:
          what: for messages, such as "step 12".
          patience: how many times `step_timeout` it may take.
        """
        self._doing, self._limit, self._waited = what, patience * self._step_timeout, 0.0

    def __enter__(self) -> Watchdog:
        who = "the run" if self.alone else f"process {self._id}"
        why = "if nothing above says why, perhaps for lack of memory"
        if not self.alone:
            why += "" if self._id == 0 else "; or process 0, which holds the others together, is gone"
            self._heard = time.monotonic()
            self._thread.start()
            if self._id != 0:
                threading.Thread(
                    target=self._watch_service, name="watchdog of process 0", daemon=True
                ).start()
        if self._step_timeout:
            threading.Thread(target=self._watch_progress, name="watchdog of progress", daemon=True).start()
        self._last_words = LastWords(f"error: {who} was killed or crashed ({why}); {self._advice}.")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._limit = math.inf
        if kind is None or self.alone:
            self._leaving.set()
        if kind is None and not self.alone:
            self._client.key_value_set(f"{_FOLDER}/alive/{self._id}", "done", allow_overwrite=True)
        self._last_words.dismiss()
        if kind is not None:
            self.leave("interrupted", 130)

    def leave(self, reason: str, status: int) -> None:
        """Tells the other processes why this one ends, and ends it with `status`; returns if there are no others.

        It must not reach Python's normal exit, where JAX would wait for the others.
        """
        if self.alone:
            return
        if self._leaving.is_set():
            self.wait_for_verdict()  # the watchdog is ending this process
        self._leaving.set()
        self._post(f"process {self._id} ended: {reason.rstrip('.')}")
        self._end(status)

    def wait_for_verdict(self) -> None:
        """Call after an error that another process's death may have caused: if one died, this does not return."""
        if not self.alone:
            self._leaving.wait(self._timeout)
            if self._leaving.is_set():
                self._thread.join()  # it ends the process

    def _post(self, sentence: str) -> None:
        with contextlib.suppress(Exception):  # another was first, or the service is gone
            self._client.key_value_set(f"{_FOLDER}/end/reason", sentence)

    def _end(self, status: int) -> None:
        if self._id == 0 and not self.alone:
            time.sleep(2 * self._interval)  # the service is here: let the others read
        self._last_words.dismiss()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _watch(self) -> None:
        began = time.monotonic()
        seen: dict[
            str, tuple[str, float]
        ] = {}  # of each process, what it wrote last, and when that was new here
        beat = 0
        while not self._leaving.wait(self._interval):
            beat += 1
            with contextlib.suppress(Exception):  # without the service, JAX aborts this process
                sign = f"{beat} {self._doing}"
                self._client.key_value_set(f"{_FOLDER}/alive/{self._id}", sign, allow_overwrite=True)
                if self._id == 0:
                    now = time.monotonic()
                    alive = {
                        key.rpartition("/")[2]: n
                        for key, n in self._client.key_value_dir_get(f"{_FOLDER}/alive")
                    }
                    for other in map(str, range(self._n)):
                        value = alive.get(other, "")
                        if other not in seen or seen[other][0] != value:
                            seen[other] = value, now if value else began
                    silent = [
                        i
                        for i, (value, at) in seen.items()
                        if value != "done" and now - at > self._timeout / 2
                    ]
                    if silent:
                        self._post(f"process {', '.join(silent)} died, or its host cannot be reached")
                found = dict(self._client.key_value_dir_get(f"{_FOLDER}/end"))
                self._heard = time.monotonic()
                if found and not self._leaving.is_set():
                    self._leaving.set()
                    self._end_for(next(iter(found.values())))

    def _watch_service(self) -> None:
        while not self._leaving.wait(self._interval):
            if time.monotonic() - self._heard > self._timeout / 2 and not self._leaving.is_set():
                self._leaving.set()
                self._end_for("process 0, which holds the others together, does not answer")

    def _watch_progress(self) -> None:
        tick = min(self._step_timeout / 8, 10.0)
        before = time.monotonic()
        while not self._leaving.wait(tick):
            now = time.monotonic()
            # A process that was suspended as a whole has not waited meanwhile.
            self._waited += min(now - before, 2 * tick)
            before = now
            if self._waited <= (limit := self._limit):
                continue
            where = {str(self._id): self._doing}
            if not self.alone:
                with contextlib.suppress(Exception):
                    for key, value in self._client.key_value_dir_get(f"{_FOLDER}/alive"):
                        where.setdefault(key.rpartition("/")[2], value.partition(" ")[2] or value)
            places = ", ".join(f"process {i} is at {where[i]}" for i in sorted(where, key=int))
            reason = (
                f"no progress for {limit:g} s ({places}): a collective, a device or storage hangs, or "
                "--distributed.step-timeout is too short"
            )
            if self.alone:
                self._end_for(reason)
            self._post(reason)
            return  # the watchdog ends this process

    def _end_for(self, reason: str) -> None:
        print(f"error: {reason}; {self._advice}.", file=sys.stderr)
        self._end(1)
