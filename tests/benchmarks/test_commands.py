"""Every command of benchmarks/ runs, with each of its options, at its smallest and on a CPU."""

import dataclasses
import json
import operator
import re
import subprocess
import sys
import types

import jax
import pytest

from benchmarks import (
    determinism,
    input_pipeline,
    prepare,
    refill,
    split_latents,
    tpu_static,
    train,
    train_attention,
)
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.cli.configs import load_config
from mlra_jax.cli.convert import main as convert
from mlra_jax.config import ModelConfig
from mlra_jax.model import layers
from mlra_jax.ops import device
from mlra_jax.ops.attention.api import IMPLEMENTATIONS


@pytest.fixture
def call(monkeypatch):
    """Calls a command's `main` as a shell would."""

    def run(module, *argv):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
        return module.main()

    return run


def test_every_option_of_every_command_is_used_in_a_test(repository):
    tests = [path.read_text() for path in (repository / "tests").rglob("test_*.py")]
    unused = {}
    for path in (repository / "benchmarks").rglob("*.py"):
        if '__name__ == "__main__"' not in (source := path.read_text()):
            continue
        name = path.parent.name if path.stem == "__main__" else path.stem
        options = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', source))
        of_it = [text for text in tests if "benchmarks" in text and re.search(rf"\b{name}\b", text)]
        if left := options - set(re.findall(r'"(--[\w-]+)"', "\n".join(of_it))):
            unused[name] = left
    assert not unused


def test_attention_of_whole_sequences_by_back_end_and_cut(call, monkeypatch, capsys):
    tried = []

    def run(kernels, shape, config, parts, v, **keywords):
        tried.append(config)
        return IMPLEMENTATIONS["xla"](parts, v, **keywords)

    sizes = ["--cases", "tiny", "--batch", "1", "--tokens", "64", "--runs", "1"]
    argv = [*sizes, "--implementations", "xla", "cudnn", "--cuts", "block=128,stages=3"]
    assert call(train_attention, *argv) == 0
    said = capsys.readouterr().out
    assert re.search(r"\| tiny \| xla \| \d+ ", said)
    assert "| tiny | cudnn | It needs an NVIDIA GPU" in said
    assert "| tiny | block=128,stages=3 | the Mosaic GPU kernel runs on Hopper GPUs" in said

    monkeypatch.setattr(device, "current_device", lambda: ("gpu", "NVIDIA H100 80GB HBM3"))
    monkeypatch.setattr(jax, "__version_info__", max(jax.__version_info__, (0, 11)))
    # The tiny case is too narrow for the kernel.
    monkeypatch.setattr(train_attention.MosaicGPU, "check", lambda *_, **__: None)
    monkeypatch.setattr(train_attention.MosaicGPU, "run", run)
    assert call(train_attention, *sizes, "--implementations", "xla", "--cuts", "block=128,stages=3") == 0
    assert {(config.block, config.stages) for config in tried} == {(128, 3)}
    assert re.search(r"\| tiny \| block=128,stages=3 \| \d+ ", capsys.readouterr().out)


@pytest.mark.parametrize("cut", ["block", "depth=3", "block=x"])
def test_a_cut_of_attention_that_is_none_is_refused_with_the_fields(call, cut, capsys):
    with pytest.raises(SystemExit):
        call(train_attention, "--cuts", cut)
    assert "is not like block=128,stages=3, of row_groups, block," in capsys.readouterr().err


def test_a_train_step_is_measured_on_a_mesh_and_kept_beside_others(call, tmp_path, monkeypatch, capsys):
    tiny = load_config("tiny")
    attention = LatentAttentionConfig(4, 4, q_lora_rank=16, kv_lora_rank=64, d_nope=16, d_rope=8)
    model = dataclasses.replace(tiny.model, d_model=32, d_ff=32, attention=attention)
    data = dataclasses.replace(tiny.data, seq_len=16)
    monkeypatch.setattr(train, "load_config", lambda _: dataclasses.replace(tiny, model=model, data=data))
    sizes = ["--micro-batch", "1", "--accumulation", "1", "--layers", "1", "--steps", "1", "--out", tmp_path]
    mesh = ["--fsdp", "2", "--tensor", "2", "--remat", "full", "--gather", "step"]
    assert call(train, "--configs", "tiny", *sizes, *mesh) == 0
    [result] = json.loads((tmp_path / "train_cpu.json").read_text())["results"]
    assert (result["mesh"], result["remat"]) == ({"data": 2, "fsdp": 2, "tensor": 2}, "full")
    profiled = []
    again = lambda name, args, _: profiled.append(args.profile) or result | {"remat": "none"}
    monkeypatch.setattr(train, "measure", again)
    assert (
        call(train, "--configs", "tiny", *sizes, "--no-profile", "--deterministic", "no", "--context", "1")
        == 0
    )
    assert profiled == [False]
    assert len(json.loads((tmp_path / "train_cpu.json").read_text())["results"]) == 2
    assert f"Written to {tmp_path / 'train_cpu'}.md and .json" in capsys.readouterr().out


def test_refilled_rows_are_compared_with_static_batches_and_the_ideal(call, capsys):
    sizes = ["--config", "tiny", "--layers", "1", "--prompts", "5", "--rows", "2", "--shared", "16"]
    call(refill, *sizes, "--prompt", "2", "6", "--new", "2", "4")
    said = capsys.readouterr().out
    assert re.search(r"occupancy", said, re.IGNORECASE)
    assert re.search(r"ideal", said, re.IGNORECASE)


@pytest.mark.parametrize("repeats", [True, False])
def test_runs_that_end_or_are_killed_and_continued_are_compared(repeats, call, monkeypatch, capsys):
    step = """
import json, os, sys, time
out = sys.argv[1]
os.makedirs(out, exist_ok=True)
for i in range(40):
    open(f"{out}/metrics.jsonl", "a").write(json.dumps({"step": i}) + "\\n")
    time.sleep(0.03)
"""
    told = []

    def start(name, out, cache, steps, more):
        told.append(more)
        return subprocess.Popen([sys.executable, "-S", "-c", step, out])

    monkeypatch.setattr(determinism, "start", start)
    monkeypatch.setattr(determinism, "digest", lambda out, step: "a" if repeats else out.name)
    argv = ["--parts", "runs", "--configs", "tiny", "--steps", "9", "--kills", "2"]
    status = call(determinism, *argv, "--train", "--mesh.fsdp", "2")
    said = capsys.readouterr().out
    assert status == (0 if repeats else 1)
    assert re.search(r"\| killed after steps \d, \d \| \w+ \| (yes|NO) \|", said)
    assert ("NO" in said) != repeats
    assert told == [["--mesh.fsdp", "2"]] * 6


@pytest.mark.parametrize("variant", determinism.VARIANTS)
def test_a_variant_of_the_gradient_is_measured_with_its_flags(variant, call, monkeypatch, capsys):
    measured = []

    def measure(name, args, setting):
        measured.append((layers.take_rows is not operator.getitem, args.deterministic))
        return {"step_s": 1.0}

    monkeypatch.setattr(layers, "take_rows", layers.take_rows)  # which is undone afterwards
    monkeypatch.setattr(train, "measure", measure)
    assert call(determinism, "--configs", "tiny", "--variant", variant, "--steps", "1") == 0
    assert json.loads(capsys.readouterr().out) == {"step_s": 1.0}
    assert measured == [("sums" in variant, "yes" if "deterministic" in variant else "no")]


def test_preparing_is_timed_and_the_shards_of_all_numbers_of_processes_compared(call, capsys):
    call(prepare, "--workers", 1, "--megabytes", 0.1, "--tokenizer", "byte")
    assert re.search(
        r"tokenizer byte\n\n.*\n.*\n\| 1 \| [\d,]+ \| [\d,]+ \| [\d,]+ \|", capsys.readouterr().out
    )


def test_the_input_pipeline_is_timed_over_shards_of_its_own(call, tmp_path):
    sizes = ["--sequences", "2", "--seq-len", "16", "--steps", "1", "--tokens", "4096", "--threads", "1"]
    call(input_pipeline, *sizes, "--rate", "1e6", "--out", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["batch"] == "2 x 16 tokens, shuffled, local shards"
    assert result["limit_tokens_per_s"] > 0


def test_the_loss_after_a_latent_was_split_is_printed_by_how(call, repository, tmp_path, monkeypatch, capsys):
    parity, mla = repository / "tests/parity", tmp_path / "mla"
    config = json.loads((parity / "mla.json").read_text())["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ["--config", str(tmp_path / "config.json"), "--model-type", "mla", "--tokenizer", "byte"]
    assert convert(["from-official", str(parity / "mla.safetensors"), "--out", str(mla), *options]) == 0
    load = split_latents.load_config

    def with_data(*args):
        config = load(*args)
        data = dataclasses.replace(config.data, path="embedded", tokenizer="byte", seq_len=16)
        return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, vocab_size=384))

    monkeypatch.setattr(split_latents, "load_config", with_data)
    monkeypatch.setattr(split_latents, "SPLITS", ((4, 4), (3, 3)))
    monkeypatch.setattr(split_latents, "SEEDS", (0,))
    call(split_latents, mla, "--step", "0", "--sequences", "2")
    said = capsys.readouterr().out
    assert re.search(r"Before: \d+\.\d{3} nats per token", said)
    assert re.search(r"\| 4 \| 4 \| \d", said)
    assert "| 3 | 3 |" not in said


def test_the_tpu_compiler_s_tables_are_written(call, tmp_path, monkeypatch):
    """With estimates of kernels that test_mosaic_tpu.py makes, and a small layer."""
    pytest.importorskip("libtpu")
    use = dict.fromkeys([*tpu_static.UNITS, "VSTORE:SPILL"], (1, 0.5))
    monkeypatch.setattr(tpu_static, "estimate", lambda *_: tpu_static.Estimate(1000, True, use, 512))
    attention = LatentAttentionConfig(4, 4, q_lora_rank=64, kv_lora_rank=512, d_nope=128, d_rope=64)
    small = ModelConfig(d_model=256, n_heads=4, attention=attention)
    monkeypatch.setattr(tpu_static, "load_config", lambda _: types.SimpleNamespace(model=small))
    monkeypatch.setattr(tpu_static, "get_args", lambda _: ("absorbed",))
    monkeypatch.setattr(tpu_static, "TOKENS", 512)
    compiled = []
    monkeypatch.setattr(tpu_static, "compile_static", lambda *args: compiled.append(args))
    with jax.default_matmul_precision("default"):
        call(tpu_static, "--chips", "v5e", "--out", tmp_path / "out.md")
    text = (tmp_path / "out.md").read_text()
    assert "| v5e | 1 x 128K | 64 | 1.0K |" in text
    assert text.count("| v5e | forward and backward | absorbed |") == 1
    call(tpu_static, "--compile", "v5e:2x2", "64", "128", "256")
    assert compiled == [("v5e:2x2", 64, (128, 256))]
