import dataclasses
import json
import sys
import types

import pytest

from mlra_jax.config import ConfigError, to_dict
from mlra_jax.training import metrics
from mlra_jax.training.metrics import JsonLines, check_sinks, open_sinks, read_metrics


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


def test_half_a_last_line_is_passed_over_and_does_not_spoil_the_next_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 3.0}\n{"step": 1, "lo')
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
    assert b"loss" in events.read_bytes()


def test_weights_and_biases_gets_the_configuration_and_the_metrics_of_one_resumable_run(config, monkeypatch):
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
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, wandb_project="mlra"))
    for sink in open_sinks(config, start_step=0):
        sink.write(3, {"loss": 2.5})
        sink.close()
    opened, logged, finished = calls
    assert (opened["project"], opened["name"], opened["resume"]) == ("mlra", "tiny", "allow")
    assert opened["config"] == to_dict(config)
    assert (logged, finished) == ((3, {"loss": 2.5}), "finished")
