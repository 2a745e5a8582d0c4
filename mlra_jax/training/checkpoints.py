"""Checkpoints of a run: saved asynchronously, restored onto any mesh, read by decoding without the optimizer.

    RUN/checkpoints/STEP/params      nested dictionary of arrays, as the model names them
                         optimizer   the optax state and the step
                         config      the resolved TrainConfig, JSON

STEP is the number of updates made. A step's folder appears under its name only when it is complete (in a bucket: only
then holds its commit file), so whatever is found is whole. Arrays are stored in pieces with their shapes: a checkpoint
knows no mesh, and each process reads just what its own devices hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from mlra_jax.config import CheckpointConfig, TrainConfig, from_dict, to_dict
from mlra_jax.lazy import LazyStack, LazyTensor
from mlra_jax.storage import RUN_PROTOCOLS, check_storage, is_remote
from mlra_jax.training.step import TrainState

FOLDER = "checkpoints"

# These change neither the parameters nor the function that they define: how it is computed, and memory for time.
_FREE_MODEL_FIELDS = {"model.remat", "model.attention.form"}


class CheckpointError(ValueError):
    """A checkpoint is absent, or does not fit what it is wanted for."""


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


def find_step(checkpoint: epath.PathLike, step: int | None = None) -> epath.Path:
    """Folder of one complete step.

    Args:
      checkpoint: a run's folder, its `checkpoints` folder, or one step's folder; local or a bucket URL.
      step: which one; None: the latest (or the one that `checkpoint` is).

    Raises:
      CheckpointError: there is none, with the steps that there are.
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
        raise CheckpointError(f"No complete checkpoint at {checkpoint}; expected step folders in {root}.")
    wanted = max(found) if step is None else step
    if wanted not in found:
        raise CheckpointError(f"No checkpoint of step {step} at {checkpoint}; it has {sorted(found)}.")
    return epath.Path(found[wanted])


def load_config(checkpoint: epath.PathLike, step: int | None = None) -> TrainConfig:
    """The resolved configuration of the run that wrote a checkpoint.

    Args:
      checkpoint: see `find_step`.
      step: see `find_step`.

    Raises:
      CheckpointError: there is no such checkpoint.
      ConfigError: the stored configuration has fields that this version does not know.
    """
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return from_dict(checkpointer.restore(find_step(checkpoint, step) / "config"))


def _check_tree(step_dir: epath.Path, item: str, abstract: Any) -> None:
    """Compares the stored shapes with the wanted ones, before anything is read.

    Raises:
      CheckpointError: every missing, extra or misshapen array, with both shapes.
    """
    handler = ocp.PyTreeCheckpointHandler()
    stored = {k: tuple(v.shape) for k, v in _flat(handler.metadata(step_dir / item).tree).items()}
    wanted = {k: tuple(v.shape) for k, v in _flat(abstract).items()}
    faults = [
        f"{k}: not in the checkpoint, the model has {wanted[k]}" for k in sorted(wanted.keys() - stored)
    ]
    faults += [
        f"{k}: {stored[k]} in the checkpoint, not in the model" for k in sorted(stored.keys() - wanted)
    ]
    faults += [
        f"{k}: {stored[k]} in the checkpoint, {wanted[k]} in the model"
        for k in sorted(wanted.keys() & stored)
        if wanted[k] != stored[k]
    ]
    if faults:
        raise CheckpointError(
            f"The {item} in {step_dir} do not fit the model ({len(faults)} of {len(stored | wanted)} arrays):\n  - "
            + "\n  - ".join(faults)
        )


def load_params(checkpoint: epath.PathLike, abstract_params: Any, step: int | None = None) -> Any:
    """The parameters of a checkpoint, read straight into the wanted layout; the optimizer's state is never read.

    Args:
      checkpoint: see `find_step`.
      abstract_params: nested dictionary of `jax.ShapeDtypeStruct` with concrete shardings (any mesh); each array is
        converted to the `dtype` given here.
      step: see `find_step`.

    Raises:
      CheckpointError: there is no such checkpoint, or its parameters have other names or shapes (all are listed).
    """
    step_dir = find_step(checkpoint, step)
    _check_tree(step_dir, "params", abstract_params)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(step_dir / "params", abstract_params)


def config_differences(stored: TrainConfig, current: TrainConfig) -> list[str]:
    """One entry "field: stored value -> current value" for every field that differs."""
    a, b = _flat(to_dict(stored)), _flat(to_dict(current))
    absent = "(none)"
    return [
        f"{k}: {a.get(k, absent)} -> {b.get(k, absent)}"
        for k in {**a, **b}
        if a.get(k, absent) != b.get(k, absent)
    ]


class Checkpoints:
    """The checkpoints of one training run.

    Every process of the run creates one and calls the same methods in the same order.
    """

    def __init__(self, run_dir: epath.PathLike, config: CheckpointConfig):
        # Step 0 is written by `save_params` alone: what was converted is not the run's to delete.
        kept: list[Any] = [policies.LatestN(config.keep), policies.CustomSteps([0])]
        if config.keep_every:
            kept.append(policies.EveryNSteps(config.keep_every))
        self.directory = _absolute(run_dir) / FOLDER
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
            ),
        )

    def latest_step(self) -> int | None:
        """Updates made by the latest complete checkpoint (or the one being written); None when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, config: TrainConfig) -> None:
        """Copies the state to the host and writes it in the background; returns when the copy is made.

        Does nothing if `step` is saved already. A failure in the background is raised by the next call.

        Args:
          step: updates made.
          state: may be donated as soon as this returns.
          config: stored as JSON.
        """
        if step == self.latest_step():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave({"state": state.opt_state, "step": state.step}),
                config=ocp.args.JsonSave(to_dict(config)),
            ),
            force=True,
        )

    def check_config(self, config: TrainConfig) -> list[str]:
        """Compares the latest checkpoint's configuration with `config`, which is to continue it.

        Returns:
          What differs without harm: "field: stored -> current" each.

        Raises:
          CheckpointError: the model is another one; every field that differs is named.
        """
        differences = config_differences(load_config(self.directory, self.latest_step()), config)
        refused = [
            d for d in differences if d.startswith("model.") and d.split(":")[0] not in _FREE_MODEL_FIELDS
        ]
        if refused:
            raise CheckpointError(
                f"{self.directory} holds a run of another model; give this one another --name or --out, or take back:"
                "\n  - " + "\n  - ".join(refused)
            )
        return differences

    def holds_parameters_alone(self) -> bool:
        """Whether the latest checkpoint is one to start from: step 0, as `save_params` writes it."""
        return self.latest_step() == 0 and not (find_step(self.directory, 0) / "optimizer").exists()

    def restore(self, abstract_state: TrainState) -> TrainState:
        """The state of the latest checkpoint, laid out as `abstract_state` says; the mesh that saved it is irrelevant.

        Args:
          abstract_state: `TrainState` of `jax.ShapeDtypeStruct` with concrete shardings.

        Raises:
          CheckpointError: names or shapes of parameters differ (all are listed), or there is no optimizer state.
        """
        step = self.latest_step()
        step_dir = find_step(self.directory, step)
        _check_tree(step_dir, "params", abstract_state.params)
        if not (step_dir / "optimizer").exists():
            raise CheckpointError(f"{step_dir} holds parameters alone; training cannot continue from it.")
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract_state.params),
                optimizer=ocp.args.StandardRestore(
                    {"state": abstract_state.opt_state, "step": abstract_state.step}
                ),
            ),
        )
        optimizer = restored["optimizer"]
        return TrainState(restored["params"], optimizer["state"], optimizer["step"])

    def wait(self) -> None:
        """Blocks until what `save` started is complete; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the threads."""
        self._manager.close()


_CHUNK_BYTES = 64 * 2**20
"""Lazy arrays larger than this are written in chunks: a stack layer by layer."""


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes `LazyTensor`s and `LazyStack`s into the format of arrays, one after the other and layer by layer.

    So no more than one layer of a large stack is in memory. (Should Orbax rename the functions overridden here, arrays
    would be written whole.)
    """

    def __init__(self, progress: Callable[[int], Any]):
        super().__init__(deepcopy_host_arrays=False)
        self._progress = progress

    async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
        for value, info, arg in zip(values, infos, args, strict=True):
            await super()._background_serialize([value], [info], [arg])

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: Any) -> None:
        store = await tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=ts_context)
        by_layer = isinstance(value, LazyStack) and value.nbytes > _CHUNK_BYTES
        places = [(store[i], layer) for i, layer in enumerate(value.layers)] if by_layer else [(store, value)]
        for place, tensor in places:
            await place.write(np.asarray(tensor))
            self._progress(tensor.nbytes)


def save_params(
    run_dir: epath.PathLike, params: Any, config: TrainConfig, progress: Callable[[int], Any] = lambda n: None
) -> None:
    """Writes step 0 of a run with parameters and configuration alone; decoding reads it like any other.

    The step's folder appears when it is complete.

    Args:
      run_dir: must hold no checkpoint yet.
      params: nested dictionary, in the training layout, of JAX or NumPy arrays; or of `LazyTensor`s and `LazyStack`s,
        which are made one at a time, large stacks layer by layer.
      config: stored as JSON, in the checkpoint and as `config.json` of the run.
      progress: called with the number of bytes of each lazy array, or layer of one, that is written.
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

    run = _absolute(run_dir)
    with ocp.CheckpointManager(
        run / FOLDER,
        options=ocp.CheckpointManagerOptions(cleanup_tmp_directories=True),
        item_handlers={
            "params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
            "config": ocp.JsonCheckpointHandler(),
        },
    ) as manager:
        manager.save(
            0,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(params, save_args=jax.tree.map(chunks, params)),
                config=ocp.args.JsonSave(to_dict(config)),
            ),
        )
    write_config(run, config)


def write_config(run_dir: epath.PathLike, config: TrainConfig) -> None:
    """Writes `config.json` of a run."""
    (_absolute(run_dir) / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")


def lazy_params(checkpoint: epath.PathLike, step: int | None = None) -> dict[str, Any]:
    """The parameters of a checkpoint, as they are stored, each read when it is asked for.

    Returns:
      Nested dictionary of `LazyTensor`s, and of `LazyStack`s under `layers`. The two parameters read last are kept, so
      that going through the layers of one or two of them in turn reads each once.

    Raises:
      CheckpointError: there is no such checkpoint.
    """
    folder = find_step(checkpoint, step) / "params"
    handler = ocp.PyTreeCheckpointHandler()
    stored = handler.metadata(folder).tree

    kept: dict[tuple[str, ...], np.ndarray] = {}

    def read(path: tuple[str, ...]) -> np.ndarray:
        if path in kept:
            return kept[path]
        for old in list(kept)[:-1]:  # before there is another one
            del kept[old]
        item: Any = np.zeros(())  # stands for the array
        for key in reversed(path):
            item = {key: item}
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
        kept[path] = jax.tree.leaves(handler.restore(folder, args=args))[0]
        return kept[path]

    def lazy(path: tuple[Any, ...], x: Any) -> LazyTensor | LazyStack:
        keys, dtype = tuple(key.key for key in path), np.dtype(x.dtype)
        if keys[0] != "layers":
            return LazyTensor(tuple(x.shape), dtype, lambda: read(keys))
        layer = lambda i: LazyTensor(tuple(x.shape[1:]), dtype, lambda: read(keys)[i])
        return LazyStack(tuple(map(layer, range(x.shape[0]))))

    return jax.tree_util.tree_map_with_path(lazy, stored)


def state_bytes(abstract: Any) -> int:
    """Bytes of all arrays of a tree, over all devices, each counted once."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(abstract))
