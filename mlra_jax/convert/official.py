"""Names and shapes of the paper's PyTorch models, and how their tensors correspond to parameters.

The correspondence is a table of `Part`s. A part pairs a view of an official tensor with a view of a parameter: the same
numbers, with the same axes. Copying from one view to the other converts in either direction, so that whatever can be
imported can be exported.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.attention.registry import attention_name
from mlra_jax.attention.tensor_product import TensorProductAttentionConfig
from mlra_jax.attention.tied import TiedAttentionConfig
from mlra_jax.config import (
    AttentionConfig,
    ConfigError,
    ModelConfig,
    PositiveFloat,
    RotaryScalingConfig,
    value_faults,
)
from mlra_jax.convert import rope_scaling
from mlra_jax.errors import UserError
from mlra_jax.lazy_arrays import LazyStack, LazyTensor, Tensor


class ConvertError(UserError):
    """The tensors or parameters are not those of the model."""


# Tensors.


@dataclasses.dataclass(frozen=True)
class Part:
    """A view of an official tensor that equals a view of one of our parameters.

    Views are written as axes: `(N E) A` is an array of two axes, the first of which is split into N times E; in
    `(L C | R) D` the first L*C rows are split into L times C, and the last R stand alone. `pick` chooses an index
    along an axis of either side and, under `|`, one of the pieces.
    """

    name: str  # official, without "transformer.h.{layer}." where the tensor belongs to a layer
    theirs: str
    path: str  # ours, dotted; under "layers" the array has the layer as an additional first axis
    ours: str
    pick: Mapping[str, int] = dataclasses.field(default_factory=dict)


# Axes: D model width, F MLP width, V vocabulary, N query heads, L latent heads, J branches, G = L / J groups of M
# query heads, C latent width, H head width without RoPE (all of it in the other attentions), R rotary width, E = H + R,
# A query rank, K KV heads, r factors (TPA), rq those of queries; kv: key, then value.
_MODEL = (
    Part("transformer.wte.weight", "V D", "embedding.table", "V D"),
    Part("layernorm.weight", "D", "final_norm.gain", "D"),
)
_LAYER = (
    Part("input_layernorm.weight", "D", "layers.attention_norm.gain", "D"),
    Part("post_attention_layernorm.weight", "D", "layers.mlp_norm.gain", "D"),
    Part("mlp.c_fc1.weight", "F D", "layers.mlp.w_gate", "D F"),
    Part("mlp.c_fc2.weight", "F D", "layers.mlp.w_up", "D F"),
    Part("mlp.c_proj.weight", "D F", "layers.mlp.w_down", "F D"),
    Part("attn.c_proj.weight", "D (N H)", "layers.attention.output.w_o", "N H D"),
)
_QUERY_PARTS = (Part("attn.c_q.weight", "(N H) D", "layers.attention.w_q", "D N H"),)
_LOW_RANK_QUERY_PARTS = (
    Part("attn.c_q.weight", "A D", "layers.attention.w_qa", "D A"),
    Part("attn.q_layernorm.weight", "A", "layers.attention.q_norm.gain", "A"),
    Part("attn.w_q.weight", "(N H) A", "layers.attention.w_q", "A N H"),
)
_KEY_VALUE_PARTS = (
    Part("attn.c_k.weight", "(K H) D", "layers.attention.w_k", "D K H"),
    Part("attn.c_v.weight", "(K H) D", "layers.attention.w_v", "D K H"),
)
_TIED_PARTS = (
    Part("attn.kv_proj.weight", "(K H) D", "layers.attention.w_kv", "D K H"),
    Part("attn.W_rope_k.weight", "R D", "layers.attention.w_kr", "D R"),
)
_FACTOR_PARTS = tuple(
    part
    for x, r in (("q", "rq"), ("k", "r"), ("v", "r"))
    for part in (
        Part(f"attn.c_qkv.W_A_{x}.weight", f"(N {r}) D", f"layers.attention.w_a{x}", f"D N {r}"),
        Part(f"attn.c_qkv.W_B_{x}.weight", f"({r} H) D", f"layers.attention.w_b{x}", f"D {r} H"),
    )
)
_LATENT_PARTS = (
    Part("attn.q_a_proj.weight", "A D", "layers.attention.w_qa", "D A"),
    Part("attn.q_a_layernorm.weight", "A", "layers.attention.q_norm.gain", "A"),
    Part("attn.q_b_proj.weight", "(N E) A", "layers.attention.w_qb", "A N E"),
    Part("attn.kv_a_proj_with_mqa.weight", "(L C | R) D", "layers.attention.w_kva", "D L C", {"|": 0}),
    Part("attn.kv_a_proj_with_mqa.weight", "(L C | R) D", "layers.attention.w_kr", "D R", {"|": 1}),
)


def _latent_head_parts(n: int) -> Iterator[Part]:
    """The tensors whose names depend on the number of latent heads: norms and up-projections."""
    up, up_axes = ("layers.attention.w_uk", "layers.attention.w_uv"), "J (G M) C H"
    norm = "layers.attention.kv_norm.gain"
    names = {1: ["attn.kv_a_layernorm"], 2: ["attn.kv_a_layernorm_1", "attn.kv_a_layernorm_2"]}
    for i, name in enumerate(names.get(n) or [f"attn.kv_a_layernorms.{i}" for i in range(n)]):
        yield Part(f"{name}.weight", "C", norm, "L C", {"L": i})
    for kv, path in enumerate(up):
        if n == 1:
            yield Part("attn.kv_b_proj.weight", "(J G M kv H) C", path, up_axes, {"kv": kv})
        elif n == 2:
            for g in range(2):
                pick = {"G": g, "J": 0, "kv": kv}
                yield Part(f"attn.kv_b_proj_{g + 1}.weight", "(M kv H) C", path, up_axes, pick)
        else:
            yield Part("attn.kv_b_proj", "(J G) C (M kv H)", path, up_axes, {"kv": kv})


# Configurations.


@dataclasses.dataclass(frozen=True)
class _Kind:
    """An official attention."""

    config: type[AttentionConfig]
    fields: Mapping[str, str]
    """Ours by the official names."""
    fixed: Mapping[str, int]
    """Our fields that its name decides."""
    parts: tuple[Part, ...]
    kv_heads: str = ""
    """Our field that `group_size` gives: KV heads."""
    gate: str = "attn.c_gated.weight"
    """The tensor of its gate; empty: it is never gated."""


def _latent(n_latent_heads: int, n_branches: int) -> _Kind:
    fields = {"q_lora_rank": "q_lora_rank", "kv_lora_rank": "kv_lora_rank"}
    fields |= {"qk_nope_head_dim": "d_nope", "qk_rope_head_dim": "d_rope"}
    return _Kind(
        LatentAttentionConfig,
        fields,
        {"n_latent_heads": n_latent_heads, "n_branches": n_branches},
        (*_LATENT_PARTS, *_latent_head_parts(n_latent_heads)),
        gate="attn.gated_proj.weight",
    )


_HEADS = {"head_dim": "d_head"}
_GROUPED = _Kind(
    GroupedAttentionConfig, _HEADS, {"q_lora_rank": 0}, (*_QUERY_PARTS, *_KEY_VALUE_PARTS), "n_kv_heads"
)
_KINDS = {
    "mla": _latent(1, 1),
    "gla_2": _latent(2, 1),
    "gla_4": _latent(4, 1),
    "mlra_2": _latent(4, 2),
    "mlra_4": _latent(4, 4),
    **dict.fromkeys(("gqa", "mha", "mqa"), _GROUPED),
    "gta": _Kind(
        TiedAttentionConfig, _HEADS, {}, (*_QUERY_PARTS, *_TIED_PARTS), kv_heads="n_tied_heads", gate=""
    ),
    "mfa": _Kind(
        GroupedAttentionConfig,
        {**_HEADS, "share_q_dim": "q_lora_rank"},
        {"n_kv_heads": 1},
        (*_LOW_RANK_QUERY_PARTS, *_KEY_VALUE_PARTS),
        gate="",
    ),
    "tpa": _Kind(
        TensorProductAttentionConfig,
        {**_HEADS, "rank": "rank", "q_rank": "q_rank"},
        {},
        _FACTOR_PARTS,
        gate="",
    ),
}
_FIELDS = {
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "n_embd": "d_model",
    "intermediate_size": "d_ff",
    "vocab_size": "vocab_size",
}
_WITHOUT_EFFECT = {
    # on a trained model, or checked separately (bias)
    *("block_size", "dropout", "bias"),
    # what the Hugging Face library notes in every config.json
    *("model_type", "architectures", "torch_dtype", "dtype"),
    *("transformers_version", "_name_or_path", "auto_map"),
}
_ROPE_BASE, _NORM_EPS = 10000.0, 1e-6
"""Fixed in the official code."""


def model_config_from_official(config: Mapping[str, Any], model_type: str | None = None) -> ModelConfig:
    """The configuration of an official model.

    Args:
      config: the official fields: `n_layer`, `n_head`, `n_embd`, `intermediate_size`, `vocab_size`, and those of the
        attention; and, as other models have them, `rope_theta` and `rope_scaling`.
      model_type: `mla`, `gla_2`, `gla_4`, `mlra_2`, `mlra_4`, `mha`, `mqa`, `gqa`, `gta`, `mfa` or `tpa`, perhaps
        followed by `_gated`, `_no_scale` or `_normal_initialization`: the paper's variants. None: that in `config`.

    Raises:
      ConfigError: the type is not one of these, or fields are missing, unknown or illegal; all are listed.
    """
    model_type = model_type or config.get("model_type")
    if not model_type:
        raise ConfigError("The configuration has no model_type; name it, such as mlra_4.")
    base = re.sub("_(gated|no_scale|normal_initialization)$", "", model_type)
    scale, gated = not model_type.endswith("_no_scale"), model_type.endswith("_gated")
    kind = _KINDS.get(base)
    if kind is None or (gated and not kind.gate) or not (scale or kind.config is LatentAttentionConfig):
        never_gated = ", ".join(name for name, k in _KINDS.items() if not k.gate)
        raise ConfigError(
            f"model_type={model_type} cannot be converted; it must be one of {', '.join(_KINDS)}, perhaps followed by "
            f"_gated (not {never_gated}), _no_scale (latent attention only) or _normal_initialization."
        )
    group_size = {"mha": 1, "mqa": config.get("n_head")}  # gqa and gta must say
    given = {"group_size": group_size[base], **config} if base in group_size else dict(config)
    wanted = {*_FIELDS, *kind.fields, *(["group_size"] if kind.kv_heads else [])}
    faults = [f"{name} is missing." for name in sorted(wanted - set(given))]
    faults += [
        f"{name}={given[name]!r} is not a field of {model_type}."
        for name in sorted(set(given) - wanted - _WITHOUT_EFFECT - set(rope_scaling.FIELDS))
    ]
    faults += ["bias must be false; these models have no biases."] if given.get("bias") else []
    faults += [
        f"{name}={given[name]!r} must be a whole number of at least 1."
        for name in sorted(wanted & set(given))
        if type(given[name]) is not int or given[name] < (0 if name == "qk_rope_head_dim" else 1)
    ]
    if not faults and kind.kv_heads and given["n_head"] % given["group_size"]:
        faults.append(f"group_size={given['group_size']} does not divide n_head={given['n_head']}.")
    rope_theta, scaling = given.get("rope_theta", _ROPE_BASE), RotaryScalingConfig()
    faults += value_faults("rope_theta", rope_theta, PositiveFloat)
    try:
        scaling = rope_scaling.scaling_from_rope(given.get("rope_scaling"))
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError([f"Official configuration: {fault}" for fault in faults])

    own: dict[str, Any] = {**kind.fixed, **{ours: given[theirs] for theirs, ours in kind.fields.items()}}
    if kind.kv_heads:
        own[kind.kv_heads] = given["n_head"] // given["group_size"]
    if not scale:
        own["scale_latents"] = False
    model = ModelConfig(
        **{ours: given[theirs] for theirs, ours in _FIELDS.items()},
        attention=kind.config(**own),
        gated_attention=gated,
        output_init="normal" if model_type.endswith("_normal_initialization") else "zeros",
        rope_base=float(rope_theta),
        rotary_scaling=scaling,
        norm_eps=_NORM_EPS,
    )
    model.validate()
    return model


def _base(config: ModelConfig) -> str:
    """The official name of a model's attention; empty if it has none."""
    a = config.attention
    fits = lambda kind: all(getattr(a, name) == value for name, value in kind.fixed.items())
    names = [name for name, kind in _KINDS.items() if type(a) is kind.config and fits(kind)]
    if "gqa" in names and config.heads_per_latent == 1:
        return "mha"
    return names[0] if names else ""


def _attention_faults(config: ModelConfig) -> list[str]:
    """Why no official model has this attention; empty if one has."""
    a, base, never = config.attention, _base(config), "There is no official model with"
    if not base:
        fixed = dict.fromkeys(name for k in _KINDS.values() if type(a) is k.config for name in k.fixed)
        values = " and ".join(f"{name}={getattr(a, name)}" for name in fixed)
        return [f"{never} {values or f'the attention {attention_name(type(a))}'}."]
    if config.gated_attention and not _KINDS[base].gate:
        return [f"{never} gated_attention and {base.upper()}."]
    return []


def official_from_model_config(config: ModelConfig, *, block_size: int) -> dict[str, Any]:
    """The official fields of a model, with its `model_type`; and `rope_scaling`, which the official code ignores.

    Args:
      config: the model.
      block_size: length of the training sequences, in tokens.

    Raises:
      ConfigError: no official model is like this one; all reasons are listed.
    """
    config.validate()
    faults = [
        f"model.{name}={getattr(config, name)}, but the official models have {value} fixed."
        for name, value in (("rope_base", _ROPE_BASE), ("norm_eps", _NORM_EPS))
        if getattr(config, name) != value
    ]
    faults += _attention_faults(config)
    rope: dict[str, Any] = {}
    try:
        rope = rope_scaling.rope_from_scaling(config)
    except ConfigError as error:
        faults += error.faults
    suffixes = ["_gated"] if config.gated_attention else []
    suffixes += [] if getattr(config.attention, "scale_latents", True) else ["_no_scale"]
    if len(suffixes) > 1:
        faults.append("There is no official model both gated and without scales.")
    if faults:
        raise ConfigError(faults)
    if not suffixes and config.output_init == "normal":  # of no effect once there are weights
        suffixes = ["_normal_initialization"]
    base = _base(config)
    fields = {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()}
    fields |= {theirs: getattr(config.attention, ours) for theirs, ours in _KINDS[base].fields.items()}
    if _KINDS[base].kv_heads and base != "mha":
        fields["group_size"] = config.heads_per_latent
    constant = {"block_size": block_size, "bias": False, "dropout": 0.0}
    return {"model_type": base + "".join(suffixes), **fields, **constant, **rope}


def _parts(config: ModelConfig) -> tuple[Part, ...]:
    if faults := _attention_faults(config):
        raise ConfigError(faults)
    kind = _KINDS[_base(config)]
    gate = Part(kind.gate, "(N H) D", "layers.attention.output.w_gate", "D N H")
    return (*_MODEL, *_LAYER, *kind.parts, *([gate] if config.gated_attention else []))


# Conversion.

_LETTERS = {
    "L": ("n_latent_heads",),
    "J": ("n_branches",),
    "G": ("n_groups",),
    "C": ("d_latent",),
    "H": ("d_nope", "d_head"),
    "R": ("d_rope",),
    "A": ("q_lora_rank",),
    "K": ("n_kv_heads", "n_tied_heads"),
    "r": ("rank",),
    "rq": ("q_rank",),
}
"""Axes of an attention, and the fields of its configuration that give their sizes."""


def _sizes(config: ModelConfig) -> dict[str, int]:
    a = config.attention
    sizes = {"D": config.d_model, "F": config.d_ff, "V": config.vocab_size, "N": config.n_heads, "kv": 2}
    named = ((letter, name) for letter, names in _LETTERS.items() for name in names if hasattr(a, name))
    sizes |= {letter: getattr(a, name) for letter, name in named}
    return sizes | {"M": config.heads_per_latent, "E": sizes["H"] + sizes.get("R", 0)}


def _axes(axes: str) -> list[list[list[str]]]:
    """Parses `(L C | R) D` as [[[L, C], [R]], [[D]]]: the pieces of each array axis, each a product of axes."""
    tokens = re.findall(r"\([^)]*\)|\S+", axes)
    return [[piece.split() for piece in token.strip("()").split("|")] for token in tokens]


def _shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sum(math.prod(sizes[a] for a in piece) for piece in pieces) for pieces in _axes(axes))


def _view(x: np.ndarray, part: Part, axes: str, sizes: Mapping[str, int]) -> tuple[np.ndarray, list[str]]:
    """Returns the view of `x` that `axes` and the part's picks describe, and the names of its axes."""
    cut, names = [], []
    for pieces in _axes(axes):
        ends = [0, *np.cumsum([math.prod(sizes[a] for a in piece) for piece in pieces])]
        k = part.pick["|"] if len(pieces) > 1 else 0
        cut.append(slice(ends[k], ends[k + 1]))
        names += pieces[k]
    view = x[tuple(cut)].reshape([sizes[a] for a in names])
    view = view[tuple(part.pick.get(a, slice(None)) for a in names)]
    return view, [a for a in names if a not in part.pick]


def _views(
    official: np.ndarray, ours: np.ndarray, part: Part, sizes: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns views of both sides of a part with the same axes in the same order."""
    theirs_view, theirs_axes = _view(official, part, part.theirs, sizes)
    ours_view, ours_axes = _view(ours, part, part.ours, sizes)
    return theirs_view.transpose([theirs_axes.index(a) for a in ours_axes]), ours_view


@dataclasses.dataclass(frozen=True)
class _Official:
    """An official tensor of a model."""

    shape: tuple[int, ...]
    layer: int | None
    parts: tuple[Part, ...]

    def of(self, array: Any) -> Any:
        """The part of one of our parameters that this tensor comes from."""
        return array if self.layer is None else array[self.layer]


def _official_tensors(config: ModelConfig) -> dict[str, _Official]:
    """The official tensors of a model, by name."""
    sizes = _sizes(config)
    by_name: dict[str, list[Part]] = {}
    for part in _parts(config):
        by_name.setdefault(part.name, []).append(part)
    tensors = {}
    for name, parts in by_name.items():
        shape = _shape(parts[0].theirs, sizes)
        if parts[0].path.startswith("layers."):
            for i in range(config.n_layers):
                tensors[f"transformer.h.{i}.{name}"] = _Official(shape, i, tuple(parts))
        else:
            tensors[name] = _Official(shape, None, tuple(parts))
    return tensors


def _our_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of our parameters by dotted path, in the training layout."""
    sizes = _sizes(config)
    layers = lambda path: (config.n_layers,) if path.startswith("layers.") else ()
    return {p.path: (*layers(p.path), *_shape(p.ours, sizes)) for p in _parts(config)}


def _check(what: str, given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    faults = [f"{k}: missing, expected {expected[k]}" for k in sorted(expected.keys() - given.keys())]
    faults += [f"{k}: {given[k]}, not in the model" for k in sorted(given.keys() - expected.keys())]
    common = sorted(expected.keys() & given.keys())
    faults += [f"{k}: {given[k]}, expected {expected[k]}" for k in common if tuple(given[k]) != expected[k]]
    if faults:
        raise ConvertError(
            f"The {what} do not fit the configured model ({len(faults)} of {len({**expected, **given})}):\n  - "
            + "\n  - ".join(faults)
        )


_TABLE, _HEAD = "transformer.wte.weight", "lm_head.weight"


def lazy_params_from_official(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Any]:
    """Converts official tensors to lazy parameters; those of layers are `LazyStack`s.

    Reading a parameter, or one layer of it, reads the tensors that it comes from, one at a time (a tensor that is part
    of two parameters is read for each). Only an output matrix is read at once, to compare it with the embedding.

    Args:
      tensors: see `params_from_official`.
      config: see `params_from_official`.

    Raises:
      ConvertError, ConfigError: see `params_from_official`.
    """
    official = _official_tensors(config)
    expected = {name: t.shape for name, t in official.items()}
    if _HEAD in tensors:
        expected[_HEAD] = expected[_TABLE]
    _check("tensors", {name: tuple(t.shape) for name, t in tensors.items()}, expected)
    if _HEAD in tensors and _digest(tensors[_HEAD]) != _digest(tensors[_TABLE]):
        raise ConvertError(f"{_HEAD} differs from {_TABLE}; these models use one matrix for both.")

    sizes, dtype = _sizes(config), np.dtype(config.param_dtype)
    sources: dict[tuple[str, int | None], list[tuple[str, Part]]] = {}
    for name, tensor in official.items():
        for part in tensor.parts:
            sources.setdefault((part.path, tensor.layer), []).append((name, part))

    def make(path: str, layer: int | None, shape: tuple[int, ...]) -> np.ndarray:
        array = np.empty(shape, dtype)
        for name, part in sources[path, layer]:
            theirs, ours = _views(np.asarray(tensors[name]), array, part, sizes)
            ours[...] = theirs
        return array

    def lazy(path: str, layer: int | None, shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(shape, dtype, functools.partial(make, path, layer, shape))

    flat: dict[str, LazyTensor | LazyStack] = {}
    for path, shape in _our_shapes(config).items():
        if (path, None) in sources:
            flat[path] = lazy(path, None, shape)
        else:
            flat[path] = LazyStack(tuple(lazy(path, i, shape[1:]) for i in range(config.n_layers)))
    return nnx.traversals.unflatten_mapping(flat, sep=".")


def _digest(tensor: Tensor) -> bytes:
    """Digest of the values, to compare two tensors with one in memory at a time."""
    return hashlib.sha256(np.ascontiguousarray(np.asarray(tensor)).view(np.uint8).data).digest()


def params_from_official(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Any]:
    """Converts official tensors to parameters.

    Tensors are read one at a time, so that only one is in memory beside the parameters.

    Args:
      tensors: arrays or `LazyTensor`s by official name. `lm_head.weight` may be among them if it equals the token
        embedding, to which it is tied.
      config: the model; parameters are converted to its `param_dtype`.

    Returns:
      Nested dictionary of NumPy arrays, in the training layout.

    Raises:
      ConvertError: tensors are missing, unknown or of another shape, all listed; or the output matrix is not tied.
      ConfigError: there is no official model with this attention.
    """
    return jax.tree.map(np.asarray, lazy_params_from_official(tensors, config))


def official_from_params(
    params: Mapping[str, Any], config: ModelConfig, *, with_head: bool = False
) -> dict[str, LazyTensor]:
    """Converts parameters to official tensors, by name, in the parameters' dtype.

    Each is made when `np.asarray` asks for it, so that a large model is not in memory twice. They are ordered by
    parameter, so that at most two lazy parameters are needed at a time.

    Args:
      params: nested dictionary, in the training layout, of arrays, `LazyTensor`s or `LazyStack`s; gradients have the
        same names and shapes.
      config: the model.
      with_head: list the token embedding a second time as `lm_head.weight`, as the official checkpoints do.

    Raises:
      ConvertError: parameters are missing, unknown or of another shape; all are listed.
      ConfigError: there is no official model with this attention.
    """
    flat = nnx.traversals.flatten_mapping(params, sep=".")
    _check("parameters", {path: tuple(x.shape) for path, x in flat.items()}, _our_shapes(config))
    sizes = _sizes(config)

    def make(tensor: _Official, dtype: np.dtype) -> np.ndarray:
        values = np.empty(tensor.shape, dtype)
        for part in tensor.parts:
            theirs, ours = _views(values, np.asarray(tensor.of(flat[part.path])), part, sizes)
            theirs[...] = ours
        return values

    tensors = {}
    for name, tensor in _official_tensors(config).items():
        dtype = np.dtype(flat[tensor.parts[0].path].dtype)
        tensors[name] = LazyTensor(tensor.shape, dtype, functools.partial(make, tensor, dtype))
    if with_head:
        tensors[_HEAD] = tensors[_TABLE]
    return tensors
