"""Processes that die or hang: the others end too, soon, and say why."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from mlra_jax.watchdog import LastWords, Watchdog

SECONDS = 4
SCRIPT = """
import os, signal, sys, time
import jax, numpy as np
from jax.experimental import multihost_utils
from mlra_jax.watchdog import Watchdog

port, me, how, victim, seconds = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), float(sys.argv[5])
jax.distributed.initialize(f"localhost:{port}", 2, me, cluster_detection_method="deactivate")
with Watchdog(seconds, "start all again", step_timeout=1 if how == "wedged" else 0) as watchdog:
    multihost_utils.process_allgather(np.ones(3))
    watchdog.doing("the data of step 7" if me == victim else "step 7")
    if me != victim:
        try:
            watchdog._client.wait_at_barrier("never", 10**6)  # as a collective that waits for the other
        except Exception:
            watchdog.wait_for_verdict()
    elif how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "wedged":
        time.sleep(1000)
    else:
        watchdog.leave("the disk is full.", 1)
"""


def end(how, victim):
    """(exit status, standard error) of both processes."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(port), str(i), how, str(victim), str(SECONDS)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        errors = ["", ""]
        for i in sorted(range(2), key=lambda i: i == victim):
            errors[i] = processes[i].communicate(timeout=100)[1]
            processes[victim].kill()  # if it is only stopped
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, error) for p, error in zip(processes, errors, strict=True)]


def sentences(error):
    return [line for line in error.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("how", ["stopped", "leaving"])  # one that is killed: tests/training/test_loop.py
def test_a_process_that_waits_for_one_that_is_gone_or_hangs_ends_with_one_sentence(how):
    (status, error), (gone, _) = end(how, 1)
    reason = {
        "stopped": "process 1 died, or its host cannot be reached",
        "leaving": "process 1 ended: the disk is full",
    }
    assert gone == {"stopped": -signal.SIGKILL, "leaving": 1}[how]
    assert status == 1
    assert sentences(error) == [f"error: {reason[how]}; start all again."]
    assert "Traceback" not in error


def test_processes_that_answer_but_do_not_get_on_end_and_say_where_each_of_them_is():
    for status, error in end("wedged", 1):
        assert status == 1
        (sentence,) = sentences(error)
        assert sentence.startswith(
            "error: no progress for 1 s (process 0 is at step 7, process 1 is at the data of step 7): "
        )
        assert sentence.endswith("; start all again.")


def test_a_single_process_that_hangs_is_ended_and_one_that_gets_on_is_not():
    script = """
import time
from mlra_jax.watchdog import Watchdog
with Watchdog(4, "start it again", step_timeout=1) as watchdog:
    watchdog.doing("compiling", 10)
    time.sleep(1.5)
    for step in range(15):
        watchdog.doing(f"step {step}")
        time.sleep(0.1)
    time.sleep(100)
"""
    ended = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, timeout=60)
    assert ended.returncode == 1
    (sentence,) = sentences(ended.stderr)
    assert sentence.startswith("error: no progress for 1 s (process 0 is at step 14): ")


def test_without_process_0_which_holds_them_together_the_last_words_say_so():
    (gone, own), (status, error) = end("killed", 0)
    assert gone == -signal.SIGKILL
    assert [s.split(" (")[0] for s in sentences(own)] == ["error: process 0 was killed or crashed"]
    assert status
    assert error.splitlines()[-1].startswith("error: process 1 was killed or crashed (")
    assert error.splitlines()[-1].endswith(
        "process 0, which holds the others together, is gone); start all again."
    )


def test_a_process_0_that_only_hangs_is_noticed_too():
    _, (status, error) = end("stopped", 0)
    assert status == 1
    assert sentences(error) == [
        "error: process 0, which holds the others together, does not answer; start all again."
    ]


def test_last_words_are_said_only_if_nothing_else_was(capfd):
    with Watchdog(SECONDS, "go on") as watchdog:
        assert watchdog.alone
        watchdog.leave("nobody is told", 1)
    assert capfd.readouterr().err == ""
    words = LastWords("gone\nfor good")
    words._child.stdin.close()  # as the system does when a process is gone
    words._child.wait()
    assert capfd.readouterr().err == "gone for good\n"
