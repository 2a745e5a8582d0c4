"""The benchmark of training: its tables, and the file that keeps the results of several commands."""

import json

import pytest

from benchmarks import train
from mlra_jax.config import ConfigError

SETTING = {
    "device": "NVIDIA H100 80GB HBM3",
    "versions": {"jax": "0.11.2"},
    "date": "2026-11-24",
    "command": "python -m benchmarks.train",
}


def result(speed=22_000.0, mesh=None, **fields):
    parts = dict.fromkeys(train.PARTS, 1e3)
    return {
        "config": "mlra_4",
        "setting": SETTING,
        "mesh": mesh or {},
        "gather": "layer",
        "layers": 24,
        "parameters": 10**9,
        "micro_batch": 3,
        "accumulation": 2,
        "remat": "products",
        "step_s": 1.0,
        "spread_s": 0.01,
        "tokens_per_second": speed,
        "attention_flops_per_token": 10**9,
        "mfu": 0.484,
        "tokens": 10**5,
        "estimated_bytes": 2**30,
        "compiled_bytes": 2**31,
        "profile": {"span_us": 8e3, "parts": parts, "kernels": [("products", "gemm dot", 1e3, 4)]},
        **fields,
    }


def test_kernels_are_told_apart_by_what_they_do():
    assert train.part_of("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(nccl", "") == "exchanges"
    assert train.part_of("attention_dk_mosaic_gpu_kernel", "") == "attention backward"
    assert train.part_of("nvjet_sm90_tss_160x256", "jit(step)/while/body/dot_general") == "products"
    assert train.part_of("loop_add_fusion", "jit(step)/add") == "optimizer"


def test_a_file_keeps_what_other_commands_measured_and_the_newest_of_the_same(tmp_path):
    out = tmp_path / "results" / "train_h100"
    train.write(out, [result(), result(20_000.0, mesh={"tensor": 2})])
    train.write(out, [result(23_000.0, seq_len=2048), result(24_000.0, mesh={"fsdp": 2}, gather="step")])
    kept = json.loads(out.with_suffix(".json").read_text())["results"]
    assert [r["tokens_per_second"] for r in kept] == [23_000, 20_000, 24_000]
    text = out.with_suffix(".md").read_text()
    assert "| mlra_4 | fsdp 2 | 2,048 | 3 x 2 | products | step | 24,000 | 48.4% |" in text
    assert (
        "mlra_4 on fsdp 2, 2,048 tokens, 3 x 2 products, gathered each step: `python -m benchmarks.train`"
        in text
    )


def test_a_devices_part_of_the_state_is_what_its_optimizer_moves():
    lines = "\n".join(train.budget(result(mesh={"fsdp": 2})))
    assert "| optimizer | 1.0 | 12.5% | 0.01 | 14.0 GB | 4.2 |" in lines
    assert not train.budget(result(profile={}))


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "train_cpu.json"
    assert train.stored(path) == []
    path.write_text('{"results": [{"config": "mlra_4"}]}')
    with pytest.raises(ConfigError, match=r"train_cpu.json holds no results of this command; move it"):
        train.stored(path)
