"""The benchmark of the decode step runs anywhere, and counts what it says."""

import importlib.util
import json
import pathlib
import sys

import pytest

from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.config import ModelConfig

PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "decode_step.py"


@pytest.fixture(scope="module")
def decode_step():
    spec = importlib.util.spec_from_file_location("decode_step", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["decode_step"] = module  # for its dataclasses
    spec.loader.exec_module(module)
    yield module
    del sys.modules["decode_step"]


def test_it_measures_each_case_and_refuses_what_does_not_fit(decode_step, monkeypatch, tmp_path, capsys):
    free = 2**26
    monkeypatch.setattr("mlra_jax.generation.engine.free_bytes", lambda device: free)
    options = [
        "--config",
        "tiny",
        "--layers",
        "1",
        "--steps",
        "2",
        "--runs",
        "2",
        "--prefill",
        "48",
        "--profile",
        "--products",
        "mosaic_gpu",
        "--bandwidth",
        "1e12",
        "--peak",
        "1e14",
        "--seconds",
        "1e6",
        "--option",
        "xla_cpu_enable_fast_math=false",
    ]
    cases = ["--cases", "1x256", "2x512", "2x256", "4096x1024K"]
    monkeypatch.setattr(sys, "argv", ["decode_step.py", *options, *cases, "--out", str(tmp_path / "out")])
    assert decode_step.main() == 0
    saved = json.loads((tmp_path / "out.json").read_text())
    assert [(r["batch"], r["context"]) for r in saved["steps"]] == [(1, 256), (2, 256), (2, 512)]
    one, two, longer = saved["steps"]
    assert one["ratio"] == pytest.approx(one["step_ms"] / one["ideal_ms"])
    assert 4 * one["cache_bytes"] == 2 * two["cache_bytes"] == longer["cache_bytes"]
    (refused,) = saved["refused"]
    assert "4096 row(s) of 1048832 tokens needs" in refused
    assert saved["prefill"]["tokens"] == 48
    assert "| 2 | 512 |" in (tmp_path / "out.md").read_text()
    assert "| 2 | 512 |" in capsys.readouterr().out


def test_flops_of_prefill_count_weights_and_all_branches_of_attention(decode_step):
    config = ModelConfig(vocab_size=10, n_layers=2, d_model=6, n_heads=4)
    latent = LatentAttentionConfig(4, 4, q_lora_rank=8, kv_lora_rank=16, d_nope=4, d_rope=2)
    for attention, per_pair in (
        (latent, 2 * 4 * 4 * (4 + 2 + 4)),  # four latents each, 4 wide
        (GroupedAttentionConfig(2, 8), 2 * 4 * (8 + 8)),
    ):
        changed = ModelConfig(**{**vars(config), "attention": attention})
        flops = decode_step.prefill_flops(changed, 1000, 100)
        assert flops == 2 * 100 * (1000 - 60) + 2 * 60 + 2 * per_pair * 100**2 / 2
