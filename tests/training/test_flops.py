import pytest

from mlra_jax.cli.configs import load_config
from mlra_jax.execution.flops import peak_flops, train_flops_per_token


@pytest.mark.parametrize(
    ("name", "n_params", "total"),
    [
        ("mlra_4", 2.8732e9, 21.8e9),
        ("mla", 2.8721e9, 18.4e9),
        ("gqa", 2.8726e9, 18.1e9),
        ("mha", 2.8726e9, 18.1e9),
        ("mlra_2", 2.8726e9, 19.5e9),
        ("gla_4", 2.8732e9, 18.4e9),
        ("mfa", 2.8732e9, 19.1e9),
        ("gta", 2.8720e9, 18.1e9),
        ("tpa", 2.8732e9, 18.1e9),
        ("gqa_double_heads", 2.8726e9, 19.0e9),
    ],
)
def test_flops_per_token_of_the_papers_models_are_those_published(name, n_params, total):
    flops = train_flops_per_token(load_config(name).model, int(n_params), 2048)
    assert flops == pytest.approx(total, rel=3e-3)


def test_attention_counts_each_branch_over_the_exact_causal_triangle():
    model = load_config("mlra_4").model
    # 24 layers, 24 heads, 4 branches, keys of 192 and values of 128, 1.5 keys on average, forward and backward.
    assert train_flops_per_token(model, 0, 2) == 24 * 24 * 4 * 2 * (192 + 128) * 1.5 * 3


def test_attention_of_tpa_counts_the_products_of_its_factors():
    # 24 layers, 24 heads 128 wide; 1.5 keys on average, and 6 + 2 + 2 factors; forward and backward.
    expected = 24 * 24 * (2 * (128 + 128) * 1.5 + 2 * 10 * 128) * 3
    assert train_flops_per_token(load_config("tpa").model, 0, 2) == expected


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L4", 121),
        ("Tesla T4", 65),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("TPU7x", 1153.5),
    ],
)
def test_peak_of_a_known_device_is_found_by_its_kind(kind, tflops):
    assert peak_flops(kind) == tflops * 1e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L400", "TPU v4 lite", "TPU v9"])
def test_unknown_device_has_no_peak(kind):
    assert peak_flops(kind) is None
