"""What an earlier version saved: a run of it, and what it gave for that run, made before configurations had types.

`earlier/run.tar.xz` is a run of two steps, `earlier/expected.json` holds the losses of that version when it went on to
step 4, its greedy text after step 2, and the stored configurations of all families.
"""

import dataclasses
import json
import math
import tarfile

import pytest

from mlra_jax.attention.registry import BUILT_IN, attention_name
from mlra_jax.cli.configs import load_config
from mlra_jax.config import ExecutionConfig, MeshConfig, from_dict
from mlra_jax.generation.generator import Generator
from mlra_jax.training.loop import train


@pytest.fixture(scope="module")
def expected(repository):
    return json.loads((repository / "tests/training/earlier/expected.json").read_text())


@pytest.fixture
def run(repository, tmp_path):
    with tarfile.open(repository / "tests/training/earlier/run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "latent"


def test_configurations_without_types_are_read_and_say_how_a_step_runs_elsewhere(expected):
    assert expected["configs"].keys() == BUILT_IN.keys()
    for family, stored in expected["configs"].items():
        config = from_dict(stored)
        assert attention_name(type(config.model.attention)) == family
        assert dataclasses.asdict(config.model.attention).items() <= stored["model"]["attention"].items()
        form = "expanded" if family == "latent" else "auto"
        assert config.execution == ExecutionConfig(form, remat="dots", gather="layer")


def test_a_run_generates_the_same_text_and_trains_on_with_the_same_losses(expected, run):
    expected = expected["latent"]
    assert Generator.from_checkpoint(str(run)).generate("ROMEO:", max_new_tokens=12) == expected["text"]
    config = load_config(str(run / "config.json"))
    mesh = MeshConfig(data=2, tensor=2, context=2)
    result = train(dataclasses.replace(config, out=str(run), steps=4, mesh=mesh))
    losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [x for x in losses if x is not None] == pytest.approx(expected["losses"], rel=1e-5)
    assert math.isclose(result.eval_loss, expected["eval_loss"], rel_tol=1e-5)
