"""`mlra-plan`: training on absent devices."""

import importlib.util
import re

import jax
import pytest

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


@needs_libtpu
def test_an_estimate_alone_compiles_nothing_and_takes_what_the_command_line_says(capfd):
    text = plan(capfd, "--estimate", "--topology=2*v5e:4x4", *OPTIONS.split())
    assert "32 x TPU v5 lite, data=8 x fsdp=1 x tensor=4" in text
    assert "GB sent over data" in text
    assert "Compiled" not in text


def test_no_topology_is_refused_with_examples(capfd):
    with pytest.raises(SystemExit) as exit_info:
        main(["tiny"])
    assert exit_info.value.code == 2
    assert "--topology v5e:16x16" in capfd.readouterr().err
