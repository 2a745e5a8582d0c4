"""`mlra-convert from-official` and `to-official`: the paper's PyTorch weights, in and out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from flax import nnx
from tqdm import tqdm

from mlra_jax.cli import command
from mlra_jax.config import DataConfig, TrainConfig
from mlra_jax.convert import (
    LazyTensor,
    model_config_from_official,
    official_from_model_config,
    official_from_params,
    open_safetensors,
    params_from_official,
    write_safetensors,
)
from mlra_jax.models import Transformer
from mlra_jax.training import checkpoints

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


@dataclasses.dataclass(frozen=True)
class FromOfficialArgs:
    """Makes a checkpoint, without optimizer state, from the weights of an official PyTorch model.

    Weights are read tensor by tensor; the checkpoint appears when it is complete.
    """

    weights: tyro.conf.Positional[str]
    """A .safetensors file, or a folder of them, with the official names."""
    out: str
    """Folder (or bucket URL) to make: what decode.py takes as --checkpoint."""
    config: str = ""
    """JSON file of the official configuration's fields; empty: config.json beside the weights."""
    model_type: str = ""
    """Official name of the model, such as mlra_4 or gqa_gated; empty: `model_type` in the configuration."""
    tokenizer: str = "gpt2"
    """Tokenizer of the model, noted in the checkpoint; see data.tokenizer."""


@dataclasses.dataclass(frozen=True)
class ToOfficialArgs:
    """Writes the parameters of a checkpoint as the weights of an official PyTorch model.

    OUT gets model.safetensors and config.json, and appears when both are complete.
    """

    checkpoint: tyro.conf.Positional[str]
    """A run's folder (or bucket URL), or one of its checkpoints."""
    out: str
    """Local folder to make."""
    step: int | None = None
    """Step of the checkpoint; None: the latest."""
    with_head: bool = False
    """Write the token matrix a second time as lm_head.weight, as torch's strict load_state_dict expects."""


def _progress(tensors: Mapping[str, LazyTensor], verb: str) -> tuple[dict[str, LazyTensor], tqdm]:
    """The same tensors, and a bar that counts the bytes of those read."""
    size = lambda t: int(np.prod(t.shape)) * t.dtype.itemsize
    bar = tqdm(total=sum(map(size, tensors.values())), unit="B", unit_scale=True, desc=verb, disable=None)

    def counted(tensor: LazyTensor) -> LazyTensor:
        def read() -> np.ndarray:
            values = np.asarray(tensor)
            bar.update(size(tensor))
            return values

        return dataclasses.replace(tensor, read=read)

    return {name: counted(tensor) for name, tensor in tensors.items()}, bar


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"No file {path}; name the official configuration with --config FILE.json.")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object with the fields of the official configuration.")
    return content


def from_official(args: FromOfficialArgs) -> None:
    """See `FromOfficialArgs`."""
    weights = Path(args.weights).expanduser()
    tensors = open_safetensors(weights)
    beside = (weights if weights.is_dir() else weights.parent) / CONFIG_FILE
    official = _read_json(Path(args.config).expanduser() if args.config else beside)
    model = model_config_from_official(official, args.model_type or None)
    seq_len = official.get("block_size", DataConfig().seq_len)
    config = TrainConfig(
        name=Path(args.out).name, model=model, data=DataConfig(tokenizer=args.tokenizer, seq_len=seq_len)
    )
    config.validate()
    with contextlib.suppress(checkpoints.CheckpointError):
        raise FileExistsError(f"{checkpoints.find_step(args.out)} exists; name another --out, or remove it.")
    tensors, bar = _progress(tensors, "reading")
    with bar:
        params = params_from_official(tensors, model)
    checkpoints.save_params(args.out, params, config)
    print(args.out)


def to_official(args: ToOfficialArgs) -> None:
    """See `ToOfficialArgs`."""
    out = Path(args.out).expanduser().absolute()
    if out.exists():
        raise FileExistsError(f"{out} exists; name another --out, or remove it.")
    config = checkpoints.load_config(args.checkpoint, args.step)
    official = official_from_model_config(config.model, block_size=config.data.seq_len)
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = nnx.state(nnx.eval_shape(lambda: Transformer(config.model, rngs=nnx.Rngs(0))), nnx.Param)
    on_host = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host)
    params = checkpoints.load_params(
        args.checkpoint, jax.tree.map(on_host, nnx.to_pure_dict(state)), args.step
    )
    tensors, bar = _progress(official_from_params(params, config.model, with_head=args.with_head), "writing")
    unfinished = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        with bar:
            write_safetensors(unfinished / WEIGHTS_FILE, tensors)
        (unfinished / CONFIG_FILE).write_text(json.dumps(official, indent=2) + "\n")
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(out)


@command
def main(argv: Sequence[str]) -> int:
    """Converts in the direction that the first argument says, and prints where the result is."""
    args = tyro.cli(
        Annotated[FromOfficialArgs, tyro.conf.subcommand("from-official")]
        | Annotated[ToOfficialArgs, tyro.conf.subcommand("to-official")],
        args=argv,
        prog="mlra-convert",
        description="Converts the paper's PyTorch weights to a checkpoint of this package, and back.",
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    if isinstance(args, FromOfficialArgs):
        from_official(args)
    else:
        to_official(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
