"""`mlra-plan`: training on absent devices."""

import importlib.util
import json
import re

import jax
import pytest

from mlra_jax.cli.describe import main as describe
from mlra_jax.cli.plan import main

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
MESH = "--mesh.data 1 --mesh.fsdp 2 --mesh.context 2"
OPTIONS = "--mesh.data 8 --mesh.tensor 4 --data.micro_batch 0 --data.global_batch 64"


def plan(capfd, *arguments):
    assert main(["tiny", *arguments]) == 0
    return capfd.readouterr().out


@needs_libtpu
def test_what_the_compiler_says_stands_beside_the_estimate_and_the_roofline(capfd):
    small = "--model.n_layers 2 --data.micro_batch 0"
    with jax.default_matmul_precision("default"):  # as users compile
        text = plan(capfd, "--topology", "v5e:2x2", *MESH.split(), *small.split())
    assert "tiny on v5e:2x2: 4 x TPU v5 lite, data=1 x fsdp=2 x tensor=1 x context=2" in text
    assert re.search(
        r"Estimated: micro-batch 4 \(x 1\), remat none, about .* of 16\.0 GiB of each device", text
    )
    assert re.search(r"Roofline \(.*nothing measured\): .* tokens/s a device", text)
    assert re.search(r"Compiled: 0\.\d\d GiB of 16\.0 GiB a device \(.*\)", text)
    assert "rematerialization: 0." in text
    assert re.search(r"\| (all-reduce|reduce-scatter) \| 2 \| \w+\[.*\] \| \d+\.\d \| \d+ \|", text)


@pytest.fixture
def no_plugin(monkeypatch):
    """Neither libtpu nor JAX's CUDA plugin is installed."""

    def absent(**_):
        raise RuntimeError("there is no such plugin")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", absent)


def test_an_estimate_alone_needs_no_plugin_and_takes_what_the_command_line_says(capfd, no_plugin):
    text = plan(capfd, "--estimate", "--topology=2*v5e:4x4", *OPTIONS.split())
    assert "32 x TPU v5 lite, data=8 x fsdp=1 x tensor=4" in text
    assert "GB sent over data" in text
    assert "Compiled" not in text


def test_the_whole_run_is_said_in_days_and_tokens_per_second(capfd, no_plugin):
    options = "--steps 864000 --data.micro_batch 0 --data.global_batch 64 --data.seq_len 256"
    text = plan(capfd, "--estimate", "--topology=v5p:2x2x1", *MESH.split(), *options.split())
    each = int(re.search(r"; ([\d,]+) or [\d,]+ tokens/s a device", text)[1].replace(",", ""))
    found = re.search(
        r"whole run, 864,000 steps or ([\d.]+) G tokens: (\S+) days at ([\d,]+) tokens/s if all overlaps, ",
        text,
    )
    tokens, days, rate = (float(value.replace(",", "")) for value in found.groups())
    assert tokens == pytest.approx(864e3 * 64 * 256 / 1e9, rel=1e-3)
    assert rate == pytest.approx(4 * each, rel=1e-5)
    assert days == pytest.approx(tokens * 1e9 / rate / 86400, rel=1e-2)


@pytest.mark.parametrize(("device", "shape"), [("h100", "4"), ("v5e", "2x2")])
def test_the_plan_and_the_description_estimate_the_same_memory(capfd, no_plugin, device, shape):
    options = ["--mesh.fsdp", "4", "--mesh.data", "1", "--data.micro_batch", "0"]
    planned = plan(capfd, "--estimate", "--topology", f"{device}:{shape}", *options)
    assert describe(["tiny", "--device", device, "--devices", "4", "--json", *options]) == 0
    training = json.loads(capfd.readouterr().out)["training"]
    assert f"micro-batch {training['micro_batch']} (" in planned
    shown = lambda size: f"{size / 2**30:.1f} GiB" if size > 2**30 / 10 else f"{size / 2**20:.1f} MiB"
    assert f"about {shown(training['total_bytes'])} of {shown(training['capacity_bytes'])}" in planned
    parts = ", ".join(f"{what} {shown(size)}" for what, size in training["bytes"].items() if size)
    assert f"({parts})" in planned


def test_no_topology_is_refused_with_examples(capfd):
    with pytest.raises(SystemExit) as exit_info:
        main(["tiny"])
    assert exit_info.value.code == 2
    assert "--topology v5e:16x16" in capfd.readouterr().err
