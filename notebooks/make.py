"""Makes the .ipynb beside each script of this folder: `python notebooks/make.py`.

The scripts are the source, in jupytext's percent format: `# %%` begins a cell of code, `# %% [markdown]` one of text.
A notebook is its script's cells, with the Colab badge at the end of the first, which is the title, and after it the
cell that installs the package.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

REPOSITORY = "mlra-jax/mlra_jax"
"""Owner and name on GitHub: badges open the notebooks from there, and notebooks install the package from there. If
it is published elsewhere, this line and the README's badges change (tests compare them)."""
BRANCH = "main"

INSTALL = """\
# Installs the package, and JAX for the accelerator that is there. If Colab then asks to restart the session, do.
import importlib.util
import pathlib
import shutil
import subprocess
import sys

if importlib.util.find_spec("mlra_jax") is None:
    source = "git+https://github.com/{repository}@{branch}"
    packages = [f"mlra_jax[gpt2] @ {{source}}", "huggingface_hub"]
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = int(subprocess.check_output(query, text=True).split(".")[0])
        packages.append("jax[cuda13]" if driver >= 580 else "jax[cuda12]")  # 580: the first driver for CUDA 13
    elif any(pathlib.Path("/dev").glob("accel[0-9]*")) or pathlib.Path("/dev/vfio/0").exists():
        packages.append("jax[tpu]")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)"""


def badge(name: str) -> str:
    """Markdown of the badge that opens the notebook `name` (without suffix) in Colab."""
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    url = f"https://colab.research.google.com/github/{REPOSITORY}/blob/{BRANCH}/notebooks/{name}.ipynb"
    return f"[![Open in Colab]({image})]({url})"


def cells(script: str) -> list[tuple[str, str]]:
    """The script's cells, each as (`code` or `markdown`, its text).

    Raises:
      ValueError: there is no first cell of markdown, or a line of markdown is no comment.
    """
    marker = re.compile(r"^# %%(?: \[(markdown)\])?\n", re.MULTILINE)
    _, *parts = marker.split(script)
    found = []
    for kind, text in zip(parts[::2], parts[1::2], strict=True):
        lines = text.strip("\n").split("\n")
        if kind:
            if wrong := [line for line in lines if line != "#" and not line.startswith("# ")]:
                raise ValueError(f"A line of a markdown cell must begin with `# `: {wrong[0]!r}.")
            lines = [line[2:] for line in lines]
        found.append((kind or "code", "\n".join(lines)))
    if not found or found[0][0] != "markdown":
        raise ValueError("A notebook's script must begin with a markdown cell that holds its title.")
    return found


def notebook(name: str, script: str) -> dict[str, Any]:
    """The notebook of a script, as nbformat 4.5 has it in JSON.

    Args:
      name: of the notebook, without suffix.
      script: text of the script.
    """
    (_, title), *rest = cells(script)
    install = INSTALL.format(repository=REPOSITORY, branch=BRANCH)
    all_cells = [("markdown", f"{title}\n\n{badge(name)}"), ("code", install), *rest]

    def cell(i: int, kind: str, text: str) -> dict[str, Any]:
        common = {"cell_type": kind, "id": f"cell-{i}", "metadata": {}}
        source = text.splitlines(keepends=True)
        return (
            common | ({"execution_count": None, "outputs": []} if kind == "code" else {}) | {"source": source}
        )

    return {
        "cells": [cell(i, *c) for i, c in enumerate(all_cells)],
        "metadata": {
            "accelerator": "GPU",
            "colab": {"name": f"{name}.ipynb", "provenance": []},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def dump(content: dict[str, Any]) -> str:
    """The text of a notebook's file."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def sources() -> list[Path]:
    """The scripts that notebooks are made of."""
    return [path for path in sorted(Path(__file__).parent.glob("*.py")) if path.name != Path(__file__).name]


if __name__ == "__main__":
    for path in sources():
        made = path.with_suffix(".ipynb")
        made.write_text(dump(notebook(path.stem, path.read_text())))
        print(made)
