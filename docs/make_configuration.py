"""Writes docs/configuration.md from the dataclasses of the configuration and the texts below their fields.

python docs/make_configuration.py
"""

import ast
import dataclasses
import inspect
import itertools
import pathlib
import typing
from typing import Any

from mlra_jax import config
from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.attention.tensor_product import TensorProductAttentionConfig
from mlra_jax.attention.tied import TiedAttentionConfig
from mlra_jax.distributed import DistributedConfig

PAGE = pathlib.Path(__file__).with_name("configuration.md")

INTRODUCTION = """\
# Configuration

<!-- Written by docs/make_configuration.py from the code: change the texts there, then run it. -->

A run is one `TrainConfig`: plain data, checked as a whole before anything starts. A file of `configs/` makes
one, and every field is an option of `train.py`, `mlra-train` and `mlra-plan`:

    python train.py configs/tiny.py --steps 500 --optim.lr 1e-3 --mesh.data 1 --model.attention.kv_lora_rank 64

`python train.py configs/tiny.py --help` lists the options with their values in that file. Options may be
written with `_` or `-`. A switch is turned on by its name, and off by its name with `no-` before the last part:
`--data.verify`, `--log.no-tensorboard`. The resolved configuration is in the run's folder as `config.json`,
which is a CONFIG too: `python train.py runs/tiny/config.json`.

You can write your own file, in Python, starting from another one:

```python
import dataclasses

from mlra_jax.cli.configs import load_config


def get_config():
    base = load_config("tiny")
    return dataclasses.replace(base, name="mine", optim=dataclasses.replace(base.optim, lr=1e-3))
```

The defaults below are those of the classes; a file of `configs/` may set others. Derived quantities (the width of
a latent head, the number of micro-batches) are not fields. Letters are those of [notation.md](notation.md).
"""

ATTENTION = """\
A configuration file chooses the attention by the class of `model.attention`; command-line options change its
sizes. [attention.md](attention.md) has the equations, and the sizes of each of the paper's runs.
"""

DISTRIBUTED = """\
These options say how a process finds the others, and are not stored with the run. `decode.py` takes them too.
[clusters.md](clusters.md) says where they are needed.
"""

SECTIONS = (
    ("The run", "", config.TrainConfig, ""),
    ("Model", "model.", config.ModelConfig, ""),
    ("Attention: MLA, GLA, MLRA", "model.attention.", LatentAttentionConfig, ATTENTION),
    ("Attention: MHA, GQA, MQA, MFA", "model.attention.", GroupedAttentionConfig, ""),
    ("Attention: GTA", "model.attention.", TiedAttentionConfig, ""),
    ("Attention: TPA", "model.attention.", TensorProductAttentionConfig, ""),
    ("Execution", "execution.", config.ExecutionConfig, ""),
    ("Mesh", "mesh.", config.MeshConfig, ""),
    ("Data", "data.", config.DataConfig, ""),
    ("Optimizer", "optim.", config.OptimConfig, ""),
    ("Checkpoints", "checkpoint.", config.CheckpointConfig, ""),
    ("Metrics", "log.", config.LogConfig, ""),
    ("Several processes", "distributed.", DistributedConfig, DISTRIBUTED),
)
"""Heading, prefix of the options, class, what else is to be said."""


def field_texts(cls: type) -> dict[str, str]:
    """The text below each field of a dataclass, on one line."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    texts = {}
    body = definition.body
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            texts[field.target.id] = " ".join(text.value.value.split())
    return texts


def shown_type(of: Any) -> str:
    """What may be given for a field: its choices, or the name of its type and its range."""
    if typing.get_origin(of) is typing.Annotated:
        kind, *marks = typing.get_args(of)
        return " ".join([shown_type(kind), *(str(mark) for mark in marks if isinstance(mark, config.Range))])
    if typing.get_origin(of) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(of))
    return {bool: "switch", str: "text", int: "integer", float: "number"}[of]


def shown_default(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`" if value != "" else "empty"


def section(heading: str, prefix: str, cls: type, remark: str) -> str:
    """A heading, what the class is, and a table of its options."""
    texts, hints = field_texts(cls), typing.get_type_hints(cls, include_extras=True)
    lines = [f"## {heading}", "", f"`{cls.__name__}`. {inspect.getdoc(cls)}", ""]
    lines += [*remark.splitlines(), ""] if remark else []
    lines += ["| option | value | default | |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) or hint is config.AttentionConfig:
            continue  # a part, with a section of its own
        text = texts[field.name].replace("|", "\\|")
        option, default = f"--{prefix}{field.name}", shown_default(field.default)
        lines.append(f"| `{option}` | {shown_type(hint)} | {default} | {text} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole of docs/configuration.md."""
    return "\n".join([INTRODUCTION, *(section(*s) for s in SECTIONS)])


if __name__ == "__main__":
    PAGE.write_text(page())
