"""`mlra-convert`: imports and exports the paper's PyTorch weights, and turns an MLA into an MLRA to train further."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import jax
import tyro
from tqdm import tqdm

from mlra_jax import checkpoints
from mlra_jax.cli import command
from mlra_jax.config import OPTION, DataConfig, NotNegative, Positive, PositiveFloat, TrainConfig, Validated
from mlra_jax.convert import (
    lazy_params_from_official,
    model_config_from_official,
    official_from_model_config,
    official_from_params,
    open_weights,
    split_config,
    split_latents,
    write_weights,
)
from mlra_jax.errors import UserError
from mlra_jax.serving.huggingface import MODEL_TYPE, lazy_params, open_exported
from mlra_jax.storage import RUN_PROTOCOLS, check_storage, is_remote, whole_folder
from mlra_jax.textfiles import read_text

CONFIG_FILE = "config.json"


@dataclasses.dataclass(frozen=True)
class FromOfficialArgs:
    """Converts the weights of an official PyTorch model to a checkpoint without optimizer state.

    Weights are read one tensor at a time; PyTorch is not needed, and no code in the files is run. The checkpoint
    appears once it is complete.
    """

    weights: tyro.conf.Positional[str]
    """Model folder with config.json and pytorch_model*.bin or *.safetensors files, or a single file of weights."""
    out: str
    """Folder (or bucket URL) to create, for decode.py --checkpoint."""
    config: str = ""
    """JSON file with the official configuration; empty: config.json beside the weights."""
    model_type: str = ""
    """Official name of the model, such as mlra_4 or gqa_gated; empty: `model_type` in the configuration."""
    tokenizer: str = "gpt2"
    """Tokenizer of the model, recorded in the checkpoint; see data.tokenizer."""


@dataclasses.dataclass(frozen=True)
class ToOfficialArgs(Validated):
    """Exports a checkpoint's parameters as the weights of an official PyTorch model.

    OUT holds model.safetensors (several files and an index if larger than --max-file-gb) and config.json, and appears
    once it is complete.
    """

    at: ClassVar[str] = OPTION
    checkpoint: tyro.conf.Positional[str]
    """A run's folder (or bucket URL), or one of its checkpoints."""
    out: str
    """Local folder to create."""
    step: NotNegative | None = None
    """Step of the checkpoint; None: the latest."""
    with_head: bool = False
    """Write the token embedding a second time as lm_head.weight, as torch's strict load_state_dict expects."""
    max_file_gb: PositiveFloat = 5.0
    """Size in GB (10^9 bytes) above which the weights are split into several files; a file is in memory at once."""


@dataclasses.dataclass(frozen=True)
class FromExportArgs:
    """Converts a folder that mlra-export wrote to a checkpoint without optimizer state; parameters keep their bits."""

    folder: tyro.conf.Positional[str]
    """Folder with config.json, tokenizer.json and safetensors files; it stays the place of a tokenizer's file."""
    out: str
    """Folder (or bucket URL) to create, for decode.py --checkpoint."""


@dataclasses.dataclass(frozen=True)
class SplitLatentsArgs(Validated):
    """Turns an MLA (or GLA, or MLRA) into a model with more latent heads, to be trained further.

    Each latent head is split into equal pieces (docs/conversion.md): an MLA with --latent-heads 4 --branches 4 becomes
    an MLRA-4 of the same widths and q_lora_rank. OUT is a run without optimizer state; train it with
    `train.py OUT/config.json`.
    """

    at: ClassVar[str] = OPTION
    checkpoint: tyro.conf.Positional[str]
    """A run's folder (or bucket URL), or one of its checkpoints."""
    out: str
    """Folder (or bucket URL) to create."""
    latent_heads: Positive = 4
    """Latent heads of the new model; a multiple of the present number."""
    branches: Positive = 4
    """Branches of the new model: latent heads that each query head reads and sums; a multiple of the present number."""
    step: NotNegative | None = None
    """Step of the checkpoint; None: the latest."""
    key_scale: float | None = None
    """Scale of the branches' keys; None: the number of pieces of one latent head that a query head reads."""
    seed: NotNegative | None = 0
    """Seed of the random rotation that mixes the pieces; None: no mixing."""


@contextlib.contextmanager
def byte_progress(total: int, verb: str) -> Iterator[Callable[[int], object]]:
    """Shows a progress bar of `total` bytes on a terminal; yields a function to call with the bytes just done."""
    with tqdm(total=total, unit="B", unit_scale=True, desc=verb, disable=None) as bar:
        yield bar.update


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"No file {path}; name the official configuration with --config FILE.json.")
    text = read_text(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object with the fields of the official configuration.")
    return content


def _check_new_run(out: str) -> None:
    """Refuses a folder that already holds a checkpoint, or whose storage cannot be used."""
    check_storage(out, RUN_PROTOCOLS)
    with contextlib.suppress(checkpoints.CheckpointError):
        raise FileExistsError(f"{checkpoints.find_step(out)} exists; name another --out, or remove it.")


def new_folder(out: str) -> Path:
    """A local folder to make.

    Raises:
      FileExistsError: it exists.
      UserError: it is in a bucket.
    """
    if is_remote(out):
        raise UserError(f"--out {out} must be a local folder; copy it to the bucket afterwards.")
    path = Path(out).expanduser().absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists; name another --out, or remove it.")
    return path


def _save(out: str, params: dict, config: TrainConfig) -> None:
    """Writes a run's step 0 with a progress bar, and prints its place."""
    with byte_progress(sum(x.nbytes for x in jax.tree.leaves(params)), "writing") as progress:
        checkpoints.save_params(out, params, config, progress)
    print(out)


def _run_of(out: str, config: TrainConfig) -> TrainConfig:
    """Returns the configuration of a run in `out`, where `train.py OUT/config.json` trains."""
    folder = out if is_remote(out) else str(Path(out).expanduser().absolute())
    return dataclasses.replace(config, name=folder.rstrip("/").split("/")[-1], out=folder)


def from_official(args: FromOfficialArgs) -> None:
    """See `FromOfficialArgs`."""
    weights = Path(args.weights).expanduser()
    _check_new_run(args.out)
    tensors = open_weights(weights)
    beside = (weights if weights.is_dir() else weights.parent) / CONFIG_FILE
    official = _read_json(Path(args.config).expanduser() if args.config else beside)
    if official.get("model_type") == MODEL_TYPE:
        raise UserError(f"{weights} was written by mlra-export: use mlra-convert from-export.")
    model = model_config_from_official(official, args.model_type or None)
    data = DataConfig(tokenizer=args.tokenizer, seq_len=official.get("block_size", DataConfig().seq_len))
    config = _run_of(args.out, TrainConfig(model=model, data=data))
    config.validate()
    _save(args.out, lazy_params_from_official(tensors, model), config)


def to_official(args: ToOfficialArgs) -> None:
    """See `ToOfficialArgs`."""
    args.validate()
    out = new_folder(args.out)
    config = checkpoints.load_config(args.checkpoint, args.step)
    official = official_from_model_config(config.model, block_size=config.data.seq_len)
    params = checkpoints.lazy_params(args.checkpoint, args.step)
    tensors = official_from_params(params, config.model, with_head=args.with_head)
    with (
        whole_folder(out) as partial,
        byte_progress(sum(t.nbytes for t in tensors.values()), "writing") as progress,
    ):
        write_weights(partial, tensors, max_file_bytes=int(args.max_file_gb * 1e9), progress=progress)
        (partial / CONFIG_FILE).write_text(json.dumps(official, indent=2) + "\n")
    if "rope_scaling" in official:
        print(
            "note: the official code ignores rope_scaling in config.json: it computes without it.",
            file=sys.stderr,
        )
    print(out)


def from_export(args: FromExportArgs) -> None:
    """See `FromExportArgs`."""
    _check_new_run(args.out)
    exported = open_exported(args.folder)
    config = _run_of(args.out, exported.config)
    _save(args.out, lazy_params(args.folder, config.model), config)


def split(args: SplitLatentsArgs) -> None:
    """See `SplitLatentsArgs`."""
    args.validate()
    _check_new_run(args.out)
    config = checkpoints.load_config(args.checkpoint, args.step)
    split_config(config.model, args.latent_heads, args.branches)  # before anything is read
    params, model = split_latents(
        checkpoints.lazy_params(args.checkpoint, args.step),
        config.model,
        args.latent_heads,
        args.branches,
        key_scale=args.key_scale,
        seed=args.seed,
    )
    _save(args.out, params, _run_of(args.out, dataclasses.replace(config, model=model)))


@command
def main(argv: Sequence[str]) -> int:
    """Runs the conversion that the first argument names, and prints where the result is."""
    args = tyro.cli(
        Annotated[FromOfficialArgs, tyro.conf.subcommand("from-official")]
        | Annotated[ToOfficialArgs, tyro.conf.subcommand("to-official")]
        | Annotated[FromExportArgs, tyro.conf.subcommand("from-export")]
        | Annotated[SplitLatentsArgs, tyro.conf.subcommand("split-latents")],
        args=argv,
        prog="mlra-convert",
        description=(
            "Converts the paper's PyTorch weights to a checkpoint of this package and back, and what mlra-export "
            "wrote; turns an MLA into an MLRA."
        ),
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    match args:
        case FromOfficialArgs():
            from_official(args)
        case ToOfficialArgs():
            to_official(args)
        case FromExportArgs():
            from_export(args)
        case SplitLatentsArgs():
            split(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
