"""Checkpoints of a run: saved asynchronously, restored onto any mesh, read by decoding without the optimizer.

    RUN/checkpoints/STEP/params      nested dictionary of arrays, as the model names them
                         optimizer   the optax state and the step
                         guard       the statistics that decide which updates are skipped
                         config      the resolved TrainConfig, JSON
                         digests     a checksum of each array and of the configuration, JSON

STEP is the number of updates made. A step's folder gets its name only when it is complete (in a bucket, its commit file
is written only then). Later damage shows in the digests, with which everything read here is compared: a run moves a
damaged checkpoint aside, never deletes it, and continues from the one before; everything else refuses it. Arrays are
stored in pieces with their shapes, so that a checkpoint does not depend on a mesh, and each process reads only what its
own devices hold.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from mlra_jax.config import CheckpointConfig, ConfigError, TrainConfig, from_dict, to_dict
from mlra_jax.errors import ExplainedError, UserError
from mlra_jax.lazy_arrays import LazyStack, LazyTensor
from mlra_jax.storage import RUN_PROTOCOLS, check_storage, exclusive, is_remote, write_whole
from mlra_jax.training.step import TrainState

FOLDER = "checkpoints"


class CheckpointError(UserError):
    """A checkpoint is absent, damaged, or not of the model that it is needed for."""


class DamagedError(CheckpointError):
    """A checkpoint differs from what was saved."""


class SaveError(ExplainedError, RuntimeError):
    """A checkpoint (or another file of a run) could not be written; the message says why, and what is safe."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """The checkpoint that a run continues from."""

    step: int
    """Number of updates made."""
    state: TrainState | None
    """The training state; None if the checkpoint holds only parameters."""
    params: dict[str, Any]
    """Its parameters."""
    changes: list[str]
    """Differences of the configuration from the stored one, each as "field: stored -> current"."""
    damaged: list[str]
    """One sentence for each newer checkpoint that is damaged."""


def _absolute(path: epath.PathLike) -> epath.Path:
    check_storage(path, RUN_PROTOCOLS)
    path = epath.Path(path)
    return path if is_remote(path) else path.expanduser().absolute()


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dictionaries by dotted path."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def _items(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint that hold a state."""
    optimizer = {"state": state.opt_state, "step": state.step}
    return {"params": state.params, "optimizer": optimizer, "guard": state.skip_state}


def find_step(checkpoint: epath.PathLike, step: int | None = None) -> epath.Path:
    """Folder of one complete step.

    Args:
      checkpoint: a run's folder, its `checkpoints` folder, or one step's folder; local or a bucket URL.
      step: number of its updates; None: the latest, or that of `checkpoint`.

    Raises:
      CheckpointError: there is none; the message lists the steps that there are.
      StorageError: the library for the bucket is not installed.
    """
    root = _absolute(checkpoint)
    if (root / FOLDER).exists():
        root /= FOLDER
    elif (root / "params").exists() and (root / "config").exists():
        if step is None or str(step) == root.name:
            return root
        root = root.parent
    if not root.exists():
        raise CheckpointError(f"No checkpoint at {checkpoint}: the folder does not exist.")
    found = {m.step: m.path for m in ocp.path.step.standard_name_format().find_all(root)}
    if not found:
        weights = any(root.glob("*.safetensors"))
        hint = " mlra-convert makes one of the safetensors files there." if weights else ""
        raise CheckpointError(
            f"No complete checkpoint at {checkpoint}; expected step folders in {root}.{hint}"
        )
    wanted = max(found) if step is None else step
    if wanted not in found:
        raise CheckpointError(f"No checkpoint of step {step} at {checkpoint}; it has {sorted(found)}.")
    return epath.Path(found[wanted])


def has_checkpoint(run_dir: epath.PathLike) -> bool:
    """Whether a run has saved anything from which it would continue."""
    try:
        return bool(find_step(run_dir))
    except CheckpointError:
        return False


def load_config(checkpoint: epath.PathLike, step: int | None = None) -> TrainConfig:
    """The configuration of the run that wrote a checkpoint, without what was chosen for the run's devices.

    Args:
      checkpoint: see `find_step`.
      step: see `find_step`.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
      ConfigError: the stored configuration has fields that this version does not know.
    """
    step_dir = find_step(checkpoint, step)
    with _explaining_damage(step_dir):
        return from_dict(_read_config(step_dir)[0], afresh=True)


def _check_tree(step_dir: epath.Path, item: str, abstract: Any) -> None:
    """Compares the stored shapes with the expected ones, before anything is read.

    Raises:
      CheckpointError: every missing, extra or misshapen array, with both shapes.
    """
    stored = ocp.PyTreeCheckpointHandler().metadata(step_dir / item).tree
    check_shapes(f"The {item} in {step_dir}", _flat(stored), _flat(abstract))


def check_shapes(what: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compares shapes by name.

    Raises:
      CheckpointError: every missing, extra or misshapen array, with both shapes.
    """
    stored, wanted = ({k: tuple(v.shape) for k, v in arrays.items()} for arrays in (stored, wanted))
    faults = [
        f"{k}: {stored.get(k, 'not')} in the checkpoint, {wanted.get(k, 'not')} in the model"
        for k in sorted(stored | wanted)
        if stored.get(k) != wanted.get(k)
    ]
    if faults:
        raise CheckpointError(
            f"{what} do not fit the model ({len(faults)} of {len(stored | wanted)} arrays):\n  - "
            + "\n  - ".join(faults)
        )


def _digest(x: Any) -> Any:
    """The sum modulo 2^32 of the mixed bits of all elements, which is the same on any mesh.

    The mixing is one-to-one: one changed element always changes the digest, and several miss it once in 2^32.
    """
    bits = x.view(f"uint{8 * x.dtype.itemsize}").astype("uint32")
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):  # Wellons' "lowbias32"
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    return bits.sum(dtype="uint32")


def _digest_on_host(x: np.ndarray) -> int:
    """`_digest` of a NumPy array, in pieces that take little memory."""
    flat, step = np.ascontiguousarray(x).reshape(-1), 1 << 22
    return sum(int(_digest(flat[i : i + step])) for i in range(0, flat.size, step)) % 2**32


# One program: several small ones with collectives, in flight at once, have deadlocked on the CPU.
_digest_each = jax.jit(lambda arrays: jnp.stack([_digest(x) for x in arrays]))


def _digests(items: dict[str, Any]) -> dict[str, dict[str, int]]:
    """The digests of each item's arrays (JAX or NumPy), by path."""
    found: dict[str, dict[str, int]] = {item: {} for item in items}
    names, arrays = [], []
    for item, tree in items.items():
        for path, array in jax.tree.leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            if isinstance(array, np.ndarray):
                found[item][name] = _digest_on_host(array)
            else:
                names.append((item, name))
                arrays.append(array)
    digests = jax.device_get(_digest_each(arrays)).tolist() if arrays else []
    for (item, name), digest in zip(names, digests, strict=True):
        found[item][name] = digest
    return found


def _config_digest(config: Any) -> int:
    return zlib.crc32(json.dumps(config, sort_keys=True).encode())


def _read_json(step_dir: epath.Path, item: str) -> Any:
    return ocp.JsonCheckpointHandler().restore(step_dir / item)


def _read_config(step_dir: epath.Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The stored configuration and digests, the latter None if an earlier version wrote the checkpoint.

    Raises:
      DamagedError: the configuration differs from what was saved.
      Exception: whatever reading a damaged file raises.
    """
    config = _read_json(step_dir, "config")
    if not (step_dir / "digests").exists():
        return config, None
    digests = _read_json(step_dir, "digests")
    if digests["config"] != _config_digest(config):
        raise DamagedError(f"{step_dir / 'config'} is not what was saved")
    return config, digests


def _read(step_dir: epath.Path, item: str, abstract: Any) -> Any:
    """One item of a checkpoint, laid out as `abstract` says, without waiting for other processes."""
    return ocp.StandardCheckpointHandler().restore(step_dir / item, args=ocp.args.StandardRestore(abstract))


def _check_digests(step_dir: epath.Path, items: dict[str, Any], digests: dict[str, Any] | None) -> None:
    """Compares arrays that were read with the digests of those that were saved.

    Raises:
      DamagedError: some differ; the message names them.
    """
    if digests is None:
        return
    bad = [
        f"{item}: {name}"
        for item, found in _digests(items).items()
        for name, digest in found.items()
        if digest != digests[item].get(name)
    ]
    if bad:
        raise DamagedError(f"{step_dir} holds other values than were saved, in {', '.join(bad)}")


def _read_params(
    step_dir: epath.Path, abstract: dict[str, jax.ShapeDtypeStruct], digests: dict[str, Any] | None
) -> dict[str, Any]:
    """Some parameters as they are stored, by dotted path, laid out as in `abstract` (NumPy arrays without a sharding).

    Raises:
      DamagedError: they differ from what was saved.
      Exception: whatever reading a damaged file raises.
    """
    tree = nnx.traversals.unflatten_mapping(abstract, sep=".")
    args = ocp.args.PyTreeRestore(
        tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
    )
    found = ocp.PyTreeCheckpointHandler().restore(step_dir / "params", args=args)
    _check_digests(step_dir, {"params": found}, digests)
    return _flat(found)


def _reason(error: BaseException) -> str:
    """Why something failed, in short: the system's message if there is one, else the library's first line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = str(error) or type(error).__name__
    if isinstance(error, CheckpointError):
        return text.rstrip(".")
    if code := re.search(r"os_error_code='(\d+)'", text):  # TensorStore's
        return os.strerror(int(code[1]))
    text = re.sub(r" \[\w+=.*", "", text.splitlines()[0]).rstrip(".")
    return text if len(text) <= 300 else "... " + text[-300:]  # the end says which file


@contextmanager
def _explaining_damage(step_dir: epath.Path) -> Iterator[None]:
    """Converts any failure to read a checkpoint into a `CheckpointError`."""
    try:
        yield
    except Exception as error:
        if type(error) is CheckpointError or isinstance(error, ConfigError):
            raise
        raise CheckpointError(
            f"The checkpoint {step_dir} is damaged ({_reason(error)}); name another step."
        ) from error


_T = TypeVar("_T")


def _on_all(act: Callable[[], _T]) -> _T:
    """The result of `act`, if it succeeds on every process.

    Raises:
      DamagedError: it failed on some process; raised on all of them, so that none waits for the others.
    """
    result, fault = None, ""
    try:
        result = act()
    except Exception as error:
        fault = _reason(error) or "unreadable"
    if jax.process_count() > 1:
        failed = np.flatnonzero(multihost_utils.process_allgather(np.array(bool(fault))))
        if failed.size and not fault:
            fault = f"process {failed[0]} cannot read it"
    if fault:
        raise DamagedError(fault)
    return cast(_T, result)


def load_params(checkpoint: epath.PathLike, abstract_params: Any, step: int | None = None) -> Any:
    """The parameters of a checkpoint, read directly into the given layout; the optimizer's state is not read.

    Args:
      checkpoint: see `find_step`.
      abstract_params: nested dictionary of `jax.ShapeDtypeStruct` with concrete shardings (any mesh); arrays are
        converted to the `dtype` given here one at a time.
      step: see `find_step`.

    Raises:
      CheckpointError: there is no such checkpoint, its parameters have other names or shapes (all are listed), or it
        is damaged.
    """
    step_dir = find_step(checkpoint, step)
    with _explaining_damage(step_dir):
        _check_tree(step_dir, "params", abstract_params)
        _, digests = _read_config(step_dir)
        stored = _flat(ocp.PyTreeCheckpointHandler().metadata(step_dir / "params").tree)
        wanted = _flat(abstract_params)
        as_stored = {
            name: jax.ShapeDtypeStruct(x.shape, stored[name].dtype, sharding=x.sharding)
            for name, x in wanted.items()
        }
        kept = [name for name, x in wanted.items() if x.dtype == stored[name].dtype]
        params: dict[str, Any] = {}
        # One at a time, so that at most one array exists in both types.
        for names in filter(None, (kept, *([name] for name in wanted if name not in kept))):
            read = _read_params(step_dir, {name: as_stored[name] for name in names}, digests)
            params |= {name: read[name].astype(wanted[name].dtype) for name in names}
        return nnx.traversals.unflatten_mapping(params, sep=".")


_MAY_DIFFER = ("rope_base", "rotary_scaling.", "init_std", "output_init", "compute_dtype", "param_dtype")
"""Fields of the model that a run may change when it starts from the parameters of another."""


def check_initial(config: TrainConfig) -> list[str]:
    """Compares the model of `config.init_from` with that of the run that starts from its parameters.

    Returns:
      Differences in the model, the tokenizer and the length of sequences, each as "field: stored -> current".

    Raises:
      CheckpointError: there is no such checkpoint, or it is not of the same model (all differences are listed).
    """
    differences = config_differences(load_config(config.init_from), config)
    of_model = [d for d in differences if d.startswith("model.")]
    if refused := [d for d in of_model if not d.removeprefix("model.").startswith(_MAY_DIFFER)]:
        raise CheckpointError(
            f"init_from={config.init_from} holds another model than this run trains; take back, or name another run:"
            "\n  - " + "\n  - ".join(refused)
        )
    return [d for d in differences if d in of_model or d.startswith(("data.seq_len", "data.tokenizer"))]


def load_initial(config: TrainConfig, abstract_params: Any) -> Restored | None:
    """The parameters that a new run starts from (`init_from`), laid out as `abstract_params` says; None: random ones.

    Raises:
      CheckpointError: see `check_initial`; or the checkpoint is damaged.
    """
    if not config.init_from:
        return None
    changes = check_initial(config)
    return Restored(0, None, load_params(config.init_from, abstract_params), changes, [])


def config_differences(stored: TrainConfig, current: TrainConfig) -> list[str]:
    """One entry "field: stored value -> current value" for every field that differs."""
    a, b = _flat(to_dict(stored)), _flat(to_dict(current))
    absent = "(none)"
    return [
        f"{k}: {a.get(k, absent)} -> {b.get(k, absent)}"
        for k in {**a, **b}
        if a.get(k, absent) != b.get(k, absent)
    ]


@contextmanager
def _explained(directory: epath.Path) -> Iterator[None]:
    """Converts failures of `directory`'s storage into a `SaveError`; adds to other errors what is safe."""
    try:
        yield
    except ExplainedError:
        raise
    except Exception as error:
        steps: list[int] = []
        with suppress(OSError):
            steps += sorted(m.step for m in ocp.path.step.standard_name_format().find_all(directory))
        safe = (
            f"step {steps[-1]} there is safe, and the same command continues from it when the cause is gone"
            if steps
            else "nothing was saved before"
        )
        if not _of_storage(error):
            error.add_note(f"Saving a checkpoint in {directory} failed; {safe}.")
            raise
        raise SaveError(f"Saving a checkpoint in {directory} failed ({_reason(error)}); {safe}.") from error


def _of_storage(error: BaseException | None) -> bool:
    """Whether a disk or a bucket is the cause, according to the system or TensorStore."""
    while error is not None:
        status = isinstance(error, ValueError) and re.match(
            r"[A-Z]+(_[A-Z]+)*: ", str(error)
        )  # TensorStore's
        if isinstance(error, OSError) or status:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def owned(run_dir: epath.PathLike) -> Iterator[None]:
    """Locks the run's folder against other runs' processes; the first process of a run holds the lock.

    A run in a bucket is not locked: nothing there ends with a process.

    Raises:
      UserError: another process writes there.
    """
    run = _absolute(run_dir)
    if jax.process_index() > 0 or is_remote(run):
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    with exclusive(run / ".lock", f"The run {run} is being written"):
        yield


class Checkpoints:
    """The checkpoints of one training run.

    Every process of the run creates one and calls the same methods in the same order.
    """

    def __init__(self, run_dir: epath.PathLike, config: CheckpointConfig):
        # Only `save_params` writes step 0: converted parameters are not the run's to delete.
        kept: list[Any] = [policies.LatestN(config.keep), policies.CustomSteps([0])]
        if config.keep_every:
            kept.append(policies.EveryNSteps(config.keep_every))
        self.directory = _absolute(run_dir) / FOLDER
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept), cleanup_tmp_directories=True
            ),
        )

    def latest_step(self) -> int | None:
        """The step of the latest complete checkpoint (or the one being written), or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, config: TrainConfig) -> None:
        """Copies the state to the host and writes it in the background; returns once the copy is made.

        Does nothing if `step` is saved already. A failure in the background is raised by the next call.

        Args:
          step: number of updates made.
          state: the state, which may be donated as soon as this returns.
          config: the run's configuration, stored as JSON.

        Raises:
          SaveError: this checkpoint or the previous one could not be written.
        """
        if step == self.latest_step():
            return
        items, stored = _items(state), to_dict(config)
        digests = _digests(items) | {"config": _config_digest(stored)}
        with _explained(self.directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(item) for name, item in items.items()},
                    config=ocp.args.JsonSave(stored),
                    digests=ocp.args.JsonSave(digests),
                ),
                force=True,
            )

    def check_config(self, step: int, config: TrainConfig) -> list[str]:
        """Compares a checkpoint's configuration with that of the run that continues it.

        Returns:
          Harmless differences, each as "field: stored -> current".

        Raises:
          CheckpointError: the model differs; the message names every field that does.
        """
        stored = from_dict(_read_config(find_step(self.directory, step))[0])
        differences = config_differences(stored, config)
        refused = [d for d in differences if d.startswith("model.")]
        if refused:
            raise CheckpointError(
                f"{self.directory} holds a run of another model; give this one another --name or --out, or take back:"
                "\n  - " + "\n  - ".join(refused)
            )
        return differences

    def restore(self, config: TrainConfig, abstract_state: TrainState) -> Restored | None:
        """The latest intact checkpoint, laid out as `abstract_state` says, whatever mesh saved it.

        Newer, damaged ones are moved aside once it has been read. Processes may see different damage: they agree on a
        checkpoint that all of them can read.

        Args:
          config: the configuration of the run that continues.
          abstract_state: `TrainState` of `jax.ShapeDtypeStruct` with concrete shardings.

        Returns:
          The checkpoint to continue from; None if there is none.

        Raises:
          CheckpointError: the model differs (the message names every field that does), or every checkpoint is damaged.
        """
        faults: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._restore(step, config, abstract_state)
            except DamagedError as error:
                faults[step] = str(error)
                continue
            damaged = [
                f"Checkpoint {s} is damaged ({faults[s]}); it is now {self._move_aside(s)}." for s in faults
            ]
            if damaged:
                if jax.process_count() > 1:
                    multihost_utils.sync_global_devices("damaged checkpoints are moved")
                self._manager.reload()
            return dataclasses.replace(restored, damaged=damaged)
        if faults:
            raise CheckpointError(
                f"No checkpoint in {self.directory} is whole; move the folder away to start anew:"
                + "".join(f"\n  - step {step}: {fault}" for step, fault in faults.items())
            )
        return None

    def _restore(self, step: int, config: TrainConfig, abstract_state: TrainState) -> Restored:
        """One checkpoint.

        Raises:
          DamagedError: it is damaged.
          CheckpointError: the model differs.
        """
        step_dir = find_step(self.directory, step)
        _, digests = _on_all(lambda: _read_config(step_dir))
        changes = self.check_config(step, config)
        wanted = _items(abstract_state)
        if step == 0 and not (step_dir / "optimizer").exists():
            wanted = {"params": wanted["params"]}  # what `save_params` wrote
        elif not (step_dir / "guard").exists():
            del wanted["guard"]  # written by a version that skipped no updates

        def read() -> dict[str, Any]:
            _check_tree(step_dir, "params", wanted["params"])
            return {name: _read(step_dir, name, abstract) for name, abstract in wanted.items()}

        items = _on_all(read)
        _check_digests(step_dir, items, digests)
        state = None
        if "optimizer" in items:
            fresh = lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding)
            skip_state = items.get("guard") or jax.tree.map(fresh, abstract_state.skip_state)
            optimizer = items["optimizer"]
            state = TrainState(items["params"], optimizer["state"], optimizer["step"], skip_state)
        return Restored(step, state, items["params"], changes, [])

    def _move_aside(self, step: int) -> epath.Path:
        """Moves a checkpoint aside without deleting it, and returns its new path."""
        names = (f"{step}.damaged" + (f".{n}" if n else "") for n in itertools.count())
        target = next(path for path in (self.directory / name for name in names) if not path.exists())
        if jax.process_index() == 0:
            find_step(self.directory, step).rename(target)
        return target

    def wait(self) -> None:
        """Waits until the checkpoint that `save` started is complete.

        Raises:
          SaveError: it could not be written.
        """
        with _explained(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last checkpoint, then releases the threads.

        Raises:
          SaveError: the last checkpoint could not be written.
        """
        with _explained(self.directory):
            self._manager.close()


_CHUNK_BYTES = 64 * 2**20
"""Lazy arrays larger than this are written in chunks: a stack layer by layer."""


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes `LazyTensor`s and `LazyStack`s in the format of arrays, one at a time and layer by layer.

    At most one layer of a large stack is thus in memory. (Should Orbax rename the functions overridden here, arrays
    would be written whole, and have no digests.)
    """

    def __init__(self, progress: Callable[[int], Any]):
        super().__init__(deepcopy_host_arrays=False)
        self._progress, self._name = progress, ""
        self.digests: dict[str, int] = {}
        """Digests of the arrays written so far, by dotted path."""

    async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
        for value, info, arg in zip(values, infos, args, strict=True):
            self._name = info.name
            await super()._background_serialize([value], [info], [arg])

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: Any) -> None:
        store = await tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=ts_context)
        by_layer = isinstance(value, LazyStack) and value.nbytes > _CHUNK_BYTES
        places = [(store[i], layer) for i, layer in enumerate(value.layers)] if by_layer else [(store, value)]
        for place, tensor in places:
            values = np.asarray(tensor)
            self.digests[self._name] = (self.digests.get(self._name, 0) + _digest_on_host(values)) % 2**32
            await place.write(values)
            self._progress(tensor.nbytes)


def save_params(
    run_dir: epath.PathLike, params: Any, config: TrainConfig, progress: Callable[[int], Any] = lambda n: None
) -> None:
    """Writes step 0 of a run with only parameters and configuration; decoding reads it like any other checkpoint.

    The step's folder appears when it is complete; its digests, which are known only then, are added afterwards.

    Args:
      run_dir: folder of the run, without any checkpoint yet.
      params: nested dictionary, in the training layout, of JAX or NumPy arrays, or of `LazyTensor`s and `LazyStack`s,
        which are made one at a time, large stacks layer by layer.
      config: the run's configuration, stored as JSON in the checkpoint and as the run's `config.json`.
      progress: called with the number of bytes of each lazy array, or layer of one, as it is written.
    """
    lazy = _LazyHandler(progress)
    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyTensor, lazy),
        (LazyStack, lazy),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )

    def chunks(x: Any) -> ocp.SaveArgs:
        if not isinstance(x, LazyTensor | LazyStack) or x.nbytes <= _CHUNK_BYTES:
            return ocp.SaveArgs()
        if isinstance(x, LazyTensor):
            return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
        return ocp.SaveArgs(chunk_byte_size=x[0].nbytes, shard_axes=(0,))  # each chunk lies in one layer

    run, stored = _absolute(run_dir), to_dict(config)
    with (
        owned(run),
        _explained(run / FOLDER),
        ocp.CheckpointManager(
            run / FOLDER,
            options=ocp.CheckpointManagerOptions(cleanup_tmp_directories=True),
            item_handlers={
                "params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
                "config": ocp.JsonCheckpointHandler(),
            },
        ) as manager,
    ):
        manager.save(
            0,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(params, save_args=jax.tree.map(chunks, params)),
                config=ocp.args.JsonSave(stored),
            ),
        )
    arrays = {name: x for name, x in _flat(params).items() if not isinstance(x, LazyTensor | LazyStack)}
    found = _digests({"params": arrays})["params"] | lazy.digests
    if found.keys() == _flat(params).keys():
        digests = {"params": found, "config": _config_digest(stored)}
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            checkpointer.save(find_step(run, 0) / "digests", args=ocp.args.JsonSave(digests))
    write_config(run, config)


def write_config(run_dir: epath.PathLike, config: TrainConfig) -> None:
    """Writes `config.json` of a run."""
    write_whole(_absolute(run_dir) / "config.json", json.dumps(to_dict(config), indent=2) + "\n")


def lazy_params(checkpoint: epath.PathLike, step: int | None = None) -> dict[str, Any]:
    """The parameters of a checkpoint as they are stored, each read on demand.

    Returns:
      Nested dictionary of `LazyTensor`s, and of `LazyStack`s under `layers`. The last two parameters read are kept, so
      that iterating over the layers of one or two of them reads each once.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged; a damaged array is reported when it is read.
    """
    step_dir = find_step(checkpoint, step)
    with _explaining_damage(step_dir):
        _, digests = _read_config(step_dir)
        stored = ocp.PyTreeCheckpointHandler().metadata(step_dir / "params").tree

    kept: dict[str, np.ndarray] = {}

    def read(name: str, x: Any) -> np.ndarray:
        if name not in kept:
            for old in list(kept)[:-1]:  # before there is another one
                del kept[old]
            with _explaining_damage(step_dir):
                kept.update(_read_params(step_dir, {name: jax.ShapeDtypeStruct(x.shape, x.dtype)}, digests))
        return kept[name]

    def lazy(path: tuple[Any, ...], x: Any) -> LazyTensor | LazyStack:
        name, dtype = ".".join(key.key for key in path), np.dtype(x.dtype)
        if not name.startswith("layers."):
            return LazyTensor(tuple(x.shape), dtype, lambda: read(name, x))
        layer = lambda i: LazyTensor(tuple(x.shape[1:]), dtype, lambda: read(name, x)[i])
        return LazyStack(tuple(map(layer, range(x.shape[0]))))

    return jax.tree_util.tree_map_with_path(lazy, stored)
