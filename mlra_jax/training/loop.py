"""The training loop: config, mesh, data, model and optimizer, restore, loop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh, NamedSharding

from mlra_jax.checkpoints import (
    Checkpoints,
    Restored,
    SaveError,
    check_initial,
    has_checkpoint,
    load_initial,
    owned,
    write_config,
)
from mlra_jax.config import TrainConfig
from mlra_jax.data.pipeline import EvalBatches, TrainBatches
from mlra_jax.distributed import StopSignal, agree
from mlra_jax.errors import ExplainedError
from mlra_jax.execution.accelerators import device_memory
from mlra_jax.execution.back_ends import BackEnds
from mlra_jax.execution.compilation_cache import keep_compiled
from mlra_jax.execution.flops import peak_flops, train_flops_per_token
from mlra_jax.execution.planner import Plan, resolve
from mlra_jax.sharding import TRAIN_RULES, check_train_layout, make_mesh
from mlra_jax.storage import RUN_PROTOCOLS, check_storage, is_remote
from mlra_jax.training.metrics import Metrics, Progress, check_sinks, open_sinks, shown
from mlra_jax.training.step import TrainState, abstract_state, init_state, make_eval_step, make_train_step

_PATIENCE = 6.0
"""How many times longer than a step what compiles, evaluates or saves may take."""


class DivergedError(ExplainedError, RuntimeError):
    """A loss or norm is NaN or infinite; the message names the step."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The outcome of a call of `train`."""

    state: TrainState
    """The final state."""
    step: int
    """Number of updates made, including those of earlier processes."""
    eval_loss: float | None
    """The last held-out loss in this process, in nats per token; None if there was no evaluation."""
    interrupted: bool
    """Whether a SIGTERM ended the run before its last step."""


def laid_out(config: TrainConfig) -> tuple[TrainConfig, Mesh, Plan]:
    """The run with what it leaves open chosen, its mesh over all devices, and what was chosen.

    Raises:
      ConfigError: the model or the batch cannot be laid out on the devices, or does not fit them.
    """
    check_train_layout(config, config.mesh.resolve(jax.device_count()))
    mesh = make_mesh(config.mesh)
    config, plan = resolve(config, mesh, agree(device_memory(jax.local_devices()[0])))
    return config, mesh, plan


def train(config: TrainConfig, doing: Callable[[str, float], None] | None = None) -> TrainResult:
    """Trains the run that `config` describes, or continues it; every process of a cluster calls it.

    A run found in `config.run_dir` continues from its latest complete checkpoint, on any mesh; a checkpoint of
    parameters alone (converted ones, or those of `config.init_from`) is trained from step 0 with a new optimizer.
    SIGTERM on any process saves and returns. Hosts must share the storage of `run_dir`.

    Args:
      config: the run.
      doing: called with what comes next, and how many times longer than a step it may take; see `Watchdog.doing`.

    Raises:
      ConfigError: the configuration is illegal, or does not fit the devices.
      DataError: the data cannot be used.
      UserError: another process trains in `run_dir`.
      StorageError: `run_dir` is in a bucket whose library is not installed.
      CheckpointError: the run's folder, or `init_from`, holds a run of another model.
      DivergedError: loss, gradient or parameters became NaN or infinite; no checkpoint holds such a step.
    """
    doing = doing or (lambda what, patience: None)
    # All checks come first, before anything is compiled or allocated.
    config.validate()
    check_sinks(config)
    check_storage(config.run_dir, RUN_PROTOCOLS)
    keep_compiled(config.compilation_cache)
    if config.init_from and not has_checkpoint(config.run_dir):
        check_initial(config)
    config, mesh, plan = laid_out(config)
    n_data_shards = mesh.shape["data"] * mesh.shape["fsdp"]

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))

        train_data = TrainBatches(config.data, config.model.vocab_size, config.seed)
        eval_data = EvalBatches.held_out(config.data, config.model.vocab_size, config.log.eval_sequences)

        abstract = abstract_state(config, mesh)
        train_step, eval_step = make_train_step(config), make_eval_step(config)

        stack.enter_context(owned(config.run_dir))
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(config.run_dir, config.checkpoint)))
        found = checkpoints.restore(config, abstract) or load_initial(config, abstract.params)
        start = found.step if found else 0
        state = found.state if found else None
        if state is None:
            state = init_state(config, found.params if found else None)

        monitor = stack.enter_context(contextlib.closing(_Monitor(config, abstract, found, plan)))
        stack.enter_context(monitor.back_ends)
        stop = stack.enter_context(StopSignal())
        profiler = stack.enter_context(contextlib.closing(_Profiler(config, start)))
        sharding = NamedSharding(mesh, TRAIN_RULES.spec(None, "batch", "length"))
        batches = stack.enter_context(train_data.device_batches(sharding, plan.accumulation, start))

        def evaluate(params: Any) -> float:
            micro_batch = config.data.micro_batch * n_data_shards
            n_micro = math.ceil(eval_data.n_sequences / micro_batch)
            (batch,) = eval_data.device_batches(sharding, n_micro, micro_batch)
            nats, count = jax.device_get(eval_step(params, batch))
            return float(nats / count)

        eval_loss, step, interrupted = None, start, False
        while step < config.steps and not interrupted:
            patience = 1.0 if step > start + 1 else _PATIENCE
            profiler.before(step)
            doing(f"the data of step {step}", patience)
            batch = next(batches)
            doing(f"step {step}", patience)
            state, metrics = train_step(state, batch)
            monitor.started(step, metrics)
            step += 1
            interrupted = stop.reached(step) and step < config.steps
            profiler.after(step, metrics)

            last = step == config.steps
            save = last or interrupted or step % config.checkpoint.every == 0
            measure = not interrupted and (last or step % config.log.eval_every == 0)
            if save or measure:
                doing(f"the end of step {step - 1}", patience)
                monitor.finish()  # raises if this step is bad, before it can get into a checkpoint
                # In this order, so that a run killed in between does not count as finished without its evaluation.
                doing(f"the evaluation or checkpoint after {step} steps", _PATIENCE)
                if measure:
                    eval_loss = evaluate(state.params)
                    monitor.evaluated(step, eval_loss)
                if save:
                    checkpoints.save(step, state, config)
                monitor.resume()
        checkpoints.wait()
        monitor.ended(step, interrupted)
        return TrainResult(state, step, eval_loss, interrupted)


class _Monitor:
    """Fetches each step's metrics while the next step runs, checks them, and reports every `log.every` steps."""

    def __init__(self, config: TrainConfig, abstract: TrainState, found: Restored | None, plan: Plan):
        """`found`: the checkpoint that the run continues; None: there is none."""
        self._config, self._start = config, found.step if found else 0
        start = self._start
        first = jax.process_index() == 0
        writes = first and start < config.steps  # a finished run's files stay as they are
        self._metrics = Metrics(open_sinks(config, start) if writes else [])
        self._progress = Progress(config.steps, start, active=first)
        self.back_ends = BackEnds(self._progress.say)
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._tokens_per_step = config.data.global_batch * config.data.seq_len

        n_params = sum(math.prod(p.shape) for p in jax.tree.leaves(abstract.params))
        flops_per_token = train_flops_per_token(config.model, n_params, config.data.seq_len)
        device = jax.devices()[0]
        peak = peak_flops(device.device_kind)
        self._mfu_per_rate = flops_per_token / (peak * jax.device_count()) if peak else None

        # Since the last report: its time (None until the first step is done, so that compilation is not measured), time
        # spent evaluating and saving, steps, and how many of them were clipped.
        self._since: float | None = None
        self._paused_at = self._paused = 0.0
        self._steps = self._clipped = 0.0

        for sentence in found.damaged if found else []:
            self._progress.say(sentence)
        if writes:
            write_config(config.run_dir, config)
            verb = "Continuing" if found else "Training"
            self._progress.say(
                f"{verb} {config.name} in {config.run_dir} from step {start}: "
                f"{shown(n_params)} parameters, {jax.device_count()} x {device.device_kind}, "
                f"{self._tokens_per_step} tokens per step."
            )
            if config.init_from and found and found.state is None:
                self._progress.say(f"Its first parameters are those of {config.init_from}.")
            self._progress.say(f"Estimated: {plan}.")
            for change in found.changes if found else []:
                self._progress.say(f"  changed since the checkpoint: {change}")

    def started(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Processes the previous step's metrics while step `step` runs on the device."""
        if step == self._start:
            self._progress.say(str(self.back_ends))
        self._look()
        self._pending = step, metrics

    def finish(self) -> None:
        """Waits for the running step, processes its metrics, and stops the clock."""
        self._look()
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        """Restarts the clock."""
        self._paused += time.perf_counter() - self._paused_at

    def _look(self) -> None:
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        in_row = int(values.pop("skipped_in_row", 0))
        if in_row:
            self._skipped(step, in_row, values)
            values = {name: value for name, value in values.items() if math.isfinite(value)}
        self._check_finite(step, values)
        self._progress.advance()
        self._steps += 1
        self._clipped += values.pop("clipped")
        now = time.perf_counter()
        if step % self._config.log.every == 0 or step == self._config.steps - 1:
            self._report(step, values, now)
        elif self._since is None:
            self._reset(now)

    def _skipped(self, step: int, in_row: int, values: Mapping[str, float]) -> None:
        limit = self._config.optim.skip_limit
        seen = f"loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}"
        if in_row > limit:
            raise DivergedError(
                f"Step {step} diverged: its update had to be skipped ({seen}), number {in_row} in a row, more than "
                f"--optim.skip_limit {limit}; {self._config.run_dir} holds the checkpoints before it. Try a lower "
                "--optim.lr, or other data from there on (another --seed)."
            )
        self._progress.say(f"step {step}/{self._config.steps} · update skipped: {seen} ({in_row} in a row)")

    def _check_finite(self, step: int, values: Mapping[str, float]) -> None:
        if bad := [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]:
            raise DivergedError(
                f"Step {step} diverged: {', '.join(bad)}. Nothing of it was saved; {self._config.run_dir} holds the "
                "checkpoints before it. Try a lower --optim.lr, more --optim.warmup_steps or another --seed."
            )

    def _reset(self, now: float) -> None:
        self._since, self._paused, self._steps, self._clipped = now, 0.0, 0.0, 0.0

    def _report(self, step: int, values: dict[str, float], now: float) -> None:
        values["tokens"] = (step + 1) * self._tokens_per_step
        values["clip_rate"] = self._clipped / self._steps
        if self._since is not None:
            rate = self._steps * self._tokens_per_step / (now - self._since - self._paused)
            values["tokens_per_second"] = rate
            if self._mfu_per_rate is not None:
                values["mfu"] = rate * self._mfu_per_rate
            values["seconds_left"] = (self._config.steps - step - 1) * self._tokens_per_step / rate
        self._metrics.write(step, values)
        self._progress.report(step, values)
        self._reset(now)

    def evaluated(self, step: int, loss: float) -> None:
        """Checks and records the held-out loss after `step` updates."""
        self._check_finite(step, {"eval_loss": loss})
        self._metrics.write(step, {"eval_loss": loss, "tokens": step * self._tokens_per_step})
        self._metrics.flush()
        self._progress.say(f"step {step}/{self._config.steps} · held-out loss {loss:.4f} nats per token")

    def ended(self, step: int, interrupted: bool) -> None:
        """Reports how the run ended."""
        if interrupted:
            self._progress.say(f"Stopped by SIGTERM after step {step}, saved; the same command continues.")
        elif step == self._start:
            self._progress.say(f"{self._config.run_dir} has all of its {step} steps; nothing to do.")

    def close(self) -> None:
        """Closes files and the progress bar."""
        self._metrics.close()
        self._progress.close()


class _Profiler:
    """Profiles a window of steps into `profile/` of the run, for TensorBoard or XProf.

    A run too short for the window records its last steps.
    """

    def __init__(self, config: TrainConfig, start: int):
        n_steps = config.log.profile_steps
        self._first = max(start, min(start + config.log.profile_start, config.steps - n_steps))
        self._last = min(self._first + n_steps, config.steps)
        self._folder = epath.Path(config.run_dir) / "profile"
        self._local: str | None = None

    def before(self, step: int) -> None:
        """Starts recording if `step` is the first of the window."""
        if step == self._first < self._last:
            # The profiler writes local files only.
            self._local = tempfile.mkdtemp() if is_remote(self._folder) else os.fspath(self._folder)
            jax.profiler.start_trace(self._local)

    def after(self, step: int, result: Any) -> None:
        """Stops after the window's last step, once `result` is computed."""
        if self._local is not None and step == self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes the profile."""
        if self._local is None:
            return
        local, self._local = self._local, None
        try:
            jax.profiler.stop_trace()
        except jax.errors.JaxRuntimeError as error:
            raise SaveError(
                f"The profile could not be written to {self._folder}: {error}; make room there."
            ) from error
        if is_remote(self._folder):
            for file in epath.Path(local).rglob("*"):
                if file.is_file():
                    target = self._folder / file.relative_to(local)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())
