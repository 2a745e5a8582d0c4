"""What is saved comes back bit for bit, on any mesh; what does not fit is named."""

import dataclasses
import functools
import json
import os
import random
import re
import shutil
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding

from mlra_jax import checkpoints
from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.checkpoints import (
    CheckpointError,
    Checkpoints,
    config_differences,
    find_step,
    lazy_params,
    load_config,
    load_params,
    save_params,
)
from mlra_jax.cli import convert
from mlra_jax.config import CheckpointConfig, ExecutionConfig, TrainConfig, to_dict
from mlra_jax.data.pipeline import TrainBatches
from mlra_jax.lazy_arrays import LazyStack, LazyTensor
from mlra_jax.sharding import TRAIN_RULES
from mlra_jax.storage import StorageError
from mlra_jax.training.step import abstract_state, init_state, make_eval_step, make_train_step


def same(a, b):
    return all(map(np.array_equal, jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b))))


def batches(config, mesh, accumulation, start):
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, TRAIN_RULES.spec(None, "batch", "length"))
    return TrainBatches(config.data, config.model.vocab_size, config.seed).device_batches(
        sharding, accumulation, start
    )


@pytest.fixture(scope="module")
def trained(base_config, tmp_path_factory, mesh_of):
    """A run on a 2 x 4 mesh, saved after updates 1 to 5 while training goes on: its configuration, the host copies of
    the states by step, and the batch and the loss of step 5."""
    folder = tmp_path_factory.mktemp("trained")
    config = dataclasses.replace(
        base_config, out=str(folder), checkpoint=CheckpointConfig(every=1, keep=2, keep_every=2)
    )
    mesh, states = mesh_of(2, 2, 2, 1), {}
    checkpoints = Checkpoints(config.run_dir, config.checkpoint)
    with jax.set_mesh(mesh), batches(config, mesh, config.data.accumulation(4), 0) as data:
        state, step = init_state(config), make_train_step(config)
        for n in range(1, 6):
            state, _ = step(state, next(data))
            states[n] = jax.tree.map(np.array, state)
            checkpoints.save(n, state, config)
        batch = next(data)
        _, metrics = step(state, batch)
    checkpoints.close()
    return config, states, jax.device_get(batch), float(metrics["loss"])


@pytest.mark.smoke
@pytest.mark.parametrize("sizes", [(1, 4, 2, 1), (1, 1, 2, 2), (8, 1, 1, 1), (1, 1, 1, 1)], ids=str)
def test_a_checkpoint_is_restored_on_another_mesh_with_the_same_next_batch_and_loss(sizes, trained, mesh_of):
    config, states, expected_batch, expected_loss = trained
    mesh, accumulation = mesh_of(*sizes), config.data.accumulation(sizes[0] * sizes[1])
    checkpoints = Checkpoints(config.run_dir, config.checkpoint)
    wanted = abstract_state(config, mesh)
    found = checkpoints.restore(config, wanted)
    assert (found.step, found.changes, found.damaged) == (5, [], [])
    state = found.state
    assert same(state, states[5])
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert x.sharding == y.sharding
    start = int(state.step)
    with jax.set_mesh(mesh), batches(config, mesh, accumulation, start) as data:
        batch = next(data)
        for name, tokens in expected_batch.items():
            shape = (-1, config.data.seq_len)
            assert np.array_equal(np.asarray(batch[name]).reshape(shape), tokens.reshape(shape))
        nats, count = make_eval_step(config)(state.params, batch)
    assert float(nats / count) == pytest.approx(expected_loss, rel=1e-5)
    checkpoints.close()


def test_a_save_holds_the_state_of_its_step_though_the_next_step_reuses_its_memory(trained):
    config, states, _, _ = trained
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), states[2].params)
    assert same(load_params(config.run_dir, abstract, step=2), states[2].params)
    assert same(load_params(config.run_dir, abstract, step=4), states[4].params)


def test_the_latest_and_the_marked_checkpoints_are_kept_and_no_others(trained):
    config, _, _, _ = trained
    assert sorted(p.name for p in find_step(config.run_dir).parent.iterdir()) == ["2", "4", "5"]


def test_configuration_comes_back_but_for_how_the_run_was_computed(trained):
    config, _, _, _ = trained
    loaded = load_config(config.run_dir)
    differing = {d.split(":")[0] for d in config_differences(config, loaded)}
    assert differing == {"execution.remat", "data.micro_batch"}
    assert (loaded.execution.remat, loaded.data.micro_batch) == ("auto", 0)


@pytest.mark.parametrize("inner", ["", "checkpoints", "checkpoints/5"])
def test_a_checkpoint_is_found_from_the_run_the_folder_of_checkpoints_or_the_step_itself(inner, trained):
    config, _, _, _ = trained
    assert find_step(f"{config.run_dir}/{inner}").name == "5"
    assert find_step(f"{config.run_dir}/{inner}", 2).name == "2"
    with pytest.raises(CheckpointError, match=r"No checkpoint of step 7 .*\[2, 4, 5\]"):
        find_step(f"{config.run_dir}/{inner}", 7)


def test_parameters_load_for_decoding_onto_any_mesh_in_any_type_without_the_optimizer(
    trained, mesh_of, tmp_path
):
    config, states, _, _ = trained
    shutil.copytree(config.run_dir, tmp_path / "copy")
    for folder in (tmp_path / "copy" / "checkpoints").glob("*/optimizer"):
        shutil.rmtree(folder)
    mesh = mesh_of(1, 1, 4, 2)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding),
        abstract_state(config, mesh).params,
    )
    params = load_params(tmp_path / "copy", abstract)
    assert same(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), states[5].params))
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True):
        assert x.sharding == y.sharding


def test_every_missing_extra_and_misshapen_parameter_is_listed_with_both_shapes(trained, mesh_of):
    config, _, _, _ = trained
    other = dataclasses.replace(
        config.model, attention=GroupedAttentionConfig(n_kv_heads=2, d_head=8), d_ff=48
    )
    wanted = abstract_state(dataclasses.replace(config, model=other), mesh_of(1, 1, 1, 1)).params
    with pytest.raises(CheckpointError) as error:
        load_params(config.run_dir, wanted)
    message = str(error.value)
    assert "layers.attention.w_q: not in the checkpoint, (2, 32, 4, 8) in the model" in message
    assert "layers.attention.w_kva: (2, 32, 4, 8) in the checkpoint, not in the model" in message
    assert "layers.mlp.w_up: (2, 32, 64) in the checkpoint, (2, 32, 48) in the model" in message
    assert "final_norm" not in message


def test_another_model_is_refused_by_the_names_of_its_fields_and_harmless_changes_are_reported(trained):
    config, _, _, _ = trained
    checkpoints = Checkpoints(config.run_dir, config.checkpoint)
    attention = dataclasses.replace(config.model.attention, n_branches=2)
    model = dataclasses.replace(config.model, attention=attention, d_ff=48)
    execution = ExecutionConfig(attention_form="absorbed", remat="full")
    with pytest.raises(CheckpointError) as error:
        checkpoints.check_config(5, dataclasses.replace(config, model=model, execution=execution))
    assert "model.attention.n_branches: 4 -> 2" in str(error.value)
    assert "model.d_ff: 64 -> 48" in str(error.value)
    assert "remat" not in str(error.value)
    assert "form" not in str(error.value)

    execution = dataclasses.replace(config.execution, remat="full", gather="step")
    harmless = dataclasses.replace(config, execution=execution, steps=99)
    assert checkpoints.check_config(5, harmless) == [
        "execution.remat: none -> full",
        f"execution.gather: {config.execution.gather} -> step",
        "steps: 8 -> 99",
    ]
    checkpoints.close()


def test_another_kind_of_attention_differs_in_its_fields(base_config):
    model = dataclasses.replace(base_config.model, attention=GroupedAttentionConfig(n_kv_heads=2))
    differences = config_differences(base_config, dataclasses.replace(base_config, model=model))
    assert "model.attention.n_branches: 4 -> (none)" in differences
    assert "model.attention.n_kv_heads: (none) -> 2" in differences


def test_what_a_killed_save_left_is_no_checkpoint_and_does_not_hinder_the_next_save(trained, tmp_path):
    config, states, _, _ = trained
    folder = tmp_path / "checkpoints"
    shutil.copytree(find_step(config.run_dir), folder / "5")
    shutil.copytree(folder / "5", folder / "6.orbax-checkpoint-tmp")
    (folder / "6.orbax-checkpoint-tmp" / "commit_success.txt").unlink()
    assert find_step(tmp_path).name == "5"
    checkpoints = Checkpoints(tmp_path, config.checkpoint)
    assert checkpoints.latest_step() == 5
    checkpoints.save(6, states[3], config)
    checkpoints.close()
    assert sorted(p.name for p in folder.iterdir()) == ["5", "6"]
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), states[3].params)
    assert same(load_params(tmp_path, abstract), states[3].params)


def test_a_folder_without_checkpoints_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="No complete checkpoint"):
        load_config(tmp_path)


@pytest.mark.parametrize("use", [find_step, load_config, lambda path: Checkpoints(path, CheckpointConfig())])
def test_a_bucket_without_its_library_names_the_extra_and_unusable_storage_what_there_is(use, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # importing it fails
    with pytest.raises(StorageError, match=r"gs://bucket/run needs .* pip install 'mlra_jax\[gcs\]'"):
        use("gs://bucket/run")
    with pytest.raises(StorageError, match=r"memory://run: must be a local folder, or .* gs:// or s3://"):
        use("memory://run")


# Damage ---------------------------------------------------------------------------------------------------------------


def files_of(step_dir):
    return sorted(f for f in step_dir.rglob("*") if f.is_file())


def truncate(step_dir):
    """Cuts every file of arrays (some hold just what was superseded while saving, and are never read)."""
    for file in Path(step_dir / "params").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)


def flip(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 0x10
    file.write_bytes(data)


def flip_in_the_arrays(step_dir):
    for file in step_dir.rglob("d/*"):
        flip(file, file.stat().st_size // 2)


def rename_in_configuration(step_dir):
    (file,) = (f for f in (step_dir / "config").iterdir() if "metadata" in f.name)
    file.write_text(file.read_text().replace('"tiny"', '"tony"'))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads that Orbax gave up
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, ""),
        (flip_in_the_arrays, ""),
        (rename_in_configuration, "config is not what was saved"),
        (lambda step_dir: shutil.rmtree(step_dir / "optimizer"), "optimizer"),
    ],
)
def test_a_damaged_newest_checkpoint_is_moved_aside_and_the_one_before_is_restored(
    damage, message, trained, mesh_of, tmp_path
):
    config, states, _, _ = trained
    folder = tmp_path / "checkpoints"
    shutil.copytree(find_step(config.run_dir).parent, folder)
    damage(folder / "5")
    before = {f.relative_to(folder / "5"): f.read_bytes() for f in files_of(folder / "5")}
    checkpoints = Checkpoints(tmp_path, config.checkpoint)
    found = checkpoints.restore(config, abstract_state(config, mesh_of(2, 2, 2, 1)))
    assert found.step == 4
    assert same(found.state, states[4])
    (sentence,) = found.damaged
    assert re.fullmatch(
        rf"Checkpoint 5 is damaged \(.*{message}.*\); it is now {folder}/5\.damaged\.", sentence
    )
    kept = folder / "5.damaged"
    assert {f.relative_to(kept): f.read_bytes() for f in files_of(kept)} == before
    checkpoints.save(5, found.state, config)
    checkpoints.close()
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4", "5", "5.damaged"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads that Orbax gave up
def test_no_flipped_bit_anywhere_in_a_checkpoint_changes_what_is_restored(trained, mesh_of, tmp_path):
    config, states, _, _ = trained
    wanted, source = abstract_state(config, mesh_of(1, 1, 1, 1)), Path(find_step(config.run_dir))
    rng, found_damaged = random.Random(0), 0
    names = [f.relative_to(source) for f in files_of(source) if f.stat().st_size]
    for n in range(20):
        run = tmp_path / str(n)
        shutil.copytree(source, run / "checkpoints" / "5")
        file = run / "checkpoints" / "5" / rng.choice(names)
        flip(file, rng.randrange(file.stat().st_size))
        checkpoints = Checkpoints(run, config.checkpoint)
        try:
            restored = checkpoints.restore(config, wanted)
        except CheckpointError:
            found_damaged += 1
        else:
            assert same(restored.state, states[5]), file
        checkpoints.close()
    assert found_damaged > 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads that Orbax gave up
def test_if_no_checkpoint_is_whole_each_is_named_and_none_is_touched(trained, mesh_of, tmp_path):
    config, _, _, _ = trained
    folder = tmp_path / "checkpoints"
    shutil.copytree(find_step(config.run_dir).parent, folder)
    for step in folder.iterdir():
        truncate(step)
    checkpoints = Checkpoints(tmp_path, config.checkpoint)
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(config, abstract_state(config, mesh_of(1, 1, 1, 1)))
    checkpoints.close()
    message = str(error.value)
    assert "is whole; move the folder away to start anew" in message
    assert [line.split(":")[0] for line in message.splitlines()[1:]] == [
        "  - step 5",
        "  - step 4",
        "  - step 2",
    ]
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4", "5"]


def change_a_weight(step_dir):
    """What is stored is whole, but one bit of one weight is another one."""
    folder = step_dir / "params"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        params = checkpointer.restore(folder)
        table = np.array(params["embedding"]["table"])
        table.view(np.uint32)[3, 5] ^= 1
        params["embedding"]["table"] = table
        checkpointer.save(folder, jax.tree.map(np.asarray, params), force=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads that Orbax gave up
@pytest.mark.parametrize("damage", [truncate, flip_in_the_arrays, change_a_weight, rename_in_configuration])
@pytest.mark.parametrize("use", ["float32", "bfloat16", "to-official", "split-latents"])
def test_whoever_reads_a_damaged_checkpoint_says_so_in_one_sentence(use, damage, trained, mesh_of, tmp_path):
    config, _, _, _ = trained
    shutil.copytree(config.run_dir, tmp_path / "copy")
    damage(tmp_path / "copy/checkpoints/5")
    out = tmp_path / "out"
    abstract = abstract_state(config, mesh_of(1, 1, 4, 2)).params
    options = ["--latent-heads", "8", "--branches", "8"] if use == "split-latents" else []
    if use in ("float32", "bfloat16"):
        wanted = lambda x: jax.ShapeDtypeStruct(x.shape, use, sharding=x.sharding)
        read = functools.partial(load_params, tmp_path / "copy", jax.tree.map(wanted, abstract))
    else:
        read = functools.partial(convert.main, [use, str(tmp_path / "copy"), "--out", str(out), *options])
    with pytest.raises((CheckpointError, SystemExit)) as error:
        read()
    if use == "to-official":
        assert not out.exists()
    message = str(error.value.__cause__ if isinstance(error.value, SystemExit) else error.value)
    assert re.search(r"checkpoints/5 is damaged \(.*\); name another step\.$", message)
    assert "\n" not in message


def test_a_checkpoint_of_a_version_without_digests_and_guard_is_restored(trained, mesh_of, tmp_path):
    config, states, _, _ = trained
    shutil.copytree(config.run_dir, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/checkpoints/5/digests")
    shutil.rmtree(tmp_path / "copy/checkpoints/5/guard")
    checkpoints = Checkpoints(tmp_path / "copy", config.checkpoint)
    assert same(checkpoints.restore(config, abstract_state(config, mesh_of(1, 1, 1, 1))).state, states[5])
    checkpoints.close()


def test_saving_a_step_twice_is_harmless(trained, mesh_of):
    config, states, _, _ = trained
    checkpoints = Checkpoints(config.run_dir, config.checkpoint)
    checkpoints.save(5, jax.tree.map(jnp.zeros_like, states[5]), config)
    checkpoints.close()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), states[5].params)
    assert same(load_params(config.run_dir, abstract), states[5].params)


def test_lazy_parameters_are_written_layer_by_layer_and_read_stack_by_stack(tmp_path, monkeypatch):
    alive = []

    def layer(i):
        array = np.full((64, 128), i, np.float32)
        alive.append(i)
        most.append(len(alive))
        weakref.finalize(array, alive.remove, i)
        return array

    most, written = [], []
    lazy = lambda i: LazyTensor((64, 128), np.dtype(np.float32), lambda: layer(i))
    stack, table = LazyStack(tuple(map(lazy, range(40)))), lazy(40)
    params = {"layers": {"w": stack, "v": np.ones((40, 3), np.float32)}, "table": table}
    monkeypatch.setattr(checkpoints, "_CHUNK_BYTES", 2**16)
    save_params(tmp_path, params, TrainConfig(), written.append)
    assert max(most) <= 2  # the one being written, and the next
    assert (sum(written), len(written)) == (41 * 64 * 128 * 4, 41)
    assert json.loads((tmp_path / "config.json").read_text()) == to_dict(TrainConfig())

    assert (find_step(tmp_path) / "digests").exists()  # with which all that is read below is compared
    read = lazy_params(tmp_path)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(read) == shapes(params)
    loads = []
    restore = ocp.PyTreeCheckpointHandler.restore
    monkeypatch.setattr(
        ocp.PyTreeCheckpointHandler, "restore", lambda *a, **k: (loads.append(1), restore(*a, **k))[1]
    )
    for i in range(40):  # two stacks in turn
        np.testing.assert_array_equal(np.asarray(read["layers"]["w"][i]), np.full((64, 128), i))
        np.testing.assert_array_equal(np.asarray(read["layers"]["v"][i]), np.ones(3))
    assert len(loads) == 2
    np.testing.assert_array_equal(np.asarray(read["table"]), np.full((64, 128), 40))
    # And as any other checkpoint is read.
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), params)
    assert same(load_params(tmp_path, abstract), jax.tree.map(np.asarray, params))
