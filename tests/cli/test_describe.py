"""`mlra-describe`: what a configuration costs, and what fits."""

import json

import jax
import pytest

from mlra_jax.cli.configs import load_config
from mlra_jax.cli.describe import describe, main, render
from mlra_jax.execution.accelerators import KINDS, find_accelerator, named_accelerator


def described(capsys, *argv):
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_papers_model_is_counted_by_part_and_at_every_size_of_tensor(repository):
    d = describe(load_config("mlra_4"), context=131072, device="h100")
    # What the documentation shows, but for the estimates of training.
    counted = render(d).replace("\n## ", "\n### ").split("### Training on")[0].removeprefix("# mlra_4\n\n")
    assert counted in (repository / "docs/describe.md").read_text()
    assert d == json.loads(json.dumps(d))
    parts = d["parameters"]
    assert parts.pop("total") == sum(parts.values()) == 2_873_220_096
    assert parts["embedding"] == 50304 * 3072
    assert parts["mlp"] == 24 * 3 * 3072 * 9880
    assert parts["attention w_uk"] == parts["attention w_uv"] == 24 * 4 * 24 * 128 * 128
    assert parts["norms"] == 24 * (2 * 3072 + 1024 + 512) + 3072
    assert d["training_flops_per_token"]["total"] == pytest.approx(21.8e9, rel=3e-3)
    step = d["decoding_flops_per_token"]
    assert step["weights"] == 2 * (2_873_220_096 - parts["norms"])
    assert step["attention"] == 24 * 24 * 4 * 2 * (128 + 64 + 128) * 131072

    rows = {r["tensor"]: r for r in d["decoding"]}
    assert [rows[t]["values_per_token_and_layer"] for t in (1, 2, 4, 8)] == [576, 320, 192, 192]
    four = rows[4]
    assert four["bytes_per_token"] == 192 * 24 * 2
    # The device's own latent head, read by all 24 query heads: (192 + 128) * 2 * 24 FLOPs for 384 bytes.
    assert four["flops_per_cache_byte"] == (192 + 128) * 2 * 24 / 384
    assert four["intensity_over_ridge"] == pytest.approx(40 / (989e12 / 3.35e12))
    # In bfloat16, a quarter of all but latents' and queries' down-projections.
    assert 2 * parts["embedding"] / 4 < four["weight_bytes"] < 2 * 2_873_220_096 / 3
    room = 0.96 * 79.1 * 2**30 - 2**30 - four["weight_bytes"]
    assert four["longest_context"]["1"] == int(room / four["bytes_per_token"])
    assert four["longest_context"]["8"] == four["longest_context"]["1"] // 8
    assert four["largest_batch"] == four["longest_context"]["1"] // 131072

    train = d["training"]
    assert train["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1, "context": 1}
    assert train["bytes"]["moments"] == pytest.approx(2 * 4 * 2_873_220_096 / 8, rel=1e-3)
    assert train["total_bytes"] == sum(train["bytes"].values()) < train["capacity_bytes"]


def test_what_cannot_be_laid_out_or_does_not_fit_says_why_and_the_rest_is_there(capsys):
    d = described(capsys, "gqa", "--device", "t4", "--context", "2048", "--model.n-layers", "2")
    assert [("refused" in r) for r in d["decoding"]] == [False, False, True, True]
    assert "n_kv_heads=6" in d["decoding"][2]["refused"][0]
    big = described(capsys, "mha", "--device", "l4", "--devices", "1", "--context", "1000000")
    assert big["decoding"][0]["largest_batch"] == 0
    assert "does not fit" in big["training"]["refused"][0]


def test_fields_of_the_configuration_can_be_set_and_markdown_says_the_same(capsys):
    argv = ["tiny", "--model.d-ff", "1024", "--context", "256"]
    d = described(capsys, *argv)
    assert d["parameters"]["mlp"] == 3 * 3 * 192 * 1024
    assert "training" not in d
    assert d["decoding"][0]["weight_bytes"] == 4 * d["parameters"]["total"]  # float32, and nothing to pad
    assert main([*argv, "--device", "v5e", "--devices", "1"]) == 0
    text = capsys.readouterr().out
    assert f"| mlp | {3 * 3 * 192 * 1024:,} |" in text
    assert f"| total | {d['parameters']['total']:,} |" in text
    assert "## On v5e: 197 TFLOP/s, 16.0 GiB, 0.819 TB/s" in text
    assert "## Training on 1 of them" in text
    assert "total, estimated" in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["mlra_4", "--device", "h1000"], "No accelerator 'h1000' is known; known are h100, h100-nvl"),
        (["mlra_5"], "No configuration mlra_5. Did you mean mlra_4?"),
        ([], "The first argument must be a configuration"),
        (["tiny", "--devices", "0"], "--devices=0 must be at least 1"),
        (["tiny", "--context", "-1"], "--context=-1 must be at least 0"),
        (["tiny", "--model.n-heads", "3", "--model.attention.n-branches", "3"], "does not divide"),
    ],
)
def test_mistakes_are_one_sentence(capsys, argv, said):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
    assert said in capsys.readouterr().err


def test_every_short_name_is_of_a_known_accelerator_and_no_two_are_the_same():
    chips = [named_accelerator(name) for name in KINDS]
    assert len({(c.flops, c.memory, c.bandwidth) for c in chips}) == len(KINDS)
    assert named_accelerator("NVIDIA H100 PCIe") == find_accelerator("NVIDIA H100 PCIe")
    assert jax.devices()[0].platform == "cpu"
