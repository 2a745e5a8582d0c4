import os
import signal

import pytest

from mlra_jax import distributed
from mlra_jax.config import ConfigError
from mlra_jax.distributed import DistributedConfig, StopSignal, initialize, take_args


def test_options_of_the_cluster_are_taken_off_the_command_line_wherever_they_stand():
    argv = ["tiny", "--distributed.coordinator", "host:1234", "--seed", "1"]
    argv += ["--distributed.processes=2", "--distributed.process_id", "1", "--steps", "5"]
    config, rest = take_args(argv)
    assert config == DistributedConfig(coordinator="host:1234", processes=2, process_id=1)
    assert rest == ["tiny", "--seed", "1", "--steps", "5"]
    assert take_args(["tiny", "--distributed.auto", "--steps", "5"]) == (
        DistributedConfig(auto=True),
        ["tiny", "--steps", "5"],
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DistributedConfig(coordinator="host:1"), "go together"),
        (
            DistributedConfig(coordinator="host:1", processes=2, process_id=2),
            "process_id=2 must be from 0 to",
        ),
        (DistributedConfig(coordinator="host", processes=2, process_id=0), "must be HOST:PORT"),
        (DistributedConfig(auto=True, coordinator="host:1", processes=2, process_id=0), "leave out"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_refused_in_one_sentence(config, message):
    with pytest.raises(ConfigError, match=message):
        initialize(config)


@pytest.mark.parametrize(
    ("config", "environment", "arguments"),
    [
        (DistributedConfig(), {}, None),
        (DistributedConfig(), {"SLURM_STEP_NUM_TASKS": "1"}, None),
        (DistributedConfig(), {"SLURM_STEP_NUM_TASKS": "4"}, ()),
        (DistributedConfig(), {"OMPI_COMM_WORLD_SIZE": "2"}, ()),
        (DistributedConfig(), {"TPU_WORKER_HOSTNAMES": "host-0"}, None),
        (DistributedConfig(), {"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, ()),
        (DistributedConfig(), {"MEGASCALE_COORDINATOR_ADDRESS": "host-0"}, ()),
        (DistributedConfig(auto=True), {}, ()),
        (DistributedConfig(coordinator="h:1", processes=3, process_id=0), {}, ("h:1", 3, 0)),
    ],
)
def test_processes_join_when_asked_or_started_together_and_not_otherwise(
    config, environment, arguments, monkeypatch
):
    calls = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *args, **_: calls.append(args))
    launchers = "SLURM_STEP_NUM_TASKS OMPI_COMM_WORLD_SIZE TPU_WORKER_HOSTNAMES MEGASCALE_COORDINATOR_ADDRESS"
    for name in launchers.split():
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    initialize(config)
    assert calls == ([] if arguments is None else [arguments])


def test_a_host_of_a_slice_that_was_started_alone_is_told_what_to_add(monkeypatch):
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 4)
    with pytest.raises(ConfigError, match=r"one of 4 hosts .* --distributed\.auto"):
        initialize(DistributedConfig())


def test_sigterm_sets_the_flag_inside_and_the_former_handler_is_back_outside():
    received = []
    former = signal.signal(signal.SIGTERM, lambda *_: received.append("former"))
    try:
        with StopSignal() as stop:
            assert not stop.reached(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.reached(2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == ["former"]
    finally:
        signal.signal(signal.SIGTERM, former)
