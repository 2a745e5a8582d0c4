"""Whole runs: interrupted, killed, diverged, refused, and on several processes."""

import dataclasses
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mlra_jax.checkpoints import (
    CheckpointError,
    find_step,
    load_config,
    load_params,
    owned,
    save_params,
)
from mlra_jax.cli.train import main
from mlra_jax.config import ConfigError, ExecutionConfig, MeshConfig, to_dict
from mlra_jax.errors import UserError
from mlra_jax.execution.flops import train_flops_per_token
from mlra_jax.storage import StorageError
from mlra_jax.training import loop
from mlra_jax.training import step as step_module
from mlra_jax.training.loop import DivergedError, train
from mlra_jax.training.metrics import FILE_NAME, read_metrics
from mlra_jax.training.step import make_train_step

TIMEOUT = 240


def saved_params(config, out, step=None):
    """Parameters of a checkpoint on the host."""
    abstract = jax.eval_shape(lambda: loop.init_state(config)).params
    unsplit = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract)
    return jax.device_get(load_params(out, unsplit, step))


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def at_batch(monkeypatch, n, act):
    """Calls `act` just before the n-th batch of the next run is handed out; None: before each."""
    real = loop.TrainBatches.device_batches

    def device_batches(self, *args, **kwargs):
        batches = real(self, *args, **kwargs)
        next_batch, count = batches.__next__, iter(range(10**6))

        class Counting(type(batches)):
            def __next__(self):
                if next(count) == n or n is None:
                    act()
                return next_batch()

        batches.__class__ = Counting
        return batches

    monkeypatch.setattr(loop.TrainBatches, "device_batches", device_batches)


@pytest.fixture(scope="module")
def uninterrupted(base_config, tmp_path_factory):
    """A finished run of eight steps on eight devices (data 2, fsdp 2, tensor 2)."""
    config = dataclasses.replace(
        base_config, out=str(tmp_path_factory.mktemp("uninterrupted")), mesh=MeshConfig(2, 2, 2, 1)
    )
    return config, train(config)


@pytest.mark.smoke
def test_a_run_leaves_metrics_checkpoints_and_its_configuration(uninterrupted):
    config, result = uninterrupted
    assert (result.step, result.interrupted) == (8, False)
    records = read_metrics(config.out)
    assert list(records) == [*range(8), 8]
    assert {"loss", "grad_norm", "learning_rate", "param_norm", "clip_rate", "tokens"} <= set(records[0])
    assert records[0]["learning_rate"] == 0
    assert records[7]["tokens"] == 8 * config.data.global_batch * config.data.seq_len
    assert records[7]["loss"] < records[0]["loss"]
    assert records[7]["tokens_per_second"] > 0
    assert "mfu" not in records[7], "the CPU's peak is not known"
    assert records[8]["eval_loss"] == result.eval_loss
    assert find_step(config.out).name == "8"
    config = dataclasses.replace(
        config, execution=dataclasses.replace(config.execution, gather="layer")
    )  # as planned
    afresh = dataclasses.replace(config.data, micro_batch=0)
    assert load_config(config.out) == dataclasses.replace(config, execution=ExecutionConfig(), data=afresh)
    with open(f"{config.out}/config.json") as file:
        assert json.load(file) == json.loads(json.dumps(to_dict(config)))


def test_a_finished_run_started_again_does_nothing_and_leaves_its_files_as_they_are(uninterrupted, capsys):
    config, result = uninterrupted
    log = dataclasses.replace(config.log, tensorboard=True)
    files = lambda: {
        path: os.stat(path).st_mtime_ns
        for root, _, names in os.walk(config.out)
        for path in (os.path.join(root, name) for name in names)
    }
    before = files()
    again = train(dataclasses.replace(config, log=log))
    assert (again.step, again.interrupted, again.eval_loss) == (8, False, None)
    assert_same_bits(again.state, result.state)
    assert files() == before
    assert "has all of its 8 steps; nothing to do" in capsys.readouterr().err


def test_sigterm_saves_and_exits_with_75_and_the_same_command_goes_on_to_the_same_bits(
    uninterrupted, config, monkeypatch, capsys
):
    reference, finished = uninterrupted
    command_line(monkeypatch, dataclasses.replace(reference, out=config.out))
    with monkeypatch.context() as patch:
        at_batch(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main([]) == 75
    assert "Stopped by SIGTERM after step 3, saved" in capsys.readouterr().err
    assert find_step(config.out).name == "3"
    assert main([]) == 0
    assert_same_bits(saved_params(config, config.out), jax.device_get(finished.state.params))
    output = capsys.readouterr().err
    assert "Back ends: causal_attention xla" in output
    assert "warning" not in output  # no kernel is made for a CPU


def test_nan_stops_with_the_step_s_number_and_leaves_the_last_good_checkpoint(
    uninterrupted, config, monkeypatch, capsys
):
    reference, _ = uninterrupted
    config = dataclasses.replace(
        reference, out=config.out, checkpoint=dataclasses.replace(config.checkpoint, every=2)
    )

    def poisoned(config):
        step, count = make_train_step(config), iter(range(100))

        def poison(state, batch):
            if next(count) == 3:  # the step whose result would be saved next
                state = dataclasses.replace(state, params=jax.tree.map(lambda p: p * np.nan, state.params))
            return step(state, batch)

        return poison

    monkeypatch.setattr(loop, "make_train_step", poisoned)
    with pytest.raises(DivergedError, match=r"Step 3 diverged: .*loss = nan"):
        train(config)
    assert find_step(config.out).name == "2"
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(saved_params(config, config.out)))
    monkeypatch.setattr("mlra_jax.cli.configs.parse_train_args", lambda argv: config)
    assert main([]) == 1
    assert "error: Step 5 diverged" in capsys.readouterr().err


def test_the_last_step_is_evaluated_before_it_is_saved_and_not_saved_if_that_diverges(
    uninterrupted, config, monkeypatch
):
    reference, finished = uninterrupted
    config = dataclasses.replace(reference, out=config.out)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_eval_step", lambda config: lambda params, batch: (np.float32(np.nan), 1))
        with pytest.raises(DivergedError, match="Step 8 diverged: eval_loss = nan"):
            train(config)
    assert find_step(config.out).name == "4"
    assert train(config).eval_loss == finished.eval_loss


def test_parameters_alone_are_trained_further_with_a_new_optimizer_and_kept(uninterrupted, config, capsys):
    reference, finished = uninterrupted
    config = dataclasses.replace(
        reference, out=config.out, steps=1, checkpoint=dataclasses.replace(reference.checkpoint, keep=1)
    )
    save_params(config.run_dir, finished.state.params, reference)
    first = train(config)
    assert first.step == 1
    assert "Continuing tiny" in capsys.readouterr().err
    # Update 0 has learning rate 0: these are still the parameters that were found.
    assert_same_bits(first.state.params, finished.state.params)
    assert train(dataclasses.replace(config, steps=3)).step == 3
    assert sorted(os.listdir(f"{config.out}/checkpoints")) == ["0", "3"]
    assert_same_bits(saved_params(config, config.out, 0), jax.device_get(finished.state.params))


def test_parameters_alone_of_another_model_are_refused(uninterrupted, config):
    reference, finished = uninterrupted
    config = dataclasses.replace(reference, out=config.out)
    save_params(config.run_dir, finished.state.params, config)
    with pytest.raises(CheckpointError, match=r"model\.d_ff: 64 -> 48"):
        train(dataclasses.replace(config, model=dataclasses.replace(config.model, d_ff=48)))


def test_a_run_starts_from_the_parameters_of_another_and_says_what_differs(uninterrupted, config, capsys):
    reference, finished = uninterrupted
    model = dataclasses.replace(reference.model, init_std=0.5)
    config = dataclasses.replace(reference, out=config.out, init_from=reference.out, model=model, steps=1)
    first = train(config)
    assert first.step == 1
    assert_same_bits(first.state.params, finished.state.params)  # update 0 has learning rate 0
    said = capsys.readouterr().err
    assert f"Its first parameters are those of {reference.out}." in said
    assert "model.init_std: 0.02 -> 0.5" in said
    # It goes on by itself, whatever has become of the other run.
    gone = dataclasses.replace(config, init_from=f"{reference.out}/gone", steps=3)
    assert train(gone).step == 3


def test_a_run_from_parameters_of_another_model_is_refused_and_leaves_no_folder(uninterrupted, config):
    reference, _ = uninterrupted
    model = dataclasses.replace(reference.model, norm_eps=1e-5, rope_base=5e5, d_ff=48)
    config = dataclasses.replace(reference, out=config.out, init_from=reference.out, model=model)
    with pytest.raises(CheckpointError) as error:
        train(config)
    lines = str(error.value).splitlines()
    assert "holds another model than this run trains" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == ["  - model.d_ff", "  - model.norm_eps"]
    with pytest.raises(CheckpointError, match=r"No checkpoint at .*nowhere"):
        train(dataclasses.replace(config, init_from=f"{reference.out}/nowhere"))
    assert not os.path.exists(config.out)


def test_a_home_folder_that_no_shell_expanded_holds_the_whole_run_and_the_compiled_programs(
    uninterrupted, compiled, monkeypatch, tmp_path
):
    reference, _ = uninterrupted
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(reference, out="~/runs/x", compilation_cache="~/cache", steps=1)
    compilation_cache.reset_cache()
    try:
        train(config)
    finally:
        jax.config.update("jax_compilation_cache_dir", str(compiled))
        compilation_cache.reset_cache()
    assert [p.name for p in tmp_path.iterdir()] == ["home"]
    assert {"checkpoints", "config.json", FILE_NAME} <= set(os.listdir(tmp_path / "home" / "runs" / "x"))
    assert any(name.startswith("jit_step") for name in os.listdir(tmp_path / "home" / "cache"))


def test_a_bucket_without_its_library_is_refused_before_training(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # importing it fails
    for field in ("out", "compilation_cache"):
        with pytest.raises(StorageError, match=r"Using gs://bucket/x .* pip install 'mlra_jax\[gcs\]'"):
            train(dataclasses.replace(config, **{field: "gs://bucket/x"}))
    assert jax.config.values["jax_compilation_cache_dir"] != "gs://bucket/x"


def test_mfu_is_the_share_of_the_peak_of_all_devices(uninterrupted, config, monkeypatch, capsys):
    reference, finished = uninterrupted
    monkeypatch.setattr(loop, "peak_flops", lambda kind: 1e12)
    train(dataclasses.replace(reference, out=config.out, steps=3))
    n_params = sum(p.size for p in jax.tree.leaves(finished.state.params))
    per_token = train_flops_per_token(reference.model, n_params, reference.data.seq_len)
    last = read_metrics(config.out)[2]
    assert last["mfu"] == pytest.approx(last["tokens_per_second"] * per_token / (8 * 1e12))
    assert last["seconds_left"] == 0
    assert re.search(
        r"step 1/3 · loss \d\.\d{4} · \S+ tokens/s · MFU \d+\.\d % · \d\d:\d\d left\n",
        capsys.readouterr().err,
    )


def test_another_model_in_the_same_folder_is_refused_before_anything_is_written(uninterrupted):
    config, _ = uninterrupted
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, d_ff=48), steps=20)
    before = sorted(os.listdir(config.out)), read_metrics(config.out)
    with pytest.raises(CheckpointError, match=r"model\.d_ff: 64 -> 48"):
        train(other)
    assert (sorted(os.listdir(config.out)), read_metrics(config.out)) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": MeshConfig(3, 1, 1, 1)}, "cannot be laid out on 8 device"),
        ({"mesh": MeshConfig(1, 1, 8, 1)}, r"n_heads=4 is not divisible by mesh axis tensor=8"),
        ({"steps": 0}, "steps=0 must be at least 1"),
    ],
)
def test_a_run_that_cannot_be_laid_out_is_refused_and_leaves_no_folder(config, change, message):
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(config, **change))
    assert not os.path.exists(config.out)


def test_profile_records_a_window_of_steps_even_of_a_short_run(uninterrupted, config):
    reference, _ = uninterrupted
    log = dataclasses.replace(reference.log, profile_start=10, profile_steps=2)
    train(dataclasses.replace(reference, out=config.out, log=log, steps=3))
    traces = [f for _, _, files in os.walk(f"{config.out}/profile") for f in files]
    assert any(f.endswith(".xplane.pb") for f in traces)


# Faults ---------------------------------------------------------------------------------------------------------------


def command_line(monkeypatch, config):
    """Makes `main([])` train `config`."""
    monkeypatch.setattr("mlra_jax.cli.configs.parse_train_args", lambda argv: config)


def test_sigterm_during_a_save_loses_neither_that_step_nor_the_last(uninterrupted, config, monkeypatch):
    reference, finished = uninterrupted
    every = dataclasses.replace(reference.checkpoint, every=1)
    config = dataclasses.replace(reference, out=config.out, checkpoint=every)
    being_saved = []

    def act():
        if not being_saved and (names := unfinished(Path(config.out))):
            being_saved.extend(int(name.split(".")[0]) for name in names)
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        at_batch(patch, None, act)
        stopped = train(config)
    assert stopped.interrupted
    assert being_saved == [stopped.step - 1]
    assert {p.name for p in Path(config.out, "checkpoints").iterdir()} >= {
        f"{stopped.step - n}" for n in (0, 1)
    }
    assert_same_bits(
        train(dataclasses.replace(config, checkpoint=reference.checkpoint)).state, finished.state
    )


def test_a_full_disk_ends_the_run_with_one_sentence_and_the_same_command_goes_on_to_the_same_bits(
    uninterrupted, config, monkeypatch, capfd
):
    reference, finished = uninterrupted
    config = dataclasses.replace(reference, out=config.out)
    command_line(monkeypatch, config)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:

        def fill():
            """As a full disk, once step 4 is saved: no file can grow beyond 20 kB, which only arrays do."""
            while not Path(config.out, "checkpoints", "4").exists():
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

        at_batch(patch, 7, fill)
        try:
            assert main([]) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capfd.readouterr().err
    assert re.search(
        r"\nerror: Saving a checkpoint in .* failed \(File too large\); step 4 there is safe.*\n$", error
    )
    assert "Traceback" not in error
    assert find_step(config.out).name == "4"
    assert main([]) == 0
    assert_same_bits(saved_params(config, config.out), jax.device_get(finished.state.params))


def test_nan_updates_are_left_out_up_to_the_limit_and_a_resumed_run_leaves_out_the_same(
    uninterrupted, config, monkeypatch, capsys, tmp_path
):
    reference, _ = uninterrupted
    config = dataclasses.replace(
        reference,
        out=config.out,
        optim=dataclasses.replace(reference.optim, skip_limit=2),
        checkpoint=dataclasses.replace(reference.checkpoint, every=1, keep=10),
    )
    data = loop.TrainBatches(config.data, config.model.vocab_size, config.seed)
    poison = np.stack([data.rows(step, [0])[0, :-1] for step in (3, 5, 6, 7)])
    loss_sum = step_module._loss_sum

    def poisoned(config, params, inputs, targets, **totals):
        nats, count = loss_sum(config, params, inputs, targets, **totals)
        hit = jnp.any(jnp.all(inputs == poison[:, None], axis=-1))
        return nats * jnp.where(hit, jnp.nan, 1), count

    monkeypatch.setattr(step_module, "_loss_sum", poisoned)
    message = r"Step 7 diverged: its update had to be skipped \(loss nan, .*number 3 in a row, .*skip_limit 2"
    with pytest.raises(DivergedError, match=message):
        train(config)
    assert "step 6/8 · update skipped: loss nan, gradient norm nan (2 in a row)" in capsys.readouterr().err
    records = read_metrics(config.out)
    assert [records[s]["skipped"] for s in range(7)] == [0, 0, 0, 1, 1, 2, 3]
    assert [s for s in range(7) if "loss" not in records[s]] == [3, 5, 6]
    moments = [records[s]["momentum_norm"] for s in range(7)]
    assert moments[3] == moments[2]
    assert moments[6] == moments[5] == moments[4] != moments[3]
    assert_same_bits(saved_params(config, config.out, 7), saved_params(config, config.out, 5))
    rates = [records[s]["learning_rate"] for s in range(7)]
    assert rates == [read_metrics(reference.out)[s]["learning_rate"] for s in range(7)]

    again = dataclasses.replace(config, out=str(tmp_path / "resumed"))
    with monkeypatch.context() as patch:
        at_batch(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(again).step == 6  # between two skipped updates
    with pytest.raises(DivergedError, match=message):
        train(again)
    assert_same_bits(saved_params(again, again.out, 7), saved_params(config, config.out, 7))


def test_a_disk_that_takes_no_metrics_ends_the_run_with_one_sentence(
    uninterrupted, config, monkeypatch, capsys
):
    def append(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    command_line(monkeypatch, dataclasses.replace(uninterrupted[0], out=config.out))
    monkeypatch.setattr("mlra_jax.training.metrics.JsonLines._append", append)
    assert main([]) == 1
    assert (
        "metrics.jsonl: No space left on device; make room there, or name another place. Then the same command"
        in capsys.readouterr().err
    )


def test_a_run_that_another_process_trains_is_refused_before_anything_of_it_is_touched(config):
    with owned(config.out):
        with pytest.raises(UserError, match=r"The run .* is being written by another process"):
            train(config)
        assert os.listdir(config.out) == [".lock"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads that Orbax gave up
def test_a_truncated_newest_checkpoint_is_said_and_the_one_before_continued_to_the_same_bits(
    uninterrupted, config, capsys
):
    reference, finished = uninterrupted
    shutil.copytree(reference.out, config.out)
    for file in Path(config.out).glob("checkpoints/8/params/**/d/*"):
        os.truncate(file, file.stat().st_size // 2)
    result = train(dataclasses.replace(reference, out=config.out))
    output = capsys.readouterr().err
    assert re.search(r"Checkpoint 8 is damaged \(.*\); it is now .*/8\.damaged\.\n", output)
    assert "from step 4:" in output
    assert_same_bits(result.state, finished.state)
    assert find_step(config.out).name == "8"


# Processes ------------------------------------------------------------------------------------------------------------


def wait_for(process, happened):
    """Waits until `happened()`, or until the run has ended as it should."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if happened():
            return
        if process.poll() is not None:
            assert process.returncode == 0, process.communicate()[0]
            return
        time.sleep(0.002)
    raise TimeoutError("it does not happen")


def n_lines(out):
    """Lines of metrics that a run has written."""
    return len((out / FILE_NAME).read_text().splitlines()) if (out / FILE_NAME).exists() else 0


def unfinished(out):
    """Names of the checkpoints that are being written, or were when the run was killed."""
    return [p.name for p in out.glob("checkpoints/*.orbax-checkpoint-tmp*")]


def finish(process, status=0):
    """Output of a process that must end with this status."""
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == status, output
    return output


def test_a_run_killed_at_random_moments_ends_with_the_bits_of_one_never_interrupted(
    uninterrupted, start_training, tmp_path
):
    seed = random.randrange(2**32)
    print(f"{seed=}")
    rng, out = random.Random(seed), tmp_path / "killed"
    config = dataclasses.replace(uninterrupted[0], out=str(tmp_path / "whole"), steps=20)
    finished = train(config)
    mesh = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    options = [*mesh, "--checkpoint.every", "1", "--steps", str(config.steps)]

    def killed(happened, delay=0.0):
        process = start_training(out, *options)
        try:
            wait_for(process, happened)
            time.sleep(delay)
        finally:
            process.kill()
            process.communicate()

    killed(lambda: n_lines(out) >= 1, delay=rng.uniform(0, 0.4))
    lines, leftovers = n_lines(out), set(unfinished(out))
    killed(lambda: n_lines(out) > lines and set(unfinished(out)) - leftovers)  # in the middle of a save
    finish(start_training(out, *options))
    assert not unfinished(out)
    assert_same_bits(saved_params(config, out), jax.device_get(finished.state.params))
    losses = {s: r["loss"] for s, r in read_metrics(out).items() if "loss" in r}
    assert losses == {s: r["loss"] for s, r in read_metrics(config.out).items() if "loss" in r}


@pytest.fixture(scope="module")
def start_two(start_training):
    """Starts a run of two processes of four devices each."""
    mesh = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]

    def start(out, steps, *options):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        cluster = ["--distributed.coordinator", f"localhost:{port}", "--distributed.processes", "2", *options]
        return [
            start_training(
                out, *mesh, *cluster, "--distributed.process_id", str(i), "--steps", str(steps), devices=4
            )
            for i in range(2)
        ]

    return start


@pytest.fixture(scope="module")
def two_processes(start_two, tmp_path_factory):
    """A run of two processes: SIGTERM to the second only, then both started again."""
    out = tmp_path_factory.mktemp("two")
    processes = start_two(out, 10_000)
    try:
        wait_for(processes[0], lambda: n_lines(out) >= 3)
        processes[1].send_signal(signal.SIGTERM)
        stopped = [finish(p, 75) for p in processes]
        step = int(find_step(out).name)
        processes = start_two(out, step + 2)
        resumed = [finish(p) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return out, step, stopped, resumed


def test_sigterm_to_one_of_two_processes_saves_and_stops_both_at_one_step_and_both_go_on(two_processes):
    out, step, stopped, resumed = two_processes
    assert f"Stopped by SIGTERM after step {step}, saved" in stopped[0]
    assert re.search(rf"from step {step}:", resumed[0])
    assert find_step(out).name == str(step + 2)


def test_two_processes_of_four_devices_give_the_losses_of_one_process_of_eight(
    two_processes, uninterrupted, config
):
    out, step, _, _ = two_processes
    reference, _ = uninterrupted
    train(dataclasses.replace(reference, out=config.out, steps=step + 2))
    records, expected = read_metrics(out), read_metrics(config.out)
    assert list(records) == list(expected)
    for s in expected:
        for name in {"loss", "eval_loss", "grad_norm"} & expected[s].keys():
            assert records[s][name] == pytest.approx(expected[s][name], rel=1e-5), (s, name)


def test_one_of_two_processes_killed_ends_the_other_and_any_number_of_processes_continues(
    uninterrupted, start_two, config, tmp_path
):
    reference, _ = uninterrupted
    out = tmp_path / "two"
    shutil.copytree(reference.out, out)  # of one process
    shutil.copytree(reference.out, config.out)
    processes = start_two(out, 10_000, "--distributed.timeout", "4")
    try:
        wait_for(processes[0], lambda: n_lines(out) >= n_lines(Path(reference.out)) + 8)
        processes[1].kill()
        output, _ = processes[0].communicate(timeout=TIMEOUT)
    finally:
        for p in processes:
            p.kill()
    assert processes[0].returncode == 1
    assert re.search(r"\nerror: process 1 died, or its host cannot be reached; the same command.*\n$", output)
    assert "Traceback" not in output
    assert "from step 8:" in output
    train(dataclasses.replace(reference, out=config.out, steps=12))
    records, expected = read_metrics(out), read_metrics(config.out)
    for s in range(8, 12):
        assert records[s]["loss"] == pytest.approx(expected[s]["loss"], rel=1e-5)
    saved = int(find_step(out).name)
    assert train(dataclasses.replace(reference, out=str(out), steps=saved + 1)).step == saved + 1
