"""Layers and models on several devices, or one device's share of them: what is run, compared and written."""

import dataclasses
import functools
import importlib.util
import json
import types

import jax
import numpy as np
import pytest

from benchmarks import attention_layer, tensor_parallel
from benchmarks.attention_layer import Layers, places, share_of, split_kernels
from benchmarks.measure import Timing
from benchmarks.tensor_parallel import VARIANTS, layer_config, model_config, tiny
from mlra_jax.config import ConfigError
from mlra_jax.execution.collectives import executed_collectives


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_share_holds_what_one_of_the_devices_holds(variant, tensor):
    config = layer_config(variant, "paper")
    # MLRA's with whole query heads
    real = [place for place in places(variant, config, tensor, 4) if not place.split_tokens][-1]
    [share] = places(variant, config, tensor, tensor - 1) if tensor > 1 else [real]
    assert share.share == (tensor > 1)
    on_all, alone = (Layers(place, 16, [4096]) for place in (real, share))
    assert len(alone.mesh.devices.flat) == 1
    assert alone._bytes_per_token == on_all._bytes_per_token
    if (variant, tensor) == (
        "mlra_2",
        4,
    ):  # W_UK and W_UV of all query heads, where the device serves half of them
        a = config.attention
        extra = 2 * 2 * (config.n_heads // 2) * a.d_latent * a.d_nope
        assert alone.weight_bytes == on_all.weight_bytes + extra
    else:
        assert alone.weight_bytes == on_all.weight_bytes


def test_the_bound_counts_each_weight_and_each_cached_value_once():
    layers = Layers(places("mlra_4", layer_config("mlra_4", "paper"), 1, 1)[0], 16, [4096])
    a = dataclasses.asdict(layers.place.config.attention)
    assert (a["q_lora_rank"], a["kv_lora_rank"]) == (1024, 512)
    weights = 3072 * (1024 + 512 + 64) + 1024 * 64 * 192 + 2 * 4 * 64 * 128 * 128 + 64 * 128 * 3072
    assert layers.weight_bytes == 2 * weights + 4 * (1024 + 512)  # the gains are float32
    assert layers._bytes_per_token == 16 * 576 * 2


def test_what_cannot_be_cut_into_shares_is_refused():
    config = layer_config("mlra_4", "paper")
    with pytest.raises(ConfigError, match="4 latent or KV heads cannot be cut into 8 shares"):
        share_of(config, 8)
    with pytest.raises(ConfigError, match="n_heads=64 cannot be cut into 3 shares"):
        share_of(config, 3)
    assert share_of(layer_config("mla", "paper"), 4).attention == layer_config("mla", "paper").attention


def test_the_program_is_the_module_s_decode_step_layer_after_layer(few_layers):
    config = dataclasses.replace(
        tiny(model_config("mlra_4", "paper")), param_dtype="float32", compute_dtype="float32"
    )
    layers = Layers(places("mlra_4", config, 4, 4)[0], 2, [100])
    program = layers.compile()
    leaves, cache, x_BTD = layers.fill()
    cache = layers.at(cache, 100)
    modules = jax.tree.unflatten(jax.tree.structure(layers._abstract[0]), leaves)
    assert len(modules) == layers.calls == 2
    expected, caches = x_BTD, []
    with jax.set_mesh(layers.mesh):
        for module, layer_cache in zip(modules, cache.layers, strict=True):
            expected, layer_cache = module.decode(expected, layer_cache, np.full(2, 99), np.ones(2, np.int32))
            caches.append(layer_cache)
    found_cache, found = program(leaves, cache, x_BTD)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, list(found_cache.layers), caches)


def test_kernels_of_attention_and_of_exchanges_are_told_by_name_and_by_where_they_come_from():
    hlo = """
  %fusion.7 = f32[4] fusion(%x), metadata={op_name="jit(many)/while/body/attend/reduce"}
  %input_reduce_fusion.1 = f32[4] fusion(%x), metadata={op_name="jit(many)/while/body/output/reduce"}
"""
    kernels = {
        "decode_attention_mosaic_gpu_kernel": 10.0,
        "merge_attention_mosaic_gpu_kernel": 2.0,
        "fusion_7": 1.0,
        "input_reduce_fusion_1": 20.0,
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096>)": 4.0,
        "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096>)": 5.0,
        "all_reduce_4_0_fusion_1": 3.0,  # XLA's own
        "psum_invariant_37_0_fusion_1": 3.0,
        "all_reduce_add_rms_norm_mosaic_gpu_kernel": 7.0,
        "all_reduce_mosaic_gpu_kernel": 8.0,
        "loop_all_reduce_fusion": 40.0,
        "input_all_gather_fusion": 40.0,
    }
    assert split_kernels(kernels, hlo) == (13.0, 30.0)
    assert split_kernels({}, hlo) == (None, None)


ROW = attention_layer.Row(
    "mlra_4", 4, 1, "whole", False, 1, 2048, Timing(100.0, 1.0, {}, "device"), 90.0, 30.0, 20.0, 10**8, 10**7, 2e12
)  # fmt: skip


def test_lines_give_the_shares_of_bound_bandwidth_and_exchanges():
    cells = [cell.strip() for cell in tensor_parallel.layer_line(ROW.record()).strip("|").split("|")]
    assert cells == [
        "MLRA-4", "4", "whole", "1", "2K", "90.0", "100.0", "90.0", "55.0", "61%", "30.0", "17%", "20.0", "22%",
    ]  # fmt: skip
    alone = dataclasses.replace(ROW, share=True, exchange_us=0.0)
    cells = [cell.strip() for cell in tensor_parallel.layer_line(alone.record()).strip("|").split("|")]
    assert cells[1] == "4 (share)"
    assert cells[-2:] == ["", ""]


def test_mla_is_compared_with_the_faster_layout_and_one_device_with_several():
    row = lambda variant, tensor, heads, us, attention, exchange, **more: dataclasses.replace(
        ROW,
        **more,
        variant=variant,
        tensor=tensor,
        heads=heads,
        timing=Timing(us, 0.0, {}, "device"),
        wall_us=us + 1.0,
        attention_us=attention,
        exchange_us=exchange,
    ).record()
    rows = [
        row("mlra_4", 1, "split", 200.0, 100.0, 0.0),
        row("mlra_4", 4, "split", 110.0, 30.0, 40.0),
        row("mlra_4", 4, "whole", 100.0, 30.0, 20.0),
        row("mla", 4, "split", 150.0, 90.0, 10.0),
    ]

    def cells(rows):
        lines = [line for line in tensor_parallel.comparisons(rows) if line.startswith("| 1 |")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    assert cells(rows) == [["1", "2K", "", "3.00", "", "2.00", "", "1.50"], ["1", "2K", "2.00", ""]]
    rows.append(row("mla", 1, "split", 240.0, 180.0, 0.0))
    rows.append(row("mla", 4, "whole", 120.0, 45.0, 30.0, split_tokens=True))
    assert cells(rows) == [
        ["1", "2K", "1.80", "3.00", "1.50", "1.80", "2.00", "1.50", "1.20", "1.50", "1.20"],
        ["1", "2K", "2.00", "1.60", "2.00"],
    ]
    assert tensor_parallel.layer_line(rows[-1]).startswith("| MLA (context) | 4 | whole | 1 | 2K | 120.0 |")


def test_mla_is_run_with_its_tokens_split_where_the_devices_are_there():
    layouts = lambda *args: [place.name for place in places("mla", model_config("mla", "tiny"), *args)]
    assert layouts(1, 2) == ["mla tensor 1 split"]
    split = ["mla tensor 2 split split tokens", "mla tensor 2 whole split tokens"]
    assert layouts(2, 2) == ["mla tensor 2 split", *split]
    assert layouts(2, 1) == ["mla tensor 2 split"]


def test_contexts_that_do_not_fit_leave_the_shorter_ones_of_their_batch(monkeypatch):
    class Engine:
        leaves = (np.zeros(1),)

        def __init__(self, *_):
            pass

        def check_memory(self, batch, capacity):
            if capacity > 4096:
                raise ConfigError(["it needs more"])

    class Benchmark:
        def __init__(self, *_):
            self.results = []

        def rows(self, batch, capacity):
            return types.SimpleNamespace(cache_bytes_per_device=capacity)

        def measure(self, rows, context):
            self.results.append({"context": context})

    monkeypatch.setattr(tensor_parallel, "Engine", Engine)
    monkeypatch.setattr(tensor_parallel, "device_bytes", lambda tree: 0)
    monkeypatch.setattr(tensor_parallel.decode_step, "random_model", lambda *_: None)
    monkeypatch.setattr(tensor_parallel.decode_step, "Benchmark", Benchmark)
    [place] = places("mla", model_config("mla", "tiny"), 1, 1)
    cases = [(1, 8192), (1, 1024), (64, 8192)]
    found = list(tensor_parallel.measure_model(place, cases, types.SimpleNamespace(steps=1, runs=1)))
    assert found[0] == ("model mla tensor 1 split batch 1 context 8K", "it needs more")
    assert (found[1]["context"], found[1]["cache_bytes_allocated"]) == (1024, 1024 + 256)
    assert found[2] == ("model mla tensor 1 split batch 64 context 8K", "it needs more")


@pytest.mark.smoke
def test_the_command_runs_and_compares_models_on_simulated_devices(few_layers, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_parallel, "tiny", lambda config: dataclasses.replace(tiny(config), n_layers=1))
    layouts = lambda *args: [p for p in places(*args) if p.tensor == 1 or (p.split_tokens and p.split_heads)]
    monkeypatch.setattr(tensor_parallel, "places", layouts)
    options = ["--parts", "model", "check", "--size", "tiny", "--models", "mla", "--tensor", "1", "2"]
    sizes = [
        "--model-cases",
        "2x256",
        "--steps",
        "2",
        "--runs",
        "1",
        "--check-tokens",
        "2",
        "--seconds",
        "1e6",
    ]
    assert tensor_parallel.main([*options, *sizes, "--out", str(tmp_path)]) == 0
    stem = tmp_path / "tensor_parallel_cpu"
    record = json.loads(stem.with_suffix(".json").read_text())
    one, two = record["model"]
    assert two["cache_bytes"] / one["cache_bytes"] == 1 / 2
    assert two["weight_bytes"] < one["weight_bytes"]
    [check] = record["checks"]
    assert all(r["equal_tokens"] for r in check["rows"])
    assert [r["largest_difference"] > 0 for r in check["rows"]] == [False, True]
    assert max(r["largest_difference"] for r in check["rows"]) < 0.05 * check["rows"][0]["logits_std"]
    page = stem.with_suffix(".md").read_text()
    assert "| MLA (context) | 2 | split | 2 | 256 | " in page
    assert "| MLA (context) | 2 | split | equal | " in page


def test_with_one_device_shares_are_run_and_nothing_is_compared(few_layers, tmp_path, monkeypatch):
    monkeypatch.setattr(
        tensor_parallel, "measure_model", lambda place, *_: iter([("model", str(place.share))])
    )
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    options = ["--size", "tiny", "--variants", "mlra_4", "--models", "mlra_4", "--tensor", "4"]
    argv = [*options, "--cases", "1x256", "--runs", "1", "--out", str(tmp_path)]
    assert tensor_parallel.main(argv) == 1  # as the check was left out
    record = json.loads((tmp_path / "tensor_parallel_cpu.json").read_text())
    [layer] = record["layers"]
    assert (layer["share"], layer["tensor"], layer["heads"]) == (True, 4, "whole")
    assert record["failures"]["model"] == "True"
    page = (tmp_path / "tensor_parallel_cpu.md").read_text()
    assert "| MLRA-4 | 4 (share) | whole | 1 | 256 | " in page
    (tmp_path / "tensor_parallel_cpu.md").unlink()
    (tmp_path / "tensor_parallel_cpu.png").unlink()
    assert tensor_parallel.main(["--redraw", str(tmp_path / "tensor_parallel_cpu.json")]) == 0
    assert (tmp_path / "tensor_parallel_cpu.md").read_text() == page
    assert (tmp_path / "tensor_parallel_cpu.png").exists()
    assert "compares one device with several" in record["failures"]["check mlra_4"]


has_plugin = jax.__version_info__ >= (0, 11) and importlib.util.find_spec("jax_cuda13_plugin")
GPU = pytest.mark.skipif(not has_plugin, reason="needs JAX 0.11 or later and its CUDA 13 plugin")
TPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@pytest.mark.parametrize("topology", [pytest.param("v5e:2x2", marks=TPU), pytest.param("h100:4", marks=GPU)])
def test_a_layer_compiled_for_four_devices_exchanges_what_its_layout_says(topology, few_layers):
    from mlra_jax.execution.topologies import described_devices

    place, _ = places("mlra_4", layer_config("mlra_4", "paper"), 4, 4)
    hlo = Layers(place, 16, [4096], described_devices(topology)).compile().as_text()
    kinds = {(c.kind, c.devices, *(c.arrays[0][0], c.bytes)) for c in executed_collectives(hlo)}
    exchanged = {
        ("all-gather", 4, "bf16", 16 * 64 * 192 * 2),  # queries
        ("reduce-scatter", 4, "f32", 16 * 64 * 128 * 4),  # sums over latent heads
    }
    output = ("all-reduce", 4, "bf16", 16 * 3072 * 2)
    assert kinds == (exchanged if "h100" in topology else {*exchanged, output})
    assert ("/all_reduce" in hlo) == ("h100" in topology)  # by our kernel
