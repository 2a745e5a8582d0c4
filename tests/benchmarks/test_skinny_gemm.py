"""The benchmark of skinny GEMM, in tiny sizes."""

import json

import jax
import pytest

from benchmarks import skinny_gemm
from mlra_jax.ops.skinny_gemm.mosaic_gpu import Config


def test_cuts_are_read_and_others_refused_with_an_example(capsys):
    assert skinny_gemm.parse_cut("48x1x2x128") == Config(48, 1, 2, 128, 0)
    with pytest.raises(SystemExit):
        skinny_gemm.main(["--cuts", "48x1"])
    assert "such as 48x1x2x128" in capsys.readouterr().err


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter of GPU kernels needs JAX 0.11")
def test_it_measures_both_and_their_errors(tmp_path):
    argv = ["--interpret", "--rows", "8", "--only", "down", "--runs", "1", "--cuts", "16x1x1x64"]
    assert skinny_gemm.main([*argv, "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.json")
    results = json.loads(path.read_text())["results"]
    assert [r["cut"].split("=")[0] for r in results] == ["xla", "tile", "tile"]
    assert all(r["us"] > 0 and r["error"] < 1e-2 for r in results)
    assert "| down |" in path.with_suffix(".md").read_text()
