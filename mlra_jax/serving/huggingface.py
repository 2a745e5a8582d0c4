"""A model as a Hugging Face style folder, which serving engines load (`mlra-export`).

    config.json                    what engines read, and under `mlra_jax` what this package does
    model-0000I-of-0000N.safetensors, model.safetensors.index.json   the parameters (or all in model.safetensors)
    tokenizer.json, tokenizer_config.json, generation_config.json

Engines know one kind of attention cache: K and V of `num_key_value_heads` heads, each `head_dim` wide, split by head
over tensor parallelism. To them a model has one KV head for each latent head, whose K slot holds the latent and whose V
slot holds the rotary key, both padded to `head_dim`.

The parameters have the names and values of the training layout, each layer's its own: `layers.3.attention.w_kva`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from mlra_jax import checkpoints
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.attention.registry import attention_name
from mlra_jax.checkpoints import CheckpointError
from mlra_jax.config import ConfigError, MeshConfig, ModelConfig, TrainConfig, from_dict, to_dict
from mlra_jax.convert.files import open_weights, write_weights
from mlra_jax.data.tokenizers import get_tokenizer, json_description, json_vocabulary
from mlra_jax.errors import UserError
from mlra_jax.generation.load import decoding_model, read_onto
from mlra_jax.lazy_arrays import LazyStack, LazyTensor
from mlra_jax.model import Transformer
from mlra_jax.sharding import AxisRules, check_decode_layout
from mlra_jax.storage import whole_folder
from mlra_jax.textfiles import read_text

ARCHITECTURE, MODEL_TYPE = "MLRAForCausalLM", "mlra"
CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer.json"
OWN = "mlra_jax"
"""The key of config.json with what this package reads: parts of a `TrainConfig`."""
CHECKPOINT = "mlra_checkpoint"
"""The key of config.json that names the checkpoint to read parameters from, where the folder holds none."""
SLOT_UNIT = 128
"""`head_dim` is a multiple of this: the lanes of a TPU, for which the engines' pools are made."""


# Writing.


def engine_fields(config: ModelConfig) -> dict[str, Any]:
    """What config.json tells engines about a model."""
    widest = max(array.width for array in config.attention.cache_arrays().values())
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "torch_dtype": config.compute_dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.cached_heads,
        "head_dim": -(-widest // SLOT_UNIT) * SLOT_UNIT,
        "tie_word_embeddings": True,
    }


def describe(
    config: TrainConfig, *, tokenizer: str = "", max_len: int = 0, checkpoint: str = ""
) -> dict[str, str]:
    """The files of a folder besides its weights: their contents by name.

    Args:
      config: of the run that trained the model.
      tokenizer: see `get_tokenizer`; empty: the run's.
      max_len: tokens of a prompt with its completion that engines accept; 0: the run's `data.seq_len`.
      checkpoint: where engines read the parameters, if not in the folder: one step's folder.

    Raises:
      UserError: the tokenizer is not available.
      ConfigError: it has more ids than the model.
    """
    name = tokenizer or config.data.tokenizer
    found, description = get_tokenizer(name), json_description(name)
    if found.n_vocab > config.model.vocab_size:
        raise ConfigError(
            f"The tokenizer {name} has {found.n_vocab} ids, the model's vocabulary {config.model.vocab_size}; name the "
            "tokenizer that the model was trained with."
        )
    end_of_text = next(token for token, i in json_vocabulary(description).items() if i == found.eot_id)
    template = _chat_template(name)
    max_len = max_len or config.data.seq_len
    own = {
        "model": to_dict(config.model),
        "data": {
            "tokenizer": name if name in ("byte", "gpt2") else TOKENIZER_FILE,
            "seq_len": config.data.seq_len,
        },
    }
    ids = {"bos_token_id": found.eot_id, "eos_token_id": found.eot_id}
    files: dict[str, dict[str, Any]] = {
        CONFIG_FILE: {
            **engine_fields(config.model),
            "max_position_embeddings": max_len,
            **ids,
            "n_tokens": found.n_vocab,  # ids from here to vocab_size are padding, never to be sampled
            OWN: own,
            **({CHECKPOINT: checkpoint} if checkpoint else {}),
        },
        "generation_config.json": ids,
        TOKENIZER_FILE: description,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end_of_text,
            "pad_token": end_of_text,
            "model_max_length": max_len,
            "clean_up_tokenization_spaces": False,
            # In a text, what spells a special token is text, as in training; only a template writes special tokens.
            "split_special_tokens": template is None,
            **({} if template is None else {"chat_template": template}),
        },
    }
    return {name: json.dumps(content, indent=2, ensure_ascii=False) + "\n" for name, content in files.items()}


def _chat_template(tokenizer: str) -> Any:
    """The chat template beside a tokenizer's JSON file; None: there is none."""
    path = Path(tokenizer).expanduser()
    if tokenizer in ("byte", "gpt2") or not path.is_file():
        return None
    if (alone := path.with_name("chat_template.jinja")).is_file():
        return read_text(alone)
    if not (beside := path.with_name("tokenizer_config.json")).is_file():
        return None
    return _json_object(beside).get("chat_template")


def export(
    params: Mapping[str, Any],
    files: Mapping[str, str],
    out: str | os.PathLike[str],
    *,
    max_file_bytes: int = 4 * 10**9,
    progress: Callable[[int], object] = lambda n: None,
) -> None:
    """Writes a model's folder, which appears, or replaces the one that is there, once it is complete.

    Parameters are made one after the other, and at most one file of them is in memory.

    Args:
      params: nested dictionary of `LazyTensor`s and `LazyStack`s, as `mlra_jax.checkpoints.lazy_params` gives it.
      files: all else that is in the folder (`describe`).
      out: the local folder.
      max_file_bytes: size above which the parameters are split into several files.
      progress: called with the bytes of each parameter of a layer once it has been made.

    Raises:
      OSError: it cannot be written; names a path.
      CheckpointError: the parameters' checkpoint is damaged.
    """
    tensors: dict[str, LazyTensor] = {}
    for path, value in nnx.traversals.flatten_mapping(params, sep=".").items():
        if isinstance(value, LazyStack):
            rest = path.removeprefix("layers.")
            tensors |= {f"layers.{i}.{rest}": layer for i, layer in enumerate(value.layers)}
        else:
            tensors[path] = value
    with whole_folder(out) as partial:
        write_weights(partial, tensors, max_file_bytes=max_file_bytes, progress=progress)
        for name, content in files.items():
            (partial / name).write_text(content, encoding="utf-8")


# Reading.


@dataclasses.dataclass(frozen=True)
class Exported:
    """A folder of `export`, or of `describe` alone."""

    config: TrainConfig
    """What is known of the run that trained the model: the model, the tokenizer, the length of sequences."""
    n_tokens: int
    """Ids of the tokenizer; those from here on are padding of the vocabulary."""
    read: Callable[[dict[str, Any]], dict[str, Any]]
    """The parameters, laid out as its argument asks, of which each device reads only its own part."""


def is_exported(folder: str | os.PathLike[str]) -> bool:
    """Whether this is a folder that `export` wrote."""
    path = Path(folder).expanduser() / CONFIG_FILE
    return path.is_file() and OWN in _json_object(path)


def open_exported(folder: str | os.PathLike[str]) -> Exported:
    """Opens a folder of `export`; no parameters are read yet.

    Raises:
      UserError: it is not such a folder.
      ConfigError: the model is not legal, or of a later version.
    """
    folder = Path(folder).expanduser().absolute()
    described = _json_object(folder / CONFIG_FILE)
    if OWN not in described:
        raise UserError(f"{folder / CONFIG_FILE} was not written by mlra-export: it has no {OWN}.")
    config = from_dict(described[OWN])
    if config.data.tokenizer == TOKENIZER_FILE:
        data = dataclasses.replace(config.data, tokenizer=str(folder / TOKENIZER_FILE))
        config = dataclasses.replace(config, data=data)
    if checkpoint := described.get(CHECKPOINT):
        read = lambda abstract: checkpoints.load_params(checkpoint, abstract)
    else:
        read = lambda abstract: read_onto(lazy_params(folder, config.model), abstract)
    return Exported(config, described.get("n_tokens", config.model.vocab_size), read)


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"No file {path}; expected a folder that mlra-export wrote.")
    text = read_text(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object.")
    return content


def lazy_params(folder: str | os.PathLike[str], config: ModelConfig) -> dict[str, Any]:
    """The parameters of a folder, each read on demand: `LazyTensor`s, and `LazyStack`s under `layers`.

    Args:
      folder: of `export`.
      config: its model.

    Raises:
      FileNotFoundError: files are missing.
      UserError: files are broken.
      CheckpointError: they do not hold the model's parameters; every fault is listed.
    """
    flat: dict[str, Any] = {}
    layers: dict[str, dict[int, LazyTensor]] = {}
    for name, tensor in open_weights(folder).items():
        if found := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
            layers.setdefault(f"layers.{found[2]}", {})[int(found[1])] = tensor
        else:
            flat[name] = tensor
    for path, by_layer in layers.items():
        in_order = tuple(by_layer[i] for i in sorted(by_layer))
        if sorted(by_layer) != list(range(len(by_layer))) or len({x.shape for x in in_order}) > 1:
            raise CheckpointError(
                f"{folder} has {path} of the layers {sorted(by_layer)} alone, or not of one shape."
            )
        flat[path] = LazyStack(in_order)
    make = lambda: nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(0)), nnx.Param))
    wanted = nnx.traversals.flatten_mapping(jax.eval_shape(make), sep=".")
    checkpoints.check_shapes(f"The parameters in {folder}", flat, wanted)
    return nnx.traversals.unflatten_mapping({path: flat[path] for path in wanted}, sep=".")


def load(folder: str | os.PathLike[str], rules: AxisRules, mesh: Mesh) -> Transformer:
    """The model of a folder in the decode layout on an engine's mesh, with weights in the compute type.

    Each device reads only its own part. A float32 weight would be cast to the compute type at every step. Norm gains
    stay float32.

    Args:
      folder: of `export`.
      rules: the decoding table, in which `kv_head_shards` are split over the engine's axis of tensor parallelism.
      mesh: the engine's, with axes explicit or Auto.

    Raises:
      ConfigError: the model cannot be served, or not on so many devices; nothing has been read.
      UserError: see `open_exported` and `lazy_params`.
    """
    exported = open_exported(folder)
    config = exported.config.model
    check_served(config)
    with jax.set_mesh(mesh):
        size = {name: rules.size(name) for name in ("batch", "kv_head_shards", "heads")}
    check_decode_layout(config, MeshConfig(size["batch"], 1, size["kv_head_shards"], 1), size["heads"] > 1)
    config = dataclasses.replace(config, param_dtype=config.compute_dtype)
    return decoding_model(config, rules, mesh, exported.read)


def check_served(config: ModelConfig) -> None:
    """Refuses what engines cannot serve.

    Raises:
      ConfigError: the attention does not cache latent heads.
    """
    if not isinstance(config.attention, LatentAttentionConfig):
        raise ConfigError(
            f"Serving engines hold this package's latent heads in their pages (MLRA, MLA, GLA); the attention "
            f"{attention_name(type(config.attention))} has none. Generate with mlra-decode instead."
        )
