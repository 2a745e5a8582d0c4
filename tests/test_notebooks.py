"""The notebooks: equal to their scripts, which run from top to bottom in their quick form on a CPU."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

NAMES = ("attention_as_a_library", "mlra_in_ten_minutes", "official_weights")
SHOWN = {
    # What a script prints if it came to its end, and only then.
    "attention_as_a_library": ("decoding agrees with the whole sequence", "reference    takes it"),
    "mlra_in_ten_minutes": ("MLRA-4      576    320    192    192", "after 3 steps", "bytes of cache for"),
    "official_weights": ("24 cached values", "equal, number for number", "bytes of cache for"),
}
"""In the order in which it is printed."""


@pytest.fixture(scope="module")
def make(repository):
    """The module `notebooks/make.py`."""
    spec = importlib.util.spec_from_file_location("notebooks_make", repository / "notebooks" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_script_has_its_notebook_and_every_notebook_its_script(make, repository):
    assert tuple(path.stem for path in make.sources()) == NAMES
    assert tuple(sorted(path.stem for path in (repository / "notebooks").glob("*.ipynb"))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_what_its_script_makes(make, repository, name):
    script = (repository / "notebooks" / f"{name}.py").read_text()
    stored = (repository / "notebooks" / f"{name}.ipynb").read_text()
    assert stored == make.dump(make.notebook(name, script)), "Run python notebooks/make.py."


@pytest.mark.parametrize("name", NAMES)
def test_notebook_opens_with_badge_install_cell_and_mesh(make, repository, name):
    title, install, first, *rest = json.loads((repository / "notebooks" / f"{name}.ipynb").read_text())[
        "cells"
    ]
    text = lambda cell: "".join(cell["source"])
    assert [cell["cell_type"] for cell in (title, install, first)] == ["markdown", "code", "code"]
    assert text(title).startswith("# ")
    assert text(title).endswith(make.badge(name))
    assert '"pip", "install"' in text(install)
    assert not any("pip" in text(cell) and "install" in text(cell) for cell in rest)
    assert "\nmesh = " in text(first)
    assert make.badge(name) in (repository / "README.md").read_text()
    for cell in (install, first, *rest):
        if cell["cell_type"] == "code":
            compile(text(cell), name, "exec")


@pytest.mark.parametrize("name", NAMES)
def test_every_relative_link_of_a_notebook_leads_somewhere(make, repository, name):
    folder = repository / "notebooks"
    text = "\n".join(
        text for kind, text in make.cells((folder / f"{name}.py").read_text()) if kind == "markdown"
    )
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert links
    assert not [link for link in links if not (folder / link).exists()]


def test_scripts_that_are_no_notebook_are_refused(make):
    with pytest.raises(ValueError, match="must begin with a markdown cell"):
        make.cells("# %%\nx = 1\n")
    with pytest.raises(ValueError, match="must begin with `# `"):
        make.cells("# %% [markdown]\n# Title\nx = 1\n")


@pytest.mark.parametrize("name", NAMES)
def test_script_runs_from_top_to_bottom(repository, environment, tmp_path, name):
    source = (repository / "notebooks" / f"{name}.py").read_text()
    assert source.count("QUICK = False") == 1
    script = tmp_path / f"{name}.py"
    script.write_text(source.replace("QUICK = False", "QUICK = True"))
    settings = environment(1) | {
        "PYTHONPATH": str(repository),
        "MPLBACKEND": "agg",
    }  # one device, as in Colab
    if "XLA_FLAGS" in source:
        del settings["XLA_FLAGS"]  # the script asks for more devices
    # matplotlib warns that this backend shows nothing.
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    places = [done.stdout.find(text) for text in SHOWN[name]]
    assert -1 not in places, done.stdout
    assert places == sorted(places)
