"""The images: what they copy is there, and what they install is pinned, to versions that the package allows.

And the scripts of docs/clusters.md that start a run again: they know the statuses with which it ends.
"""

import ast
import re
import shlex
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mlra_jax.config import CheckpointConfig

IMAGES = ("gpu", "tpu")


@pytest.fixture
def image(request, repository):
    """The instructions of a Dockerfile: (name, words)."""
    text = (repository / "containers" / f"{request.param}.Dockerfile").read_text()
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(line.split(" ")[0], shlex.split(line)[1:]) for line in lines if line.strip()]


@pytest.fixture
def pins(repository):
    """The version of each package in the constraints."""
    lines = (repository / "containers" / "constraints.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if not line.startswith("#")]
    assert [name for name, _ in found] == sorted({canonicalize_name(name) for name, _ in found})
    return {name: Version(version) for name, version in found}


@pytest.mark.parametrize("image", IMAGES, indirect=True)
def test_what_an_image_copies_is_there_and_not_ignored(image, repository):
    allowed = re.findall(r"^!(\S+)$", (repository / ".dockerignore").read_text(), re.MULTILINE)
    copied = [source for name, words in image if name == "COPY" for source in words[:-1]]
    assert {"mlra_jax", "configs", "pyproject.toml"} <= set(copied)
    assert not [path for path in copied if not (repository / path).exists()]
    assert not [path for path in copied if path.split("/")[0] not in allowed]
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    needed = [project["project"]["readme"], *project["project"]["license-files"]]
    assert set(needed) <= set(copied), "building the package needs them"


@pytest.mark.parametrize("image", IMAGES, indirect=True)
def test_an_image_installs_pinned_versions_that_the_package_allows(image, pins, repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    ((base,),) = [words for name, words in image if name == "FROM"]
    python = re.fullmatch(r"python:(\d+\.\d+\.\d+)-\S+", base)[1]
    assert Requirement(f"python{project['requires-python']}").specifier.contains(python)
    installed = [words for name, words in image if name == "RUN" and "pip" in words]
    assert len(installed) == 1
    for words in installed:
        assert words[:4] == ["pip", "install", "--constraint", "containers/constraints.txt"]
        extras = Requirement(f"mlra_jax{words[4].removeprefix('.')}").extras
        wanted = [line for extra in extras for line in project["optional-dependencies"][extra]]
        environment = {
            "python_version": python.rpartition(".")[0],
            "sys_platform": "linux",
            "platform_machine": "x86_64",
        }
        for requirement in map(Requirement, [*project["dependencies"], *wanted]):
            if requirement.marker is None or requirement.marker.evaluate(environment):
                assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
    entry = next(words for name, words in image if name == "CMD")
    assert entry[0].strip("[,") in project["scripts"]


def test_the_pins_of_jax_and_its_plugins_belong_together(pins):
    for name in ("jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt"):
        assert pins[name] == pins["jax"]


STOPPED, REFUSED = CheckpointConfig().stop_status, 2


@pytest.fixture
def blocks(repository):
    """`blocks(language)`: the code of that language in docs/clusters.md."""
    page = (repository / "docs" / "clusters.md").read_text()
    return lambda language: re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def test_the_jobs_of_kubernetes_restart_a_run_that_was_stopped_without_counting_it(blocks):
    made = [
        d for block in blocks("yaml") for d in yaml.safe_load_all(block) if d["kind"] in ("Job", "JobSet")
    ]
    assert sorted(d["kind"] for d in made) == ["Job", "JobSet"]
    for d in made:
        jobs = (
            [r["template"]["spec"] for r in d["spec"]["replicatedJobs"]]
            if d["kind"] == "JobSet"
            else [d["spec"]]
        )
        for job in jobs:
            pod, rules = job["template"]["spec"], job["podFailurePolicy"]["rules"]
            assert pod["restartPolicy"] == "Never"  # Kubernetes wants it with a podFailurePolicy
            (container,) = pod["containers"]
            codes = {}
            for rule in rules:
                if on := rule.get("onExitCodes"):
                    assert (on["containerName"], on["operator"]) == (container["name"], "In")
                    codes |= dict.fromkeys(on["values"], rule["action"])
            assert any(on["type"] == "DisruptionTarget" for r in rules for on in r.get("onPodConditions", []))
            if d["kind"] == "Job":
                assert codes == {STOPPED: "Ignore", REFUSED: "FailJob"}
                assert job["backoffLimit"] >= job["parallelism"]
            else:  # its reason is PodFailurePolicy, any other failure's is not
                assert codes == {STOPPED: "FailJob"}
                assert job["backoffLimit"] == 0
                (rule,) = d["spec"]["failurePolicy"]["rules"]
                assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
                assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"


def test_the_other_launchers_know_the_status_of_a_run_that_was_stopped(blocks):
    scripts = blocks("bash")
    (slurm,) = [script for script in scripts if "#SBATCH" in script]
    assert re.search(rf"-eq {STOPPED} \]; then\n  scontrol requeue \$SLURM_JOB_ID", slurm)
    assert slurm.rstrip().endswith("exit $status")
    (xpk,) = [script for script in scripts if "xpk workload create" in script]
    assert str(STOPPED) in re.search(r"--restart-on-exit-codes (\S+)", xpk)[1].split(",")
    (ray,) = blocks("python")
    names = {
        target.id: value.value
        for node in ast.parse(ray).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
        for target, value in zip(node.targets[0].elts, node.value.elts, strict=True)
    }
    assert (names["STOPPED"], names["REFUSED"]) == (STOPPED, REFUSED)
