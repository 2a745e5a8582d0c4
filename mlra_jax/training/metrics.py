"""Metrics go to JSON lines, TensorBoard, Weights & Biases, Prometheus, and a progress bar.

"Step k" means the same in every file of a run: the parameters after k updates. The line of step k holds the loss of
batch k under those parameters and the metrics of the update made from it; evaluations and checkpoints of step k belong
to those parameters too.
"""

from __future__ import annotations

import codecs
import importlib.util
import json
import os
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from etils import epath
from tqdm import tqdm

from mlra_jax.config import ConfigError, TrainConfig, to_dict
from mlra_jax.errors import naming
from mlra_jax.storage import RUN_PROTOCOLS, check_storage, is_remote

FILE_NAME = "metrics.jsonl"
_WANDB_ID = "wandb_id.txt"
_SECONDS_BETWEEN_UPLOADS = 60.0


class Sink(Protocol):
    """A destination of metrics."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Appends one JSON object per line to a file: `{"step": 10, "loss": 2.5, ...}`.

    Buckets cannot append: there the whole object is rewritten, at most once a minute and at `flush`.
    """

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._remote = is_remote(self._path)
        # Existing bytes are kept as they are.
        found = self._path.read_bytes() if self._path.exists() else b""
        # A killed run may have left half a line; the next one must not be joined to it.
        repair = b"\n" if found and not found.endswith(b"\n") else b""
        self._lines = [found + repair] if self._remote else []
        self._uploaded = time.monotonic()
        if repair and not self._remote:
            self._append(repair)

    def _append(self, line: bytes) -> None:
        with naming(self._path), self._path.open("ab") as file:
            file.write(line)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        line = json.dumps({"step": step, **values}).encode() + b"\n"
        if not self._remote:
            self._append(line)
            return
        self._lines.append(line)
        if time.monotonic() - self._uploaded > _SECONDS_BETWEEN_UPLOADS:
            self.flush()

    def flush(self) -> None:
        if self._remote:
            self._path.write_bytes(b"".join(self._lines))
            self._uploaded = time.monotonic()

    def close(self) -> None:
        self.flush()


class TensorBoard:
    """TensorBoard event files in a folder or a bucket.

    They are written synchronously: a full disk kills the thread of tensorboardX's `SummaryWriter`, and then every
    writer waits for it forever.
    """

    def __init__(self, folder: epath.PathLike, start_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import directory_check

        self._event = Event
        self._folder = os.fspath(folder)
        directory_check(self._folder)
        with naming(self._folder):
            self._writer = EventsWriter(f"{self._folder}/events")
            if (
                start_step
            ):  # what a killed run wrote past the checkpoint is hidden, since these steps are run again
                log = SessionLog(status=SessionLog.START)
                self._writer.write_event(Event(wall_time=time.time(), step=start_step, session_log=log))
        self.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        with naming(self._folder):
            for name, value in values.items():
                event = self._event(wall_time=time.time(), step=step, summary=scalar(name, value))
                self._writer.write_event(event)
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_UPLOADS:
            self.flush()

    def flush(self) -> None:
        with naming(self._folder):
            self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        with naming(self._folder):
            self._writer.close()


class WeightsAndBiases:
    """A run on Weights & Biases. Its id is kept in the run's folder, so that a resumed run continues it."""

    def __init__(self, config: TrainConfig):
        import wandb

        id_file = epath.Path(config.run_dir) / _WANDB_ID
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            project=config.log.wandb_project,
            name=config.name,
            id=id_file.read_text(),
            resume="allow",
            config=to_dict(config),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


class Prometheus:
    """The latest metrics as gauges `mlra_NAME{run="..."}`, `mlra_step` among them, at http://HOST:PORT/metrics.

    Raises:
      ConfigError: the port cannot be opened.
    """

    def __init__(self, run: str, port: int):
        from prometheus_client import CollectorRegistry, start_http_server

        self._run, self._registry = run, CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        try:
            self._server, self._thread = start_http_server(port, registry=self._registry)
        except OSError as error:
            raise ConfigError(
                f"log.prometheus_port={port}: {error.strerror}; choose another port."
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from prometheus_client import Gauge

        for name, value in {"step": step, **values}.items():
            if name not in self._gauges:
                made = Gauge(f"mlra_{name}", f"{name} of the run", ["run"], registry=self._registry)
                self._gauges[name] = made.labels(run=self._run)
            self._gauges[name].set(value)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def check_sinks(config: TrainConfig) -> None:
    """Checks that the packages that a configuration asks for are installed.

    Raises:
      ConfigError: one is not; says which field needs it.
    """
    log = config.log
    for field, module, extra in (
        ("wandb_project", "wandb", "wandb"),
        ("prometheus_port", "prometheus_client", "prometheus"),
    ):
        value = getattr(log, field)
        if value and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"log.{field}={value!r} needs the `{module}` package: pip install 'mlra-jax[{extra}]', or leave it out."
            )


def open_sinks(config: TrainConfig, start_step: int) -> list[Sink]:
    """The sinks that `config.log` asks for, for a run that starts or resumes at `start_step`."""
    run_dir = epath.Path(config.run_dir)
    sinks: list[Sink] = [JsonLines(run_dir / FILE_NAME)]
    if config.log.tensorboard:
        sinks.append(TensorBoard(run_dir / "tensorboard", start_step))
    if config.log.wandb_project:
        sinks.append(WeightsAndBiases(config))
    if config.log.prometheus_port:
        sinks.append(Prometheus(config.name, config.log.prometheus_port))
    return sinks


class Metrics:
    """Writes to all of its sinks; without any (on all processes but the first), it does nothing."""

    def __init__(self, sinks: Sequence[Sink]):
        self._sinks = sinks

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records `values` under `step`."""
        for sink in self._sinks:
            sink.write(step, values)

    def flush(self) -> None:
        """Makes what was written durable."""
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """Flushes and closes every sink."""
        for sink in self._sinks:
            sink.close()


def read_metrics(path: epath.PathLike) -> dict[int, dict[str, float]]:
    """The metrics of a run by step, in order of steps.

    A resumed run may have written a step twice: the later value of each metric counts. Lines that were cut short when
    the run was killed, or are otherwise damaged, are skipped.

    Args:
      path: a run's folder, or a metrics file.

    Raises:
      FileNotFoundError: there is no metrics file.
      StorageError: the library for the bucket is not installed.
    """
    check_storage(path, RUN_PROTOCOLS)
    file = epath.Path(path)
    if file.suffix != ".jsonl":
        file /= FILE_NAME
    if not file.exists():
        raise FileNotFoundError(f"No metrics in {path}: expected {file}; is it the folder of a training run?")
    records: dict[int, dict[str, float]] = {}
    for line in file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"):
        try:
            values = json.loads(line.decode())
            step = values.pop("step")
        except (ValueError, AttributeError, KeyError, TypeError):
            continue
        if isinstance(step, int):
            records.setdefault(step, {}).update(values)
    return dict(sorted(records.items()))


def shown(value: float) -> str:
    """`value` with three digits and the suffix k, M or G."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


class Progress:
    """The run's progress: a bar on a terminal, otherwise a line of text for each report.

    Shows loss, tokens per second, MFU (where the device's peak is known) and the time left.
    """

    def __init__(self, total: int, start: int, active: bool):
        self._total, self._start, self._began = total, start, time.monotonic()
        self._bar: Any = None
        self._active = active
        if active and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05)

    def advance(self) -> None:
        """Counts one more step."""
        if self._bar is not None:
            self._bar.update()

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the metrics of `step`."""
        if not self._active:
            return
        parts = (
            [f"loss {values['loss']:.4f}"] if "loss" in values else []
        )  # it may be missing for a skipped step
        if "tokens_per_second" in values:
            parts.append(f"{shown(values['tokens_per_second'])} tokens/s")
        if "mfu" in values:
            parts.append(f"MFU {100 * values['mfu']:.1f} %")
        if self._bar is not None:
            self._bar.set_postfix_str(" · ".join(parts))  # tqdm itself shows the time left
            return
        if "seconds_left" in values:
            parts.append(f"{tqdm.format_interval(values['seconds_left'])} left")
        self.say(f"step {step}/{self._total} · " + " · ".join(parts))

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self._active:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar on the terminal and goes to the next line."""
        if self._bar is not None:
            self._bar.close()
