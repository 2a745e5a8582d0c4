"""`mlra-convert`: the paper's PyTorch weights, in and out; and an MLA turned into an MLRA, to be trained further."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import jax
import numpy as np
import tyro
from tqdm import tqdm

from mlra_jax import checkpoints
from mlra_jax.cli import command
from mlra_jax.config import OPTION, DataConfig, NotNegative, Positive, PositiveFloat, TrainConfig, Validated
from mlra_jax.convert import (
    LazyTensor,
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
from mlra_jax.storage import RUN_PROTOCOLS, check_storage, is_remote, whole_folder
from mlra_jax.textfiles import read_text

CONFIG_FILE = "config.json"


@dataclasses.dataclass(frozen=True)
class FromOfficialArgs:
    """Makes a checkpoint, without optimizer state, from the weights of an official PyTorch model.

    Weights are read tensor by tensor (PyTorch is not needed, and nothing in the files is run); the checkpoint appears
    when it is complete.
    """

    weights: tyro.conf.Positional[str]
    """The model's folder, with config.json and pytorch_model*.bin or *.safetensors files; or one file of weights."""
    out: str
    """Folder (or bucket URL) to make: what decode.py takes as --checkpoint."""
    config: str = ""
    """JSON file of the official configuration's fields; empty: config.json beside the weights."""
    model_type: str = ""
    """Official name of the model, such as mlra_4 or gqa_gated; empty: `model_type` in the configuration."""
    tokenizer: str = "gpt2"
    """Tokenizer of the model, noted in the checkpoint; see data.tokenizer."""


@dataclasses.dataclass(frozen=True)
class ToOfficialArgs(Validated):
    """Writes the parameters of a checkpoint as the weights of an official PyTorch model.

    OUT gets model.safetensors (several files and an index if it would be larger than --max-file-gb) and config.json,
    and appears when all are complete.
    """

    at: ClassVar[str] = OPTION
    checkpoint: tyro.conf.Positional[str]
    """A run's folder (or bucket URL), or one of its checkpoints."""
    out: str
    """Local folder to make."""
    step: NotNegative | None = None
    """Step of the checkpoint; None: the latest."""
    with_head: bool = False
    """Write the token matrix a second time as lm_head.weight, as torch's strict load_state_dict expects."""
    max_file_gb: PositiveFloat = 5.0
    """Size in GB (10^9 bytes) above which the weights are split into several files; a file is in memory at once."""


@dataclasses.dataclass(frozen=True)
class SplitLatentsArgs(Validated):
    """Turns an MLA (or GLA, or MLRA) into a model with more latent heads, to be trained further from there.

    Each latent head is cut into equal pieces (docs/conversion.md): an MLA with --latent-heads 4 --branches 4 becomes an
    MLRA-4 that keeps its widths and q_lora_rank. OUT is a run without optimizer state, which `train.py OUT/config.json`
    trains.
    """

    at: ClassVar[str] = OPTION
    checkpoint: tyro.conf.Positional[str]
    """A run's folder (or bucket URL), or one of its checkpoints."""
    out: str
    """Folder (or bucket URL) to make."""
    latent_heads: Positive = 4
    """Latent heads afterwards; a multiple of those before."""
    branches: Positive = 4
    """Latent heads that each query head reads and sums afterwards; a multiple of those before."""
    step: NotNegative | None = None
    """Step of the checkpoint; None: the latest."""
    key_scale: float | None = None
    """Factor of the branches' keys; None: pieces that a query head reads of one latent head."""
    seed: NotNegative | None = 0
    """Of the rotation that mixes the pieces; None: not mixed."""


@contextlib.contextmanager
def _progress(total: int, verb: str) -> Iterator[Callable[[int], object]]:
    """A bar of `total` bytes, on a terminal; what it gives is called with the bytes that are done."""
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
    """Refuses a folder that holds a checkpoint, or whose storage cannot be used."""
    check_storage(out, RUN_PROTOCOLS)
    with contextlib.suppress(checkpoints.CheckpointError):
        raise FileExistsError(f"{checkpoints.find_step(out)} exists; name another --out, or remove it.")


def _save(out: str, params: dict, config: TrainConfig) -> None:
    """Writes a run's step 0 with a bar, and prints where."""
    with _progress(sum(x.nbytes for x in jax.tree.leaves(params)), "writing") as progress:
        checkpoints.save_params(out, params, config, progress)
    print(out)


def _run_of(out: str, config: TrainConfig) -> TrainConfig:
    """The configuration of a run in `out`; `train.py OUT/config.json` trains there."""
    folder = out if is_remote(out) else str(Path(out).expanduser().absolute())
    return dataclasses.replace(config, name=folder.rstrip("/").split("/")[-1], out=folder)


def from_official(args: FromOfficialArgs) -> None:
    """See `FromOfficialArgs`."""
    weights = Path(args.weights).expanduser()
    _check_new_run(args.out)
    tensors = open_weights(weights)
    beside = (weights if weights.is_dir() else weights.parent) / CONFIG_FILE
    official = _read_json(Path(args.config).expanduser() if args.config else beside)
    model = model_config_from_official(official, args.model_type or None)
    data = DataConfig(tokenizer=args.tokenizer, seq_len=official.get("block_size", DataConfig().seq_len))
    config = _run_of(args.out, TrainConfig(model=model, data=data))
    config.validate()
    _save(args.out, lazy_params_from_official(tensors, model), config)


def to_official(args: ToOfficialArgs) -> None:
    """See `ToOfficialArgs`."""
    args.validate()
    out = Path(args.out).expanduser().absolute()
    if out.exists():
        raise FileExistsError(f"{out} exists; name another --out, or remove it.")
    config = checkpoints.load_config(args.checkpoint, args.step)
    official = official_from_model_config(config.model, block_size=config.data.seq_len)
    params = checkpoints.lazy_params(args.checkpoint, args.step)
    tensors = official_from_params(params, config.model, with_head=args.with_head)
    with (
        whole_folder(out) as partial,
        _progress(sum(t.nbytes for t in tensors.values()), "writing") as progress,
    ):

        def counted(tensor: LazyTensor) -> LazyTensor:
            def read() -> np.ndarray:
                values = np.asarray(tensor)
                progress(tensor.nbytes)
                return values

            return dataclasses.replace(tensor, read=read)

        counted_tensors = {name: counted(tensor) for name, tensor in tensors.items()}
        write_weights(partial, counted_tensors, max_file_bytes=int(args.max_file_gb * 1e9))
        (partial / CONFIG_FILE).write_text(json.dumps(official, indent=2) + "\n")
    print(out)


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
    """Converts as the first argument says, and prints where the result is."""
    args = tyro.cli(
        Annotated[FromOfficialArgs, tyro.conf.subcommand("from-official")]
        | Annotated[ToOfficialArgs, tyro.conf.subcommand("to-official")]
        | Annotated[SplitLatentsArgs, tyro.conf.subcommand("split-latents")],
        args=argv,
        prog="mlra-convert",
        description=(
            "Converts the paper's PyTorch weights to a checkpoint of this package, and back; turns an MLA into an MLRA."
        ),
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    match args:
        case FromOfficialArgs():
            from_official(args)
        case ToOfficialArgs():
            to_official(args)
        case SplitLatentsArgs():
            split(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
