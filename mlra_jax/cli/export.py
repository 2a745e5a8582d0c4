"""`mlra-export CHECKPOINT --out DIR`: a model as a Hugging Face style folder, for serving engines."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import ClassVar

import jax
import tyro

from mlra_jax import checkpoints
from mlra_jax.cli import command
from mlra_jax.cli.convert import byte_progress, new_folder
from mlra_jax.config import OPTION, NotNegative, PositiveFloat, Validated
from mlra_jax.serving.huggingface import describe, export


@dataclasses.dataclass(frozen=True)
class ExportArgs(Validated):
    """Writes a checkpoint's model as a Hugging Face style folder, which vLLM and sglang-jax serve.

    OUT holds config.json, safetensors files with the parameters as they are stored, tokenizer.json,
    tokenizer_config.json and generation_config.json. It appears once it is complete. mlra-convert from-export reads it
    back.
    """

    at: ClassVar[str] = OPTION
    checkpoint: tyro.conf.Positional[str]
    """A run's folder (or bucket URL), or one of its checkpoints."""
    out: str
    """Local folder to create."""
    step: NotNegative | None = None
    """Step of the checkpoint; None: the latest."""
    tokenizer: str = ""
    """Tokenizer of the model (see data.tokenizer); empty: the one that the run was trained with."""
    max_len: NotNegative = 0
    """Tokens of a prompt and its completion that engines accept; 0: the length of the training sequences."""
    max_file_gb: PositiveFloat = 4.0
    """Size in GB (10^9 bytes) above which the weights are split into several files; a file is in memory at once."""


@command
def main(argv: Sequence[str]) -> int:
    """Writes the folder, and prints its place."""
    args = tyro.cli(ExportArgs, args=argv, prog="mlra-export")
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    args.validate()
    out = new_folder(args.out)
    config = checkpoints.load_config(args.checkpoint, args.step)
    files = describe(config, tokenizer=args.tokenizer, max_len=args.max_len)
    params = checkpoints.lazy_params(args.checkpoint, args.step)
    with byte_progress(sum(x.nbytes for x in jax.tree.leaves(params)), "writing") as progress:
        export(params, files, out, max_file_bytes=int(args.max_file_gb * 1e9), progress=progress)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
