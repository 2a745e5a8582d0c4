import dataclasses
import json
import socket
import struct
import sys
import types
import urllib.request

import pytest
from tensorboardX.proto.event_pb2 import Event

from mlra_jax.config import ConfigError, to_dict
from mlra_jax.storage import StorageError
from mlra_jax.training import metrics
from mlra_jax.training.metrics import JsonLines, Progress, check_sinks, open_sinks, read_metrics


def test_the_last_value_of_each_metric_of_a_step_counts_when_a_resumed_run_repeats_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for lines in [
        [(0, {"loss": 9.0}), (1, {"loss": 8.0}), (1, {"eval_loss": 7.5})],
        [(1, {"loss": 8.5}), (2, {"loss": 7.0})],
    ]:
        writer = JsonLines(path)
        for step, values in lines:
            writer.write(step, values)
        writer.close()
    assert read_metrics(tmp_path) == {0: {"loss": 9.0}, 1: {"loss": 8.5, "eval_loss": 7.5}, 2: {"loss": 7.0}}
    assert len(path.read_text().splitlines()) == 5, "the file is only ever appended to"


@pytest.mark.parametrize(
    "left", [b'{"step": 1, "lo', b'{"step": 1, "loss": "\xff"}', bytes(9), b'{"step": "1"}']
)
def test_a_damaged_last_line_is_passed_over_and_does_not_spoil_the_next_one(tmp_path, left):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes('{"step": 0, "loss": 3.0}\r\n'.encode("utf-8-sig") + left)
    assert read_metrics(path) == {0: {"loss": 3.0}}
    writer = JsonLines(path)
    writer.write(1, {"loss": 2.0})
    writer.close()
    assert read_metrics(path) == {0: {"loss": 3.0}, 1: {"loss": 2.0}}


def test_a_line_is_on_the_disk_as_soon_as_it_is_written(tmp_path):
    JsonLines(tmp_path / "metrics.jsonl").write(0, {"loss": 3.0})
    assert read_metrics(tmp_path) == {0: {"loss": 3.0}}


def test_a_bucket_object_is_rewritten_whole_with_what_an_earlier_process_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "is_remote", lambda path: True)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 3.0}\n{"ste')
    writer = JsonLines(path)
    writer.write(1, {"loss": 2.0})
    assert read_metrics(path) == {0: {"loss": 3.0}}, "not at every line"
    writer.close()
    assert read_metrics(path) == {0: {"loss": 3.0}, 1: {"loss": 2.0}}


def test_missing_metrics_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No metrics in .*nowhere: expected .*metrics\.jsonl"):
        read_metrics(tmp_path / "nowhere")


def test_wandb_that_is_not_installed_is_refused_before_training(config, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    check_sinks(config)
    with pytest.raises(ConfigError, match="pip install 'mlra-jax\\[wandb\\]'"):
        check_sinks(dataclasses.replace(config, log=dataclasses.replace(config.log, wandb_project="mlra")))


def test_tensorboard_and_json_hold_the_same_numbers(config, tmp_path):
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, tensorboard=True))
    sinks = open_sinks(config, start_step=0)
    for sink in sinks:
        sink.write(3, {"loss": 2.5})
        sink.close()
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line == {"step": 3, "loss": 2.5}
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    data, scalars = events.read_bytes(), []
    while data:  # records: length, checksum, event, checksum
        (size,) = struct.unpack("<Q", data[:8])
        event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
        scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    assert scalars == [(3, "loss", 2.5)]


@pytest.fixture
def wandb_calls(monkeypatch):
    """What a Weights & Biases that is not there is told."""
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    def init(**kwargs):
        calls.append(kwargs)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return calls


def test_weights_and_biases_gets_the_configuration_and_the_metrics(config, wandb_calls):
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, wandb_project="mlra"))
    for sink in open_sinks(config, start_step=0):
        sink.write(3, {"loss": 2.5})
        sink.close()
    opened, logged, finished = wandb_calls
    assert (opened["project"], opened["name"], opened["resume"]) == ("mlra", "tiny", "allow")
    assert opened["config"] == to_dict(config)
    assert (logged, finished) == ((3, {"loss": 2.5}), "finished")


def test_weights_and_biases_continues_the_run_of_the_same_folder_and_of_no_other(
    config, wandb_calls, tmp_path
):
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, wandb_project="mlra"))
    for out in ("first", "first", "second"):
        open_sinks(dataclasses.replace(config, out=str(tmp_path / out)), start_step=0)
    first, again, second = (call["id"] for call in wandb_calls)
    assert first == again != second


def test_metrics_in_a_bucket_without_its_library_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # importing it fails
    with pytest.raises(StorageError, match=r"gs://bucket/run needs .* pip install 'mlra_jax\[gcs\]'"):
        read_metrics("gs://bucket/run")


PROGRESS = {"loss": 2.5, "tokens_per_second": 12345.0, "mfu": 0.4321, "seconds_left": 3725.0}


@pytest.mark.parametrize(
    ("absent", "line"),
    [
        ([], "step 7/8 · loss 2.5000 · 12.3k tokens/s · MFU 43.2 % · 1:02:05 left"),
        (["mfu"], "step 7/8 · loss 2.5000 · 12.3k tokens/s · 1:02:05 left"),
        (["mfu", "tokens_per_second", "seconds_left"], "step 7/8 · loss 2.5000"),
    ],
)
def test_a_line_of_progress_shows_what_is_known(absent, line, capsys):
    Progress(8, 0, active=True).report(7, {k: v for k, v in PROGRESS.items() if k not in absent})
    assert capsys.readouterr().err == line + "\n"


def test_prometheus_reads_the_latest_metrics_of_the_run(config):
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        taken.listen()
        log = dataclasses.replace(config.log, prometheus_port=port)
        with pytest.raises(
            ConfigError, match=rf"log.prometheus_port={port}: Address already in use; choose another"
        ):
            open_sinks(dataclasses.replace(config, log=log), 0)
    *_, prometheus = open_sinks(dataclasses.replace(config, log=log), 0)
    prometheus.write(9, {"loss": 3.5})
    prometheus.write(10, {"loss": 2.5, "eval_loss": 2.75})
    try:
        text = urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=10).read().decode()
    finally:
        prometheus.close()
    values = dict(line.split(" ") for line in text.splitlines() if not line.startswith("#"))
    assert values == {
        'mlra_step{run="tiny"}': "10.0",
        'mlra_loss{run="tiny"}': "2.5",
        'mlra_eval_loss{run="tiny"}': "2.75",
    }


def test_prometheus_without_its_library_is_refused_with_what_to_install(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"prometheus_port=9000 needs .*pip install 'mlra-jax\[prometheus\]'"
    ):
        check_sinks(dataclasses.replace(config, log=dataclasses.replace(config.log, prometheus_port=9000)))
