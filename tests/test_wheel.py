"""What a user who installs the wheel gets, checked on a wheel built from this checkout."""

import configparser
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

COMMANDS = (
    "convert",
    "decode",
    "describe",
    "evaluate",
    "export",
    "plan",
    "plot",
    "prepare",
    "serve",
    "train",
)


@pytest.fixture(scope="module")
def site(repository, tmp_path_factory) -> Path:
    """The wheel, unpacked into an otherwise empty folder as pip does into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=repository, check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run_from_wheel(site: Path, code: str) -> str:
    """The output of `code` in a process that finds the package in the wheel and not in the checkout."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=site.parent,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def files(folder: Path) -> set[str]:
    return {
        str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts
    }


def test_wheel_holds_every_file_of_the_package_and_the_configurations_and_no_other(site, repository):
    expected = files(repository / "mlra_jax") | {f"configs/{f}" for f in files(repository / "configs")}
    assert files(site / "mlra_jax") == expected
    assert {p.name for p in site.iterdir() if p.suffix != ".dist-info"} == {"mlra_jax"}


def test_configurations_are_found_by_name_outside_the_checkout(site):
    code = "import mlra_jax; from mlra_jax.cli.configs import *; print(mlra_jax.__file__, load_config('mlra_4').name)"
    assert run_from_wheel(site, code) == f"{site}/mlra_jax/__init__.py mlra_4"


def test_every_console_command_of_the_wheel_prints_its_help(site):
    entries = configparser.ConfigParser()
    (metadata,) = site.glob("*.dist-info")
    entries.read(metadata / "entry_points.txt")
    scripts = dict(entries["console_scripts"])
    assert sorted(scripts) == [f"mlra-{command}" for command in COMMANDS]
    plugin = entries["vllm.general_plugins"]["mlra_jax"]  # without vLLM it does nothing
    code = f"""
import importlib, sys
module, function = {plugin.split(":")}
getattr(importlib.import_module(module), function)()
for name, target in {scripts}.items():
    module, function = target.split(":")
    sys.argv = [name, "--help"]
    try:
        sys.exit(getattr(importlib.import_module(module), function)())
    except SystemExit as e:
        print(name, "ended with", e.code)
"""
    shown = run_from_wheel(site, code)
    assert re.findall("^usage: (\\S+)", shown, re.MULTILINE) == list(scripts)
    assert re.findall("^(\\S+) ended with (?:0|None)$", shown, re.MULTILINE) == list(scripts)
