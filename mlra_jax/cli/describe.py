"""`mlra-describe CONFIG [--device NAME] [--field VALUE ...]`: what a configuration costs, and what fits.

Prints Markdown or JSON. Everything is counted from abstract parameters, caches and train states, or by stated formulas;
nothing is allocated or measured.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from mlra_jax.attention.kv_cache import values_per_token
from mlra_jax.cli import command
from mlra_jax.cli.configs import parse_train_args
from mlra_jax.config import (
    OPTION,
    ConfigError,
    MeshConfig,
    ModelConfig,
    NotNegative,
    Positive,
    TrainConfig,
    Validated,
)
from mlra_jax.execution.accelerators import GIB, Accelerator, described_device, named_accelerator
from mlra_jax.execution.flops import train_flops_per_token
from mlra_jax.execution.planner import HEADROOM, Planner
from mlra_jax.generation.engine import PREFILL_BYTES
from mlra_jax.markdown import table
from mlra_jax.model import Transformer
from mlra_jax.sharding import abstract_mesh, check_decode_layout, check_train_layout, decode_rules

TENSOR = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class DescribeArgs(Validated):
    """Describes a configuration: mlra-describe CONFIG [options of this command] [--field VALUE ...].

    CONFIG and the fields are those of train.py: a name such as mlra_4, a file, or a run's config.json (micro-batch,
    remat and gather, which the run chose for its devices, are chosen anew).
    """

    at: ClassVar[str] = OPTION
    device: str = ""
    """Accelerator, such as h100, a100 or v5e, to say what fits on it; empty: leave that out."""
    devices: Positive = 8
    """Number of accelerators in the training mesh."""
    context: NotNegative = 0
    """Context length, in cached tokens, for decoding; 0: the configuration's data.seq_len."""
    json: bool = False
    """Print JSON."""


def parameters(config: ModelConfig) -> dict[str, int]:
    """The number of elements of each parameter, summed over layers, by dotted name without `layers.`"""
    state = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), nnx.Param)
    flat = nnx.traversals.flatten_mapping(nnx.to_pure_dict(state), sep=".")
    return {name.removeprefix("layers."): math.prod(x.shape) for name, x in flat.items()}


def _part(name: str) -> str:
    """The heading under which a parameter is listed."""
    if name.endswith(".gain"):
        return "norms"
    part = name.split(".")[0]
    return f"attention {name.split('.')[-1]}" if part == "attention" else part


def _element_bytes(config: ModelConfig) -> int:
    return jnp.dtype(config.compute_dtype).itemsize


def decode_weight_bytes(config: ModelConfig, tensor: int) -> int:
    """Weight bytes on each of `tensor` devices in the decode layout, in the compute dtype.

    Raises:
      ConfigError: the model cannot be laid out so.
    """
    check_decode_layout(config, MeshConfig(1, 1, tensor, 1))
    one_layer = dataclasses.replace(config, param_dtype=config.compute_dtype, n_layers=1)
    with jax.sharding.use_abstract_mesh(abstract_mesh(MeshConfig(1, 1, tensor, 1))):
        make = lambda: Transformer(one_layer, rngs=nnx.Rngs(0), rules=decode_rules(), layout="decode")
        params = nnx.to_pure_dict(jax.eval_shape(lambda: nnx.state(make(), nnx.Param)))
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    held = lambda tree: sum(map(size, jax.tree.leaves(tree)))
    return held(params) + (config.n_layers - 1) * held(params["layers"])


def decoding(config: ModelConfig, context: int, chip: Accelerator | None) -> list[dict[str, Any]]:
    """Cache size, arithmetic intensity and, on `chip`, what fits, for each size of `tensor`; or why it is `refused`."""
    rows: list[dict[str, Any]] = []
    for tensor in TENSOR:
        try:
            values = values_per_token(config, tensor)
            weights = decode_weight_bytes(config, tensor)
        except ConfigError as error:
            rows.append({"tensor": tensor, "refused": error.faults})
            continue
        size = values * _element_bytes(config)
        row: dict[str, Any] = {
            "tensor": tensor,
            "values_per_token_and_layer": values,
            "bytes_per_token": size * config.n_layers,
            # Each device does its share of the query heads' work and reads its whole cache.
            "flops_per_cache_byte": config.attention.decode_flops(config.n_heads) / tensor / size,
            "weight_bytes": weights,
        }
        if chip:
            room = int(HEADROOM * chip.memory) - PREFILL_BYTES - weights
            tokens = max(room, 0) // row["bytes_per_token"]
            row["intensity_over_ridge"] = row["flops_per_cache_byte"] / chip.ridge
            row["longest_context"] = {str(batch): tokens // batch for batch in (1, 8, 64)}
            row["largest_batch"] = tokens // context
        rows.append(row)
    return rows


def training(config: TrainConfig, device: str, n_devices: int) -> dict[str, Any]:
    """Training memory per device by use, as the planner of `train.py` estimates it.

    Raises:
      ConfigError: the mesh does not fit so many devices, or training does not fit their memory; says what takes it.
    """
    sizes = config.mesh.resolve(n_devices)
    check_train_layout(config, sizes)
    plan = Planner(config, abstract_mesh(sizes, described_device(device))).choose()
    return {
        "mesh": dataclasses.asdict(sizes),
        "micro_batch": plan.micro_batch,
        "remat": plan.remat,
        "gather": plan.gather,
        "bytes": plan.memory,
        "total_bytes": plan.total,
        "capacity_bytes": plan.capacity,
    }


def describe(config: TrainConfig, *, context: int, device: str = "", n_devices: int = 8) -> dict[str, Any]:
    """Returns everything that the command prints, as a JSON object.

    Args:
      config: the run.
      context: cached tokens, for decoding.
      device: name of an accelerator; empty: none.
      n_devices: devices in the training mesh.

    Raises:
      ConfigError: the configuration is not legal, or cannot be laid out on the devices.
      ValueError: the accelerator is not known.
    """
    config.validate()
    chip = named_accelerator(device) if device else None
    model = config.model
    each = parameters(model)
    total = sum(each.values())
    in_matrices = sum(n for name, n in each.items() if not name.endswith(".gain"))
    parts: dict[str, int] = {}
    for name, n in each.items():
        parts[_part(name)] = parts.get(_part(name), 0) + n
    train_flops = train_flops_per_token(model, total, config.data.seq_len)
    attention = model.n_layers * model.attention.decode_flops(model.n_heads) * context
    result: dict[str, Any] = {
        "name": config.name,
        "parameters": {"total": total, **parts},
        "training_flops_per_token": {
            "seq_len": config.data.seq_len,
            "weights": 6 * total,
            "attention": train_flops - 6 * total,
            "total": train_flops,
        },
        "decoding_flops_per_token": {
            "context": context,
            "weights": 2 * in_matrices,
            "attention": attention,
            "total": 2 * in_matrices + attention,
        },
        "decoding": decoding(model, context, chip),
    }
    if chip:
        result["device"] = {"name": device, **dataclasses.asdict(chip), "ridge_flops_per_byte": chip.ridge}
        try:
            result["training"] = {"devices": n_devices} | training(config, device, n_devices)
        except ConfigError as error:
            result["training"] = {"devices": n_devices, "refused": error.faults}
    return result


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    return [*table(names, rows, "lr"), ""]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def render(d: dict[str, Any]) -> str:
    """Renders the result of `describe` as Markdown."""
    p, train, step = d["parameters"], d["training_flops_per_token"], d["decoding_flops_per_token"]
    lines = [f"# {d['name']}", "", "## Parameters", ""]
    rows = [(name, f"{n:,}", f"{n / p['total']:.1%}") for name, n in p.items() if name != "total"]
    lines += _table(("part, all layers", "parameters", "share"), [*rows, ("total", f"{p['total']:,}", "")])
    lines += ["## FLOPs per token", ""]
    lines += _table(
        ("", "weights", "attention", "total"),
        [
            (what, *(f"{f[k] / 1e9:.3f} G" for k in ("weights", "attention", "total")))
            for what, f in (
                (f"training, T = {train['seq_len']}", train),
                (f"decoding, S = {step['context']}", step),
            )
        ],
    )
    lines += [
        "Training: 6 a parameter, and 3 times (forward and backward) the products with keys and values over the causal",
        "triangle. Decoding: 2 an element of a matrix, and the two products over what is cached, absorbed in latent",
        "attention. The formulas: `mlra_jax/execution/flops.py`.",
        "",
        "## Decoding, on each of `tensor` devices",
        "",
    ]
    ran = [row for row in d["decoding"] if "refused" not in row]
    chip = d.get("device")
    lines += _table(
        (
            "tensor",
            "values per token and layer",
            "cache, bytes per token",
            "FLOPs per byte of cache",
            "weights, GiB",
        ),
        [
            (
                r["tensor"],
                r["values_per_token_and_layer"],
                f"{r['bytes_per_token']:,}",
                f"{r['flops_per_cache_byte']:.1f}",
                _gib(r["weight_bytes"]),
            )
            for r in ran
        ],
    )
    lines += [f"tensor {r['tensor']}: {' '.join(r['refused'])}" for r in d["decoding"] if "refused" in r]
    lines += [""] if len(ran) < len(d["decoding"]) else []
    if not chip:
        return "\n".join(lines)
    lines += [
        f"## On {chip['name']}: {chip['flops'] / 1e12:g} TFLOP/s, {chip['memory'] / GIB:.1f} GiB, "
        f"{chip['bandwidth'] / 1e12:g} TB/s",
        "",
        f"Below {chip['ridge_flops_per_byte']:.0f} FLOPs per byte a computation is bound by memory.",
        "",
    ]
    lines += _table(
        (
            "tensor",
            "decode attention / ridge",
            *(f"longest context, batch {b}" for b in (1, 8, 64)),
            f"largest batch at {step['context']}",
        ),
        [
            (
                r["tensor"],
                f"{r['intensity_over_ridge']:.2f}",
                *(f"{n:,}" for n in r["longest_context"].values()),
                f"{r['largest_batch']:,}",
            )
            for r in ran
        ],
    )
    lines += [
        f"Contexts and batches: cached tokens that fit in {HEADROOM:.0%} of the memory beside the weights and "
        f"{PREFILL_BYTES / GIB:g} GiB for prefill.",
        "",
    ]
    t = d["training"]
    lines += [f"## Training on {t['devices']} of them", ""]
    if "refused" in t:
        return "\n".join([*lines, *t["refused"], ""])
    mesh = ", ".join(f"{axis} {n}" for axis, n in t["mesh"].items() if n > 1) or "one device"
    once = ", weights gathered once a step" if t["gather"] == "step" else ""
    lines += [f"Mesh: {mesh}; micro-batch {t['micro_batch']}, remat {t['remat']}{once}.", ""]
    held = [(what, _gib(size)) for what, size in t["bytes"].items() if size]
    lines += _table(("on each device", "GiB"), [*held, ("total, estimated", _gib(t["total_bytes"]))])
    return "\n".join(lines)


@command
def main(argv: Sequence[str]) -> int:
    """Prints the description."""
    args, rest = tyro.cli(
        DescribeArgs, args=argv, prog="mlra-describe", return_unknown_args=True, use_underscores=False
    )
    args.validate()
    if args.device:
        named_accelerator(args.device)  # before anything is computed
    jax.config.update("jax_platforms", "cpu")
    config = parse_train_args(rest, prog="mlra-describe", afresh=True)
    context = args.context or config.data.seq_len
    result = describe(config, context=context, device=args.device, n_devices=args.devices)
    print(json.dumps(result, indent=2) if args.json else render(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
