"""What the decode step does on a GPU besides reading its weights and its cache once: seen in the compiled program."""

import dataclasses
import importlib.util
import math
import re

import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.attention.kv_cache import values_per_token
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.attention.tied import TiedAttentionConfig
from mlra_jax.config import ModelConfig
from mlra_jax.execution.topologies import gpu_devices
from mlra_jax.generation.engine import compile_step
from mlra_jax.ops.dispatch import choose
from mlra_jax.sharding import MESH_AXES, decode_rules

pytestmark = [
    pytest.mark.smoke,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_plugins") is None
        or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
        reason="compiling for a GPU needs jax-cuda13-plugin",
    ),
]

BASE = ModelConfig(n_layers=2, param_dtype="bfloat16")  # the 2.9 B models: MLRA-4
MODELS = {
    "mlra_4": BASE,
    "mla": dataclasses.replace(BASE, attention=LatentAttentionConfig(1, 1, kv_lora_rank=512, d_rope=64)),
    "gqa": dataclasses.replace(BASE, attention=GroupedAttentionConfig(8, 128)),
    "gta": dataclasses.replace(BASE, attention=TiedAttentionConfig(6, 128)),
}
MAX_LEN = 32768


def moved(hlo: str) -> dict[str, int]:
    """Bytes that each operation of the compiled program writes, but products, the attention and what is in place."""
    sizes = {}
    for line in hlo[hlo.index("\nENTRY") :].splitlines():
        if not (match := re.match(r"\s*(?:ROOT )?%([\w.-]+) = (.*?) ([\w-]+)\(", line)):
            continue
        name, result, kind = match.groups()
        passes = kind in ("parameter", "bitcast", "tuple", "get-tuple-element", "custom-call", "while")
        in_place = "scatter" in name or "dynamic_update_slice" in name
        if passes or in_place or "gemm_fusion" in name:
            continue
        arrays = re.findall(r"\b[a-z]+(\d+)\[([\d,]*)\]", result)
        sizes[name] = sum(int(b) // 8 * math.prod(int(n) for n in s.split(",") if n) for b, s in arrays)
    return sizes


@pytest.mark.parametrize(("model", "batch"), [("mlra_4", 1), ("mlra_4", 8), ("gqa", 8), ("gta", 8)])
def test_a_step_on_an_h100_neither_copies_nor_converts_weights_or_cache(model, batch):
    devices = np.array(gpu_devices("NVIDIA H100 80GB HBM3")).reshape(1, 1, 1, 1)
    mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Explicit,) * 4)
    compiled = compile_step(MODELS[model], decode_rules(), mesh, batch=batch, max_len=MAX_LEN)
    smallest_weight = 2 * 3072 * 1024  # W_q of GQA shares have more, and so has each joined matrix
    large = {name: size for name, size in moved(compiled.as_text()).items() if size >= smallest_weight}
    assert not large
    memory = compiled.memory_analysis()
    cache = 2 * 2 * batch * MAX_LEN * values_per_token(MODELS[model])
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < min(cache // 4, 2**27)


def kernels(hlo: str) -> list[str]:
    """Names of what the compiled program launches."""
    launched = r"^ +(?:ROOT )?%([\w.-]+) = .*? (?:fusion|custom-call|copy)\("
    return re.findall(launched, hlo[hlo.index("\nENTRY") :], re.MULTILINE)


@pytest.mark.parametrize("batch", [1, 8])
def test_a_layer_of_mlra_4_takes_few_kernels_on_an_h100(batch):
    devices = np.array(gpu_devices("NVIDIA H100 80GB HBM3")).reshape(1, 1, 1, 1)
    mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Explicit,) * 4)
    counts = []
    for n_layers in (2, 3):
        config = dataclasses.replace(BASE, n_layers=n_layers)
        compiled = compile_step(config, decode_rules(), mesh, batch=batch, max_len=MAX_LEN)
        counts.append(len(kernels(compiled.as_text())))
    assert counts[1] - counts[0] <= 13


def test_products_of_few_rows_go_to_their_kernel_unless_another_is_chosen():
    devices = np.array(gpu_devices("NVIDIA H100 80GB HBM3")).reshape(1, 1, 1, 1)
    mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Explicit,) * 4)
    step = lambda: compile_step(BASE, decode_rules(), mesh, batch=8, max_len=MAX_LEN).as_text()
    count = lambda hlo: len(re.findall(r"custom-call\(.*jit\(multiply\)/(?:skinny_gemm|swiglu)", hlo))
    assert count(step()) == 5 * BASE.n_layers
    with choose(skinny_gemm="reference", swiglu="reference"):
        assert count(step()) == 0


def test_the_step_of_a_model_held_in_float32_would_be_seen_to_convert_its_weights():
    assert moved("\nENTRY %main {\n  %convert.1 = bf16[3072,1600]{1,0} fusion(%w), kind=kLoop\n}") == {
        "convert.1": 2 * 3072 * 1600
    }


def sums_over_devices(hlo: str) -> tuple[int, int, int]:
    """All-reduces by XLA, and by our kernels with the norm and without."""
    by_xla = re.findall(r" all-reduce(?:-start)?\(", hlo)
    ours = re.findall(r"custom-call\(.*op_name=\"[^\"]*/(all_reduce\w*)", hlo)
    return len(by_xla), ours.count("all_reduce_add_rms_norm"), ours.count("all_reduce")


@pytest.mark.parametrize(("model", "split_heads"), [("mlra_4", False), ("mla", True), ("gqa", True)])
def test_a_step_on_two_h100s_leaves_sums_over_devices_to_their_kernel(model, split_heads):
    devices = np.array(gpu_devices("NVIDIA H100 80GB HBM3", 2)).reshape(1, 1, 2, 1)
    mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Explicit,) * 4)
    compiled = compile_step(MODELS[model], decode_rules(split_heads), mesh, batch=1, max_len=1024)
    # Before each norm, the first one's sum being the embedding; and the choice of the token.
    assert sums_over_devices(compiled.as_text()) == (0, 2 * BASE.n_layers + 1, 1)
