"""Tables of tuned configurations: which entry serves which call, and what becomes of a table that is not one."""

import dataclasses
import json
import logging
import types

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from mlra_jax.ops.decode import mosaic_gpu, mosaic_tpu, triton
from mlra_jax.ops.decode.arg_specs import ArgSpec
from mlra_jax.ops.decode.back_end import TUNED, DecodeKernel
from mlra_jax.ops.tuning import Entry, find, read_table, table_path, update, write_table
from tests.ops.common import H100, make_call, newer_jax

SPEC = ArgSpec((4096,) * 16)
SIZES = SPEC.shape.tuning_key
SMALL_SPEC = ArgSpec((100, 7), rows=16, max_len=128)
SMALL = {"rows": 16, "batch": 2, "capacity": 128}
KERNELS = {"mosaic_gpu": mosaic_gpu.MosaicGPU, "triton": triton.Triton, "mosaic_tpu": mosaic_tpu.MosaicTPU}
SPLIT = {"n_splits": 132, "block": 64, "stages": 4, "row_groups": 1}


def sizes(**changes):
    return {**SIZES, **changes}


def entry(config, back_end="mosaic_gpu", **changes):
    return Entry(back_end, sizes(**changes), config, 20.0, 21.0, {"jax": "0.11.2"}, "2026-11-24", "tune")


def text_with(**fields):
    return json.dumps({"entries": [dataclasses.asdict(entry(SPLIT)) | fields]})


@pytest.fixture
def table(tmp_path, monkeypatch, compiled_for):
    """Writes entries into the table of a device, for which back ends are then compiled, and that they read."""
    monkeypatch.setattr(DecodeKernel, "tuned_tables", tmp_path)

    def write(*entries, kind=H100, platform="gpu"):
        compiled_for(kind, platform)
        write_table(table_path(tmp_path, kind), kind, entries)

    return write


@pytest.fixture
def found(tmp_path):
    """What the table of the H100 holds for sizes."""

    def look(wanted, back_end="mosaic_gpu", adapt=lambda config, measured: config, kind=H100, make=dict):
        return find(tmp_path, kind, back_end, wanted, make=make, adapt=adapt)

    return look


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
def test_other_sizes_are_not_served(table, found, change):
    table(entry({"n": 1}))
    assert found(sizes(**change)) is None
    assert found(SIZES, "triton") is None
    assert found(SIZES, kind="NVIDIA H200") is None


def test_the_same_bucket_serves_before_nearer_numbers_of_another_one(table, found):
    table(entry({"n": 1}, batch=16), entry({"n": 2}, batch=32))
    assert found(sizes(batch=17)) == {"n": 2}
    assert found(sizes(batch=9)) == {"n": 1}
    assert found(sizes(capacity=2049)) == {"n": 1}


def test_the_nearest_bucket_serves_within_two_doublings_and_the_nearer_batch_of_two(table, found):
    table(entry({"n": 1}, batch=32), entry({"n": 2}, capacity=8192))
    assert found(SIZES) == {"n": 2}
    assert found(sizes(batch=64)) == {"n": 1}
    assert found(sizes(batch=64, capacity=2048)) == {"n": 1}
    assert found(sizes(batch=1)) is None


def test_a_configuration_that_does_not_fit_is_passed_over_for_the_next(table, found):
    table(entry({"n": 1}), entry({"n": 2}, batch=32))
    assert found(SIZES, adapt=lambda c, measured: c if measured["batch"] == 32 else None) == {"n": 2}
    assert found(SIZES, adapt=lambda c, measured: None) is None


def test_where_the_heuristic_was_best_it_serves_though_others_are_near(table, found):
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
def test_a_table_that_cannot_be_read_is_warned_of_once_and_is_no_error(tmp_path, found, caplog, text):
    path = table_path(tmp_path, H100)
    path.write_text(text)
    with caplog.at_level(logging.WARNING, logger="mlra_jax"):
        assert [found(SIZES), found(SIZES)] == [None, None]
    [record] = caplog.records
    assert f"{path} is not a table of tuned configurations" in record.getMessage()
    assert "python -m benchmarks.tune_decode_attention" in record.getMessage()


def test_a_configuration_with_fields_of_another_version_is_warned_of_once_and_passed_over(
    table, found, caplog
):
    table(entry(SPLIT | {"colour": 3}), entry(SPLIT, batch=32))
    with caplog.at_level(logging.WARNING, logger="mlra_jax"):
        for _ in range(2):
            assert found(SIZES, make=mosaic_gpu.Config) == mosaic_gpu.Config(**SPLIT)
    [record] = caplog.records
    assert "colour" in record.getMessage()


def test_the_hopper_kernel_takes_what_fits_its_pages_memory_and_batch(table):
    take = lambda **changes: mosaic_gpu.MosaicGPU().tuned(dataclasses.replace(SPEC.shape, **changes))
    table(entry(SPLIT))
    assert take() == take(batch=15) == mosaic_gpu.Config(**SPLIT)
    assert take(heads_per_kv=32) is None
    table(entry(SPLIT | {"block": 128}))
    for pages in ({"page_size": 128, "row_pages": 32}, {"page_size": 32, "row_pages": 128}):
        assert take(**pages) == mosaic_gpu.Config(**SPLIT | {"block": 128})
    assert take(page_size=16, row_pages=256) is None  # no block is gathered from eight
    table(entry(SPLIT | {"stages": 20}))
    assert take() is None
    table(entry(SPLIT | {"n_splits": 1}))  # a program for each sequence: right for as many as were measured
    assert take() == mosaic_gpu.Config(**SPLIT | {"n_splits": 1})
    assert take(batch=15) is None


def test_the_triton_kernel_takes_what_fits_its_pages_and_keeps_the_number_of_programs(table):
    config = triton.Config(block_rows=16, block_tokens=64, splits=8, warps=4, stages=3)
    table(entry(dataclasses.asdict(config), "triton"))

    def take(batch=16, **changes):
        return triton.Triton().tuned(dataclasses.replace(SPEC, lengths=(4096,) * batch, **changes).shape)

    assert take() == take(page_size=128) == config
    assert take(page_size=32) is None
    assert take(12).splits == 10
    assert take(32).splits == 4
    assert take(32, heads=2) is None


def test_the_tpu_kernel_takes_what_fits_its_memory_and_cores(table):
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5E, 1)
    take = lambda **changes: mosaic_tpu.MosaicTPU(info=dataclasses.replace(info, **changes)).tuned(SPEC.shape)
    config = mosaic_tpu.Config(block=2048, step=1024, tail=512)
    on = {"kind": "TPU v5e", "platform": "tpu"}
    table(entry(dataclasses.asdict(config), "mosaic_tpu"), **on)
    assert take() == config
    assert take(vmem_capacity_bytes=1 << 20) is None
    table(entry(dataclasses.asdict(config) | {"shares": 2}, "mosaic_tpu"), **on)
    assert take() is None


def test_triton_runs_what_the_table_says_unless_its_caller_names_a_configuration(table, monkeypatch):
    config = triton.Config(block_rows=16, block_tokens=64, splits=5, warps=4, stages=2)
    table(entry(dataclasses.asdict(config), "triton", **SMALL))
    launched = []

    def launch(kernel, inputs, outputs, *, grid, **constants):
        launched.append((grid, constants["stages"]))
        return tuple(jnp.zeros(x.shape, x.dtype) for x in outputs)

    monkeypatch.setattr(triton.back_end, "_launch", launch)
    kernels = types.SimpleNamespace(split_kernel=None, combine_kernel=None)
    monkeypatch.setattr(triton.back_end, "_import_kernels", lambda: kernels)
    make_call(SMALL_SPEC)(implementation="triton")
    assert launched[0] == ((5, 1, 2), 2)
    launched.clear()
    named = dataclasses.replace(config, splits=3, stages=4)
    make_call(SMALL_SPEC)(implementation=triton.Triton(config=named))
    assert launched[0] == ((3, 1, 2), 4)


@newer_jax
def test_mosaic_runs_what_the_table_says_unless_its_caller_names_a_configuration(table, monkeypatch):
    tuned, named = mosaic_gpu.Config(7, 64, 2), mosaic_gpu.Config(9, 64, 3)
    table(entry(dataclasses.asdict(tuned), **SMALL))
    configs = []

    def attend(static, parts, *_):
        configs.append(static.config)
        q = parts[0][0]
        return q, q[..., 0].astype(jnp.float32)

    monkeypatch.setattr(mosaic_gpu.back_end, "attend", attend)
    for implementation in ("mosaic_gpu", mosaic_gpu.MosaicGPU(config=named)):
        make_call(SMALL_SPEC)(implementation=implementation)
    assert configs == [tuned, named]


def test_tables_that_come_with_the_package_can_be_read():
    for path in TUNED.glob("*.json"):
        for e in read_table(path):
            assert e.config is None or KERNELS[e.back_end].config_type(**e.config)
            assert e.us <= e.heuristic_us
