"""The input pipeline: which sequence is where, whoever reads it and whenever."""

import itertools
import os
import pathlib
import socket
import subprocess
import sys
import threading

import fsspec
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from mlra_jax.config import DataConfig
from mlra_jax.data.corpus import documents
from mlra_jax.data.pipeline import EvalBatches, Placement, TrainBatches, Windows
from mlra_jax.data.shards import ArrayShards, DataError

T = 4
VOCAB = 60_000


def make_shards(folder, lengths, split="train"):
    """One shard per length, filled with 0, 1, 2, ... on through all of them, so that a token tells its place."""
    first = 0
    for i, length in enumerate(lengths):
        header = np.array([20240520, 1, length] + [0] * 253, "<i4")
        tokens = np.arange(first, first + length).astype("<u2")
        (folder / f"part_{split}_{i:06d}.bin").write_bytes(header.tobytes() + tokens.tobytes())
        first += length
    return str(folder)


def windows_of(lengths):
    """All windows, by the definition."""
    out, base = [], 0
    for n in lengths:
        out += [list(range(base + o, base + o + T + 1)) for o in range(0, n, T) if o + T + 1 <= n]
        base += n
    return out


def official_steps(lengths, global_batch, ranks, n_steps):
    """A literal run of the official loader: each rank walks its own files with an offset that goes back to the start.

    Yields the sequences of every step, rank by rank.
    """
    starts = np.cumsum([0, *lengths])
    files = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
    owned = [[f for i, f in enumerate(files) if i % ranks == r] for r in range(ranks)]
    cursor, offset = [0] * ranks, [0] * ranks
    for _ in range(n_steps):
        step = []
        for r in range(ranks):
            for _ in range(global_batch // ranks):
                t = owned[r][cursor[r]]
                o = offset[r]
                step.append(t[o : o + T + 1].tolist())
                offset[r] = o + T
                if offset[r] + T >= len(t):
                    offset[r] = 0
                    cursor[r] = (cursor[r] + 1) % len(owned[r])
        yield step


def config(path, **fields):
    return DataConfig(
        **{"path": path, "seq_len": T, "global_batch": 4, "read_threads": 2, "prefetch": 3} | fields
    )


def sharding(data=1, context=1, n_devices=None):
    devices = np.array(jax.devices()[: n_devices or data * context]).reshape(data, context)
    mesh = jax.sharding.Mesh(devices, ("data", "context"))
    return NamedSharding(mesh, PartitionSpec(None, "data", "context"))


LENGTHS = [23, 4, 5, 0, 42, 9]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, LENGTHS, "val")
    return make_shards(folder, LENGTHS)


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda n: max(n) > T))
def test_windows_are_all_stretches_of_t_plus_1_tokens_within_a_shard(lengths):
    base = np.cumsum([0, *lengths])
    arrays = [np.arange(a, b) for a, b in itertools.pairwise(base)]
    windows = Windows(ArrayShards([str(i) for i in range(len(arrays))], arrays), T, VOCAB)
    assert windows.read(range(len(windows))).tolist() == windows_of(lengths)


# Orders ---------------------------------------------------------------------------------------------------------------


def test_sequential_order_is_file_order_and_wraps(shards):
    batches = TrainBatches(config(shards, order="sequential"), VOCAB, seed=0)
    rows = np.concatenate([batches.rows(s) for s in range(12)]).tolist()
    every = windows_of(LENGTHS)
    assert batches.n_windows == len(every)
    assert rows == list(itertools.islice(itertools.cycle(every), len(rows)))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(-(2**63), 2**63), global_batch=st.integers(1, 9))
def test_shuffled_order_shows_every_window_once_an_epoch(shards, seed, global_batch):
    batches = TrainBatches(config(shards, global_batch=global_batch), VOCAB, seed)
    n = batches.n_windows
    numbers = [batches.window_number(*divmod(k, global_batch)) for k in range(3 * n)]
    for epoch in range(3):
        assert sorted(numbers[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_shuffled_order_differs_between_epochs_and_seeds():
    """Also seed 6's first epoch is not seed 5's second, as it would be if the two were added."""

    def epoch(seed, number):
        batches = TrainBatches(DataConfig(seq_len=1024, global_batch=1), 257, seed)
        n = batches.n_windows
        return tuple(batches.window_number(number * n + k, 0) for k in range(n))

    assert len({epoch(5, 0), epoch(5, 1), epoch(6, 0), epoch(6, 1), tuple(range(len(epoch(5, 0))))}) == 5


def test_shuffled_order_stays_what_it_was():
    """Checkpoints of earlier versions resume with their order: these numbers must not change."""
    batches = TrainBatches(DataConfig(seq_len=128, global_batch=4), 257, seed=5000)
    assert batches.n_windows == 7220
    got = [[batches.window_number(s, i) for i in range(4)] for s in (0, 1, 1805)]
    assert got == [[6247, 455, 6698, 1843], [2000, 7188, 5813, 3148], [2778, 3359, 2548, 3720]]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(T + 1, 30), min_size=3, max_size=9),
    ranks=st.integers(1, 3),
    per_rank=st.integers(1, 3),
)
def test_official_order_is_that_of_the_official_loader(tmp_path_factory, lengths, ranks, per_rank):
    path = make_shards(tmp_path_factory.mktemp("shards"), lengths)
    c = config(path, order="official", official_ranks=ranks, global_batch=ranks * per_rank)
    batches = TrainBatches(c, VOCAB, seed=0)
    for s, step in enumerate(official_steps(lengths, ranks * per_rank, ranks, 20)):
        assert batches.rows(s).tolist() == step


def test_official_order_with_a_rank_without_windows_is_refused(shards):
    with pytest.raises(DataError, match=r"6 training shards .*leaves rank\(s\) 3 without a window"):
        TrainBatches(config(shards, order="official", official_ranks=4), VOCAB, seed=0)


# On the devices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "context", "accumulation"), [(1, 1, 1), (2, 1, 4), (4, 2, 2), (8, 1, 1), (1, 4, 2)]
)
def test_sequence_i_is_at_its_place_on_every_mesh(shards, data, context, accumulation):
    batches = TrainBatches(config(shards, global_batch=8), VOCAB, seed=1)
    with batches.device_batches(sharding(data, context), accumulation, start_step=7) as stream:
        for step in (7, 8):
            batch = next(stream)
            rows = batches.rows(step).reshape(accumulation, 8 // accumulation, T + 1)
            assert batch["inputs"].sharding == batch["targets"].sharding == sharding(data, context)
            assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
            np.testing.assert_array_equal(batch["inputs"], rows[..., :-1])
            np.testing.assert_array_equal(batch["targets"], rows[..., 1:])


def test_starting_at_any_step_continues_the_same_batches(shards):
    def batches(start, n):
        source = TrainBatches(config(shards), VOCAB, seed=3)
        with source.device_batches(sharding(2), 1, start) as stream:
            return [np.asarray(next(stream)["inputs"]) for _ in range(n)]

    whole = batches(0, 12)
    for start in (1, 5, 11):
        np.testing.assert_array_equal(batches(start, 12 - start), whole[start:])


class OneProcess:
    """A sharding as one process of several sees it: only some of the devices are its own."""

    def __init__(self, whole, devices):
        self.whole, self.devices = whole, devices

    def addressable_devices_indices_map(self, shape):
        return {d: i for d, i in self.whole.devices_indices_map(shape).items() if d in self.devices}


@pytest.mark.parametrize(("data", "context"), [(8, 1), (4, 2), (1, 8)])
@pytest.mark.parametrize("n_processes", [2, 4, 8])
def test_each_process_reads_just_what_its_devices_hold(shards, data, context, n_processes):
    whole, shape = sharding(data, context), (2, 8, 8)
    devices = whole.mesh.devices.ravel().reshape(n_processes, -1)
    parts = [Placement(OneProcess(whole, own), shape).sequences.tolist() for own in devices]
    shared = min(n_processes, data)  # processes beyond the data axis need the same rows as a neighbor
    assert all(len(part) == 16 // shared for part in parts)
    assert set().union(*parts) == set(range(16))
    batches = TrainBatches(config(shards, global_batch=16), VOCAB, seed=1)
    for part in parts:
        np.testing.assert_array_equal(batches.rows(5, part), batches.rows(5)[part])


TWO_PROCESSES = """
import sys, jax, numpy as np
process, port, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from mlra_jax.config import DataConfig
from mlra_jax.data import EvalBatches, TrainBatches
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "context"))
layout = NamedSharding(mesh, P(None, "data", "context"))
config = DataConfig(path=path, seq_len=4, global_batch=16)
with TrainBatches(config, 60000, seed=1).device_batches(layout, 2, start_step=3) as stream:
    train = next(stream)
(held_out,) = EvalBatches.held_out(config, 60000, 5).device_batches(layout, 2, 4)
for batch, name in ((train, "train"), (held_out, "eval")):
    for key, array in batch.items():
        for shard in array.addressable_shards:
            print("SHARD", name, key, shard.device.id % 8, np.asarray(shard.data).tolist())
"""


def test_two_processes_of_four_devices_hold_what_one_of_eight_does(shards):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    root = pathlib.Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(p), port, shards],
            cwd=root,
            env=os.environ | {"XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            text=True,
        )
        for p in range(2)
    ]
    outputs = [p.communicate(timeout=120)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    c = config(shards, global_batch=16)
    layout = sharding(4, 2)
    with TrainBatches(c, VOCAB, seed=1).device_batches(layout, 2, start_step=3) as stream:
        train = next(stream)
    (held_out,) = EvalBatches.held_out(c, VOCAB, 5).device_batches(layout, 2, 4)
    want = [
        str(np.asarray(shard.data).tolist())
        for batch in (train, held_out)
        for key in ("inputs", "targets")
        for shard in batch[key].addressable_shards
    ]
    lines = [
        line.split(" ", 4)[4] for out in outputs for line in out.splitlines() if line.startswith("SHARD")
    ]
    assert sorted(lines) == sorted(want)


def test_closing_ends_the_reading_threads(shards):
    def readers():
        return {t for t in threading.enumerate() if t.name.startswith("grain-prefetch")}

    before = readers()
    stream = TrainBatches(config(shards), VOCAB, seed=3).device_batches(sharding(2), 1)
    next(stream)
    started = readers() - before
    assert len(started) == 2  # read_threads
    stream.close()
    for thread in started:
        thread.join(10)
    assert not any(thread.is_alive() for thread in started)


def test_reading_ahead_is_bounded(shards, monkeypatch):
    batches = TrainBatches(config(shards, prefetch=3), VOCAB, seed=3)
    read = []
    rows = batches.rows
    monkeypatch.setattr(batches, "rows", lambda step, chosen: read.append(step) or rows(step, chosen))
    with batches.device_batches(sharding(2), 1) as stream:
        next(stream)
        next(stream)
    assert sorted(read) == list(range(max(read) + 1))
    assert max(read) < 2 + 3


# Evaluation -----------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 30), accumulation=st.integers(1, 3), micro=st.sampled_from([2, 4, 8]))
def test_evaluation_covers_the_first_windows_exactly_once(shards, n, accumulation, micro):
    every = windows_of(LENGTHS)
    held_out = EvalBatches.held_out(config(shards), VOCAB, n)
    assert held_out.n_sequences == min(n, len(every))
    for _ in range(2):  # always the same
        inputs, targets = [], []
        for batch in held_out.device_batches(sharding(2), accumulation, micro):
            assert batch["inputs"].shape == batch["targets"].shape == (accumulation, micro, T)
            inputs += np.asarray(batch["inputs"]).reshape(-1, T).tolist()
            targets += np.asarray(batch["targets"]).reshape(-1, T).tolist()
        assert len(inputs) - held_out.n_sequences < accumulation * micro
        real = every[: held_out.n_sequences]
        assert [[*i, t[-1]] for i, t in zip(inputs, targets, strict=True)][: len(real)] == real
        assert targets[: len(real)] == [w[1:] for w in real]
        assert all(t == [-1] * T for t in targets[len(real) :])


# Faults ---------------------------------------------------------------------------------------------------------------


def test_too_few_tokens_for_one_window_is_refused(tmp_path):
    path = make_shards(tmp_path, [T, 2])
    with pytest.raises(DataError, match=r"No shard holds the 5 tokens .*longest of 2, .*000000.* has 4"):
        TrainBatches(config(path), VOCAB, seed=0)


def test_an_id_beyond_the_vocabulary_is_named_not_clamped(shards):
    with pytest.raises(DataError, match=r"part_train_000000.bin: token 4 is id 4, but model.vocab_size=4"):
        TrainBatches(config(shards), 4, seed=0)
    batches = TrainBatches(config(shards, order="sequential"), 40, seed=0)  # the first tokens are fine
    with batches.device_batches(sharding(1), 1) as stream:
        next(stream)
        with pytest.raises(
            DataError, match=r"part_train_000004.bin: token 8 is id 40, but model.vocab_size=40"
        ):
            next(stream)


# Sources --------------------------------------------------------------------------------------------------------------


def test_a_bucket_gives_the_same_batches_as_a_folder(shards):
    fs = fsspec.filesystem("memory")
    fs.makedirs("/pipeline")
    for path in pathlib.Path(shards).iterdir():
        fs.pipe_file(f"/pipeline/{path.name}", path.read_bytes())
    local, remote = (TrainBatches(config(p), VOCAB, seed=4) for p in (shards, "memory://pipeline"))
    with remote.device_batches(sharding(4), 1) as stream:
        for step in range(5):
            np.testing.assert_array_equal(next(stream)["targets"][0], local.rows(step)[:, 1:])
    assert EvalBatches.held_out(config("memory://pipeline"), VOCAB, 9).n_sequences == 9
    fs.rm("/pipeline", recursive=True)


@pytest.mark.smoke
def test_embedded_corpus_is_the_plays_with_end_of_text_first():
    c = DataConfig(seq_len=100, global_batch=3, order="sequential")
    rows = TrainBatches(c, 257, seed=0).rows(0)
    text = documents("train")[0].encode()
    assert rows[0].tolist() == [256, *text[:100]]
    assert rows[2].tolist() == list(text[199:300])
    layout = sharding(1)
    (batch,) = EvalBatches.held_out(c, 257, 4).device_batches(layout, 1, 4)
    assert bytes(np.asarray(batch["targets"])[0].ravel().tolist()) == documents("val")[0].encode()[:400]


def test_embedded_corpus_with_a_vocabulary_that_is_too_small_is_refused():
    with pytest.raises(DataError, match=r"tokenizer=byte has 257 ids, but model.vocab_size=256"):
        TrainBatches(DataConfig(), 256, seed=0)
