"""The names and shapes of the paper's PyTorch models, and which part of which of our parameters each tensor is.

The correspondence is a table of `Part`s. A part pairs a view of an official tensor with a view of a parameter: the same
numbers, with the same axes. Copying from one view to the other converts in one direction, copying back in the other, so
nothing can be converted one way and not the other.
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
from mlra_jax.attention.registry import BUILT_IN, attention_name
from mlra_jax.attention.tensor_product import TensorProductAttentionConfig
from mlra_jax.attention.tied import TiedAttentionConfig
from mlra_jax.config import AttentionConfig, ConfigError, ModelConfig
from mlra_jax.errors import UserError
from mlra_jax.lazy_arrays import LazyStack, LazyTensor, Tensor


class ConvertError(UserError):
    """The tensors or parameters are not those of the model."""


# Configurations.

_LATENT = {"mla": (1, 1), "gla_2": (2, 1), "gla_4": (4, 1), "mlra_2": (4, 2), "mlra_4": (4, 4)}
"""(n_latent_heads, n_branches) of each official latent attention."""
_FIELDS = {
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "n_embd": "d_model",
    "intermediate_size": "d_ff",
    "vocab_size": "vocab_size",
}
_LATENT_FIELDS = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "d_nope",
    "qk_rope_head_dim": "d_rope",
}
_ATTENTION_FIELDS = {
    **dict.fromkeys(_LATENT, tuple(_LATENT_FIELDS)),
    **dict.fromkeys(("mha", "mqa", "gqa", "gta"), ("head_dim", "group_size")),
    "mfa": ("head_dim", "share_q_dim"),
    "tpa": ("head_dim", "rank", "q_rank"),
}
"""The official fields of each attention."""
_NEVER_GATED = ("gta", "mfa", "tpa")
_WITHOUT_EFFECT = {
    # of training, or checked by itself (bias)
    *("block_size", "dropout", "bias"),
    # what the Hugging Face library notes in every config.json
    *(
        "model_type",
        "architectures",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "_name_or_path",
        "auto_map",
    ),
}
_ROPE_BASE, _NORM_EPS = 10000.0, 1e-6
"""Fixed in the official code."""


def model_config_from_official(config: Mapping[str, Any], model_type: str | None = None) -> ModelConfig:
    """The configuration of an official model.

    Args:
      config: the official fields: `n_layer`, `n_head`, `n_embd`, `intermediate_size`, `vocab_size`, and those of the
        attention.
      model_type: `mla`, `gla_2`, `gla_4`, `mlra_2`, `mlra_4`, `mha`, `mqa`, `gqa`, `gta`, `mfa` or `tpa`; with
        `_gated`, `_no_scale` or `_normal_initialization` behind it the paper's variants. None: that in `config`.

    Raises:
      ConfigError: the type is not one of these, or fields are missing, unknown or illegal; all are listed.
    """
    model_type = model_type or config.get("model_type")
    if not model_type:
        raise ConfigError("The configuration has no model_type; name it, such as mlra_4.")
    base = re.sub("_(gated|no_scale|normal_initialization)$", "", model_type)
    scale = not model_type.endswith("_no_scale")
    gated = model_type.endswith("_gated")
    if base not in (_ATTENTION_FIELDS if scale else _LATENT) or (gated and base in _NEVER_GATED):
        raise ConfigError(
            f"model_type={model_type} cannot be converted; it must be one of {', '.join(_ATTENTION_FIELDS)}, "
            f"perhaps with _gated (not {', '.join(_NEVER_GATED)}), _no_scale (latent attention only) or "
            "_normal_initialization behind it."
        )
    group_size = {"mha": 1, "mqa": config.get("n_head")}  # gqa and gta must say
    given = {"group_size": group_size[base], **config} if base in group_size else dict(config)
    wanted = {*_FIELDS, *_ATTENTION_FIELDS[base]}
    faults = [f"{name} is missing." for name in sorted(wanted - set(given))]
    faults += [
        f"{name}={given[name]!r} is not a field of {model_type}."
        for name in sorted(set(given) - wanted - _WITHOUT_EFFECT)
    ]
    faults += ["bias must be false; these models have no biases."] if given.get("bias") else []
    faults += [
        f"{name}={given[name]!r} must be a whole number of at least 1."
        for name in sorted(wanted & set(given))
        if type(given[name]) is not int or given[name] < (0 if name == "qk_rope_head_dim" else 1)
    ]
    if not faults and "group_size" in wanted and given["n_head"] % given["group_size"]:
        faults.append(f"group_size={given['group_size']} does not divide n_head={given['n_head']}.")
    if faults:
        raise ConfigError([f"Official configuration: {fault}" for fault in faults])

    attention: AttentionConfig
    if base in _LATENT:
        sizes = {ours: given[theirs] for theirs, ours in _LATENT_FIELDS.items()}
        attention = LatentAttentionConfig(*_LATENT[base], scale_latents=scale, **sizes)
    elif base == "tpa":
        attention = TensorProductAttentionConfig(given["rank"], given["q_rank"], given["head_dim"])
    elif base == "mfa":
        attention = GroupedAttentionConfig(1, given["head_dim"], q_lora_rank=given["share_q_dim"])
    else:
        grouped = TiedAttentionConfig if base == "gta" else GroupedAttentionConfig
        attention = grouped(given["n_head"] // given["group_size"], given["head_dim"])
    model = ModelConfig(
        **{ours: given[theirs] for theirs, ours in _FIELDS.items()},
        attention=attention,
        gated_attention=gated,
        output_init="normal" if model_type.endswith("_normal_initialization") else "zeros",
        rope_base=_ROPE_BASE,
        norm_eps=_NORM_EPS,
    )
    model.validate()
    return model


def _attention_faults(config: ModelConfig) -> list[str]:
    """Why no official model has this attention; empty if one has."""
    a, never = config.attention, "There is no official model with"
    if attention_name(type(a)) not in BUILT_IN:
        return [f"{never} the attention {attention_name(type(a))}."]
    faults = []
    match a:
        case LatentAttentionConfig() if (a.n_latent_heads, a.n_branches) not in _LATENT.values():
            faults = [f"{never} n_latent_heads={a.n_latent_heads} and n_branches={a.n_branches}."]
        case GroupedAttentionConfig() if a.q_lora_rank and a.n_kv_heads > 1:
            faults = [
                f"{never} q_lora_rank={a.q_lora_rank} and n_kv_heads={a.n_kv_heads}; MFA has one KV head."
            ]
    if config.gated_attention and _base(a, config.n_heads) in _NEVER_GATED:
        faults.append(f"{never} gated_attention and {_base(a, config.n_heads).upper()}.")
    return faults


def _base(a: AttentionConfig, n_heads: int) -> str:
    """The official name of an attention in a model with so many query heads; empty if it has none."""
    match a:
        case LatentAttentionConfig():
            return {sizes: name for name, sizes in _LATENT.items()}.get((a.n_latent_heads, a.n_branches), "")
        case TiedAttentionConfig():
            return "gta"
        case TensorProductAttentionConfig():
            return "tpa"
        case GroupedAttentionConfig() if a.q_lora_rank:
            return "mfa"
        case GroupedAttentionConfig():
            return "mha" if a.n_kv_heads == n_heads else "gqa"
    return ""


def official_from_model_config(config: ModelConfig, *, block_size: int) -> dict[str, Any]:
    """The official fields of a model, with its `model_type`.

    Args:
      config: of the model.
      block_size: tokens in the longest training sequence.

    Raises:
      ConfigError: no official model is like this one; all reasons are listed.
    """
    config.validate()
    a = config.attention
    faults = [
        f"model.{name}={getattr(config, name)}, but the official models have {value} fixed."
        for name, value in (("rope_base", _ROPE_BASE), ("norm_eps", _NORM_EPS))
        if getattr(config, name) != value
    ]
    fields = {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()}
    suffixes = ["_gated"] if config.gated_attention else []
    faults += _attention_faults(config)
    base = _base(a, config.n_heads)
    match a:
        case LatentAttentionConfig():
            suffixes += [] if a.scale_latents else ["_no_scale"]
            fields |= {theirs: getattr(a, ours) for theirs, ours in _LATENT_FIELDS.items()}
        case TensorProductAttentionConfig():
            fields |= {"head_dim": a.d_head, "rank": a.rank, "q_rank": a.q_rank}
        case GroupedAttentionConfig() | TiedAttentionConfig():
            fields["head_dim"] = a.d_head
            if isinstance(a, GroupedAttentionConfig) and a.q_lora_rank:
                fields["share_q_dim"] = a.q_lora_rank
            elif base != "mha":
                fields["group_size"] = config.heads_per_latent
    if len(suffixes) > 1:
        faults.append("There is no official model both gated and without scales.")
    if faults:
        raise ConfigError(faults)
    if not suffixes and config.output_init == "normal":  # of no effect once there are weights
        suffixes = ["_normal_initialization"]
    constant = {"block_size": block_size, "bias": False, "dropout": 0.0}
    return {"model_type": base + "".join(suffixes), **fields, **constant}


# Tensors.


@dataclasses.dataclass(frozen=True)
class Part:
    """A view of an official tensor that equals a view of one of our parameters.

    Views are written as axes: `(N E) A` is an array of two axes, the first of which is cut into N times E; in
    `(L C | R) D` the first L*C rows are cut into L times C, and the last R are by themselves. `pick` chooses an index
    along an axis of either side, and under `|` which of the pieces.
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


def _latent_head_parts(a: LatentAttentionConfig) -> Iterator[Part]:
    """The tensors whose names differ with the number of latent heads: norms and up-projections."""
    up, up_axes = ("layers.attention.w_uk", "layers.attention.w_uv"), "J (G M) C H"
    norm, n = "layers.attention.kv_norm.gain", a.n_latent_heads
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


def _parts(config: ModelConfig) -> tuple[Part, ...]:
    if faults := _attention_faults(config):
        raise ConfigError(faults)
    a = config.attention
    gate = "attn.c_gated.weight"
    parts: tuple[Part, ...]
    match a:
        case LatentAttentionConfig():
            parts, gate = (*_LATENT_PARTS, *_latent_head_parts(a)), "attn.gated_proj.weight"
        case GroupedAttentionConfig():
            parts = (*(_LOW_RANK_QUERY_PARTS if a.q_lora_rank else _QUERY_PARTS), *_KEY_VALUE_PARTS)
        case TiedAttentionConfig():
            parts = (*_QUERY_PARTS, *_TIED_PARTS)
        case TensorProductAttentionConfig():
            parts = _FACTOR_PARTS
    if config.gated_attention:
        parts += (Part(gate, "(N H) D", "layers.attention.output.w_gate", "D N H"),)
    return (*_MODEL, *_LAYER, *parts)


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
"""Axes of an attention, and what its configuration calls them."""


def _sizes(config: ModelConfig) -> dict[str, int]:
    a = config.attention
    sizes = {"D": config.d_model, "F": config.d_ff, "V": config.vocab_size, "N": config.n_heads, "kv": 2}
    named = ((letter, name) for letter, names in _LETTERS.items() for name in names if hasattr(a, name))
    sizes |= {letter: getattr(a, name) for letter, name in named}
    return sizes | {"M": config.heads_per_latent, "E": sizes["H"] + sizes.get("R", 0)}


def _axes(axes: str) -> list[list[list[str]]]:
    """`(L C | R) D` as [[[L, C], [R]], [[D]]]: for each axis of the array its pieces, each a product of axes."""
    tokens = re.findall(r"\([^)]*\)|\S+", axes)
    return [[piece.split() for piece in token.strip("()").split("|")] for token in tokens]


def _shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sum(math.prod(sizes[a] for a in piece) for piece in pieces) for pieces in _axes(axes))


def _view(x: np.ndarray, part: Part, axes: str, sizes: Mapping[str, int]) -> tuple[np.ndarray, list[str]]:
    """The view of `x` that `axes` and the part's picks describe, and the names of its axes."""
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
    """Views of both sides of a part with the same axes in the same order."""
    theirs_view, theirs_axes = _view(official, part, part.theirs, sizes)
    ours_view, ours_axes = _view(ours, part, part.ours, sizes)
    return theirs_view.transpose([theirs_axes.index(a) for a in ours_axes]), ours_view


@dataclasses.dataclass(frozen=True)
class _Official:
    """An official tensor of a certain model."""

    shape: tuple[int, ...]
    layer: int | None
    parts: tuple[Part, ...]

    def of(self, array: Any) -> Any:
        """What this tensor is made of, in one of our parameters."""
        return array if self.layer is None else array[self.layer]


def _official_tensors(config: ModelConfig) -> dict[str, _Official]:
    """The official tensors of a model by name."""
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
    """Our parameters of an official model, none made yet; those of the layers as `LazyStack`s.

    Making a parameter, or one layer of it, reads the tensors that it comes from, one at a time (a tensor that is parts
    of two parameters is read for each). Only the output matrix, if there is one, is read here, to compare it.

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
    """Of the values, so that two tensors can be compared with one in memory."""
    return hashlib.sha256(np.ascontiguousarray(np.asarray(tensor)).view(np.uint8).data).digest()


def params_from_official(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Any]:
    """Our parameters of an official model.

    Tensors are read one at a time, so no more than one is in memory beside the parameters.

    Args:
      tensors: arrays or `LazyTensor`s by official name. `lm_head.weight` may be among them if it equals the token
        matrix, to which it is tied.
      config: of the model; parameters are converted to its `param_dtype`.

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
    """The official tensors of a model of ours, by name, in the type of the parameters.

    Each is made when `np.asarray` asks for it, so a big model need not be in memory twice. They come parameter by
    parameter, so that of lazy parameters no more than two are needed at a time.

    Args:
      params: nested dictionary, in the training layout, of arrays, `LazyTensor`s or `LazyStack`s; gradients have the
        same names and shapes.
      config: of the model.
      with_head: list the token matrix a second time as `lm_head.weight`, as the official checkpoints do.

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
