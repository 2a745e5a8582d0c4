"""The data of the tasks beside this file, for lm-evaluation-harness: JSON lines as a data set without a download."""

import json
from pathlib import Path
from typing import Any

import datasets


def load(file: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The lines of `file`, which is in this folder, as the split `test`."""
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
