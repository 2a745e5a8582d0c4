"""Loading a checkpoint's model onto a mesh; each device reads only its part of the parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlra_jax.checkpoints import load_config, load_params
from mlra_jax.config import ConfigError, MeshConfig, ModelConfig, TrainConfig, require
from mlra_jax.data.tokenizers import Tokenizer, get_tokenizer
from mlra_jax.lazy_arrays import LazyStack, LazyTensor
from mlra_jax.model import Transformer, from_params, to_decode
from mlra_jax.model.layers import Layout
from mlra_jax.sharding import (
    TRAIN_RULES,
    AxisRules,
    check_decode_layout,
    decode_rules,
    make_mesh,
    train_layout_faults,
)

ParamDtype = Literal["auto", "float32", "bfloat16"]
SplitHeads = Literal["auto", "yes", "no"]

ONE_DEVICE = MeshConfig(data=1)


def decode_devices(mesh: MeshConfig) -> list[jax.Device]:
    """The devices of a mesh of these sizes: as many as it needs, from the first on, or all if a size is -1.

    Raises:
      ConfigError: there are too few devices, or a process would have none of them.
    """
    mesh.validate()
    sizes = dataclasses.asdict(mesh)
    devices = jax.devices()
    if -1 in sizes.values():
        return devices
    n = math.prod(sizes.values())
    shown = " x ".join(f"{k}={v}" for k, v in sizes.items() if v > 1) or "one device"
    if n > len(devices):
        platform = devices[0].platform
        hint = (
            f"; simulate them with XLA_FLAGS=--xla_force_host_platform_device_count={n} in the environment"
            if platform == "cpu"
            else ""
        )
        raise ConfigError(f"A mesh of {shown} needs {n} devices; JAX sees {len(devices)} ({platform}){hint}.")
    if jax.process_count() > 1 and n != len(devices):
        raise ConfigError(
            f"A mesh of {shown} uses {n} of {len(devices)} devices; with {jax.process_count()} processes it must "
            "use all of them."
        )
    return devices[:n]


MORE_BYTES = 32e6
"""Bytes of W_qb and W_o that a GPU may read in addition per layer to save two exchanges (some 20 us on two H100s)."""


def splits_heads(choice: SplitHeads, config: ModelConfig, tensor: int, platform: str) -> bool:
    """Whether the query heads of W_qb and W_o are split over `tensor` devices (`mlra_jax.sharding.decode_rules`).

    Args:
      choice: auto: yes, except on GPUs where query heads read several latent heads and reading all of W_qb and W_o
        costs little (docs/decoding.md).
      config: the model's configuration.
      tensor: devices over which the latent heads are split.
      platform: JAX's name of the devices' platform.
    """
    if choice != "auto":
        return choice == "yes"
    if platform not in ("gpu", "cuda") or config.attention.n_branches == 1:
        return True
    make = lambda: config.attention.module()(config, rngs=nnx.Rngs(0), layout="decode")
    params = nnx.to_flat_state(nnx.state(nnx.eval_shape(make), nnx.Param))
    by_head = [x for _, x in params if "heads" in x.get_metadata("out_sharding")]
    values = sum(math.prod(x.get_value().shape) for x in by_head)
    return values * jnp.dtype(config.compute_dtype).itemsize * (1 - 1 / tensor) > MORE_BYTES


def abstract_params(config: ModelConfig, rules: AxisRules, mesh: Mesh) -> dict[str, Any]:
    """Shapes of the stored parameters (the training layout), and how they are split over `mesh` while they are read.

    Parameters that become KV-head shards only later are not split by the decoding table yet. They are split over the
    same mesh axes along their longest axis that divides, so that no device reads more than its share. Norm gains stay
    float32.
    """
    make = lambda: nnx.state(Transformer(config, rngs=nnx.Rngs(0), rules=rules), nnx.Param)
    with jax.set_mesh(mesh):
        params = nnx.to_flat_state(jax.eval_shape(make))  # `nnx.eval_shape` knows explicit axes alone
        specs = {path: rules.spec(*x.get_metadata("out_sharding")) for path, x in params}
        axes, parts = rules.mesh_axes("kv_head_shards"), rules.size("kv_head_shards")

    def leaf(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name, spec = path[-1], specs[path]
        # [layers, J, N, C, H]: J and N are regrouped into KV-head shards.
        by_branch = name in config.attention.module().branch_weights
        fitting = [i for i in range(3 if by_branch else 0, x.ndim) if x.shape[i] % parts == 0]
        if parts > 1 and (by_branch or all(axis is None for axis in spec)):
            longest = max(fitting, key=lambda i: x.shape[i], default=None)
            spec = PartitionSpec() if longest is None else PartitionSpec(*[None] * longest, axes)
        dtype = "float32" if name == "gain" else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=NamedSharding(mesh, spec))

    return nnx.traversals.unflatten_mapping({path: leaf(path, x.get_value()) for path, x in params})


def read_onto(params: dict[str, Any], abstract: dict[str, Any]) -> dict[str, Any]:
    """Lazy parameters as arrays on a mesh, of each of which a device reads only its own part.

    At most one parameter at a time, of this process's devices, is in the host's memory.

    Args:
      params: nested dictionary of `LazyTensor`s and `LazyStack`s.
      abstract: the same of `jax.ShapeDtypeStruct` with concrete shardings; values are converted to its types.
    """

    def read(x: LazyTensor | LazyStack, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        part = lambda index: x.part(index).astype(wanted.dtype, copy=False)
        array = jax.make_array_from_callback(wanted.shape, wanted.sharding, part)
        return jax.block_until_ready(array)  # before the host's copy of the next one is made

    return jax.tree.map(read, params, abstract)


def decoding_model(
    config: ModelConfig, rules: AxisRules, mesh: Mesh, read: Callable[[dict[str, Any]], dict[str, Any]]
) -> Transformer:
    """The decode-layout model on any mesh, from parameters that each device reads only its own part of.

    Args:
      config: the model's configuration; its `param_dtype` is the type in which weights are held.
      rules: the decoding table, which names the axes of `mesh`.
      mesh: with axes of either kind, explicit or Auto.
      read: the stored parameters (the training layout), laid out as `abstract_params` asks.
    """
    params = read(abstract_params(config, rules, mesh))
    with jax.set_mesh(mesh):
        return to_decode(config, params, rules, donate=True)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint's model with its configuration, tokenizer and mesh."""

    config: TrainConfig
    """Configuration of the run that wrote the checkpoint."""
    tokenizer: Tokenizer
    """The model's tokenizer."""
    mesh: Mesh
    """The mesh, with explicit axes, over which the model is laid out."""
    model: Transformer
    """The model, in the requested layout."""


def load_model(
    checkpoint: str,
    mesh: MeshConfig = ONE_DEVICE,
    *,
    layout: Layout = "decode",
    split_heads: SplitHeads = "auto",
    param_dtype: ParamDtype = "auto",
    step: int | None = None,
    tokenizer: str = "",
) -> Loaded:
    """Loads a checkpoint onto a mesh. Run the model under `with jax.set_mesh(loaded.mesh):`.

    Args:
      checkpoint: a run's folder, its `checkpoints` folder or one step's folder; local or a bucket URL.
      mesh: sizes of the mesh; it takes as many devices as their product, or all if a size is -1.
      layout: `decode` for cached decoding, `train` for whole sequences (logits, hidden states, attention weights).
      split_heads: in the decode layout, whether the query heads of W_qb and W_o are split over `tensor` too. auto: yes,
        except on GPUs where reading all of them costs little (docs/decoding.md).
      param_dtype: type in which weights are held. auto: for decoding on accelerators, bfloat16 if the model computes in
        it (its products use the weights in that type anyway), otherwise as stored.
      step: number of updates of the checkpoint; None: the latest.
      tokenizer: see `get_tokenizer`; empty: the one that the run was trained with.

    Raises:
      ConfigError: mesh, devices, model and tokenizer do not fit together; nothing has been allocated.
      CheckpointError: there is no such checkpoint, or its parameters do not fit its configuration.
      ValueError: the tokenizer is not available.
    """
    require(Layout, layout=layout)
    require(SplitHeads, split_heads=split_heads)
    require(ParamDtype, param_dtype=param_dtype)
    config = load_config(checkpoint, step)
    model_config = config.model
    devices = decode_devices(mesh)
    sizes = mesh.resolve(len(devices))
    split = splits_heads(split_heads, model_config, sizes.tensor, devices[0].platform)
    if layout == "decode":
        check_decode_layout(model_config, sizes, split)
    elif faults := train_layout_faults(model_config, sizes):
        raise ConfigError(faults)
    found = get_tokenizer(tokenizer or config.data.tokenizer)
    if found.n_vocab > model_config.vocab_size:
        raise ConfigError(
            f"The tokenizer {tokenizer or config.data.tokenizer} has {found.n_vocab} ids, the model's vocabulary "
            f"{model_config.vocab_size}; name the tokenizer that the model was trained with."
        )

    if param_dtype == "auto":
        computes_in_bfloat16 = model_config.compute_dtype == "bfloat16"
        casts = layout == "decode" and computes_in_bfloat16 and devices[0].platform != "cpu"
        param_dtype = "bfloat16" if casts else model_config.param_dtype
    model_config = dataclasses.replace(model_config, param_dtype=param_dtype)
    rules = TRAIN_RULES if layout == "train" else decode_rules(split)
    device_mesh = make_mesh(sizes, devices)
    read = lambda abstract: load_params(checkpoint, abstract, step)
    if layout == "decode":
        model = decoding_model(model_config, rules, device_mesh, read)
    else:
        params = read(abstract_params(model_config, rules, device_mesh))
        with jax.set_mesh(device_mesh):
            model = from_params(model_config, params, rules=rules)
    return Loaded(config, found, device_mesh, model)
