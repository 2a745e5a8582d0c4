"""Tables of tuned configurations: which entry serves which call, and what becomes of a table that is not one."""

import dataclasses
import json
import logging
import types

import jax
import jax.numpy as jnp
import pytest

from mlra_jax.ops import hopper, tuning
from mlra_jax.ops.decode import mosaic_gpu, triton
from mlra_jax.ops.decode.cases import Case, make_case
from mlra_jax.ops.tuning import Entry, Sizes, find, read_table, table_path, update, write_table

H100 = "NVIDIA H100 80GB HBM3"
SIZES = Sizes(heads=1, rows=64, q_len=1, widths=(128, 64), v_width=128, latent=True, batch=16, capacity=4096)
SPLIT = {"n_splits": 132, "block": 64, "stages": 4, "row_groups": 1}


def sizes(**changes):
    return dataclasses.replace(SIZES, **changes)


def entry(config, back_end="mosaic_gpu", **changes):
    return Entry(back_end, sizes(**changes), config, 20.0, 21.0, {"jax": "0.11.2"}, "2026-11-24", "tune")


def text_with(**fields):
    return json.dumps({"entries": [dataclasses.asdict(entry(SPLIT)) | fields]})


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes entries into the table of the H100 that back ends then read."""
    monkeypatch.setattr(tuning, "DECODE", tmp_path)
    return lambda *entries: write_table(table_path(tmp_path, H100), H100, entries)


def found(wanted, back_end="mosaic_gpu", adapt=lambda config, measured: config):
    return find(back_end, wanted, H100, dict, adapt)


def test_what_is_written_is_read_back(tmp_path):
    path = table_path(tmp_path / "new", H100)
    assert path.name == "nvidia_h100_80gb_hbm3.json"
    assert read_table(path) == ()
    entries = (entry(SPLIT), entry(None, batch=1))
    write_table(path, H100, entries)
    assert set(map(str, read_table(path))) == set(map(str, entries))
    assert json.loads(path.read_text())["device"] == H100
    assert [f.name for f in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_a_new_entry_takes_the_place_of_that_of_its_bucket_alone(table):
    old = entry(SPLIT), entry(SPLIT, rows=32), entry(SPLIT, "triton"), entry(SPLIT, capacity=8192)
    new = entry(None, batch=12, capacity=4000)
    assert update(old, new) == (*old[1:], new)


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 4},
        {"rows": 32},
        {"q_len": 2},
        {"widths": (128,)},
        {"v_width": 64},
        {"latent": False},
        {"batch": 16 * 8},
        {"capacity": 4096 * 4, "batch": 32},
    ],
)
def test_other_sizes_are_not_served(table, change):
    table(entry({"n": 1}))
    assert found(sizes(**change)) is None
    assert found(SIZES, "triton") is None
    assert find("mosaic_gpu", SIZES, "NVIDIA H200", dict, lambda c, _: c) is None


def test_the_same_bucket_serves_before_nearer_numbers_of_another_one(table):
    table(entry({"n": 1}, batch=16), entry({"n": 2}, batch=32))
    assert found(sizes(batch=17)) == {"n": 2}
    assert found(sizes(batch=9)) == {"n": 1}
    assert found(sizes(capacity=2049)) == {"n": 1}


def test_the_nearest_bucket_serves_within_two_doublings_and_the_nearer_batch_of_two(table):
    table(entry({"n": 1}, batch=32), entry({"n": 2}, capacity=8192))
    assert found(SIZES) == {"n": 2}
    assert found(sizes(batch=64)) == {"n": 1}
    assert found(sizes(batch=64, capacity=2048)) == {"n": 1}
    assert found(sizes(batch=1)) is None


def test_a_configuration_that_does_not_fit_is_passed_over_for_the_next(table):
    table(entry({"n": 1}), entry({"n": 2}, batch=32))
    assert found(SIZES, adapt=lambda c, measured: c if measured.batch == 32 else None) == {"n": 2}
    assert found(SIZES, adapt=lambda c, measured: None) is None


def test_where_the_heuristic_was_best_it_serves_though_others_are_near(table):
    table(entry(None), entry({"n": 2}, batch=32))
    assert found(SIZES) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"entries": [{}]}',
        '{"entries": [1]}',
        '{"entries": [{"back_end": "mosaic_gpu", "sizes": 3}]}',
        text_with(config={"n_splits": "many"}),
        text_with(config={"n_splits": 0}),
        text_with(colour="red"),
    ],
)
def test_a_table_that_cannot_be_read_is_warned_of_once_and_is_no_error(tmp_path, monkeypatch, caplog, text):
    monkeypatch.setattr(tuning, "DECODE", tmp_path)
    path = table_path(tmp_path, H100)
    path.write_text(text)
    with caplog.at_level(logging.WARNING, logger="mlra_jax"):
        assert [found(SIZES), found(SIZES)] == [None, None]
    [record] = caplog.records
    assert f"{path} is not a table of tuned configurations" in record.getMessage()
    assert "python -m benchmarks.tune_decode_attention" in record.getMessage()


def test_a_configuration_with_fields_of_another_version_is_warned_of_once_and_passed_over(table, caplog):
    table(entry(SPLIT | {"colour": 3}), entry(SPLIT, batch=32))
    with caplog.at_level(logging.WARNING, logger="mlra_jax"):
        for _ in range(2):
            config = find("mosaic_gpu", SIZES, H100, mosaic_gpu.Config, lambda c, _: c)
            assert config == mosaic_gpu.Config(**SPLIT)
    [record] = caplog.records
    assert "colour" in record.getMessage()


def test_the_hopper_kernel_takes_what_fits_its_pages_memory_and_batch(table):
    shape = mosaic_gpu.Shape(
        batch=16,
        q_len=1,
        heads=1,
        rows_per_query=64,
        widths=(128, 64),
        shared=(False, False),
        v_width=128,
        latent=True,
        page=4096,
        pages=16,
        row_pages=None,
    )
    take = lambda **changes: mosaic_gpu.find_tuned(dataclasses.replace(shape, **changes), H100)
    table(entry(SPLIT))
    assert take() == take(batch=15) == mosaic_gpu.Config(**SPLIT)
    assert take(rows_per_query=32) is None
    table(entry(SPLIT | {"block": 128}))
    assert take(page=128, row_pages=32) == mosaic_gpu.Config(**SPLIT | {"block": 128})
    assert take(page=64, row_pages=64) is None
    table(entry(SPLIT | {"stages": 20}))
    assert take() is None
    table(entry(SPLIT | {"n_splits": 1}))  # a program for each sequence: right for as many as were measured
    assert take() == mosaic_gpu.Config(**SPLIT | {"n_splits": 1})
    assert take(batch=15) is None


def test_the_triton_kernel_takes_what_fits_its_pages_and_keeps_the_number_of_programs(table):
    config = triton.Config(block_rows=16, block_tokens=64, splits=8, warps=4, stages=3)
    table(entry(dataclasses.asdict(config), "triton"))
    take = lambda page=None, **changes: triton.find_tuned(sizes(**changes), page, H100)
    assert take() == take(page=128) == config
    assert take(page=32) is None
    assert take(batch=12).splits == 10
    assert take(batch=32).splits == 4
    assert take(batch=32, heads=2) is None


def test_triton_runs_what_the_table_says_unless_its_caller_names_a_configuration(table, monkeypatch):
    config = triton.Config(block_rows=16, block_tokens=64, splits=5, warps=4, stages=2)
    wanted = {"rows": 16, "batch": 2, "capacity": 128}
    table(entry(dataclasses.asdict(config), "triton", **wanted))
    monkeypatch.setattr(triton, "current_device", lambda: ("gpu", H100))
    grids = []

    def launch(kernel, inputs, outputs, *, grid, **constants):
        grids.append((grid, constants["stages"]))
        return tuple(jnp.zeros(x.shape, x.dtype) for x in outputs)

    monkeypatch.setattr(triton, "_launch", launch)
    kernels = types.SimpleNamespace(split_kernel=None, combine_kernel=None)
    monkeypatch.setattr(triton, "_import_kernels", lambda: kernels)
    q, q_rope, kv_latent, k_rope, kv_len, _ = make_case(Case((100, 7), rows=16, slots=128)).args
    parts = [(q, kv_latent), (q_rope, k_rope[:, None])]
    triton.decode_attention(parts, None, kv_len, scale=1.0)
    assert grids[0] == ((5, 1, 2), 2)
    grids.clear()
    named = dataclasses.replace(config, splits=3, stages=4)
    triton.decode_attention(parts, None, kv_len, scale=1.0, config=named)
    assert grids[0] == ((3, 1, 2), 4)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs JAX 0.11 or later")
def test_mosaic_runs_what_the_table_says_unless_its_caller_names_a_configuration(table, monkeypatch):
    from mlra_jax.ops.decode import mosaic_gpu_kernel

    tuned, named = mosaic_gpu.Config(7, 64, 2), mosaic_gpu.Config(9, 64, 3)
    table(entry(dataclasses.asdict(tuned), rows=16, batch=2, capacity=128))
    monkeypatch.setattr(hopper, "current_device", lambda: ("gpu", H100))
    configs = []

    def attend(parts, v, kv_len, *_, config, **__):
        configs.append(config)
        return parts[0][0], kv_len

    monkeypatch.setattr(mosaic_gpu_kernel, "attend", attend)
    q, q_rope, kv_latent, k_rope, kv_len, _ = make_case(Case((100, 7), rows=16, slots=128)).args
    parts = [(q, kv_latent), (q_rope, k_rope[:, None])]
    for config in (None, named):
        mosaic_gpu.decode_attention(parts, None, kv_len, scale=1.0, config=config)
    assert configs == [tuned, named]


def test_tables_that_come_with_the_package_can_be_read():
    for path in tuning.DECODE.glob("*.json"):
        for e in read_table(path):
            make = {"mosaic_gpu": mosaic_gpu.Config, "triton": triton.Config}[e.back_end]
            assert e.config is None or make(**e.config)
            assert e.us <= e.heuristic_us
