"""Rotary scaling as configurations in the style of Hugging Face's have it: `rope_theta` and `rope_scaling`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mlra_jax.config import ConfigError, ModelConfig, PositiveFloat, RotaryScalingConfig, value_faults
from mlra_jax.ops.rotary import yarn_magnitude

FIELDS = ("rope_theta", "rope_scaling")

_METHODS = {"default": "none", "linear": "linear", "yarn": "yarn"}
_NAMES = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_position",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
"""Fields of `rope_scaling` and ours."""


def scaling_from_rope(rope_scaling: Mapping[str, Any] | None) -> RotaryScalingConfig:
    """The scaling that a `rope_scaling` describes, such as DeepSeek-V3's; None is none.

    What is left out counts as in the Transformers library: without `mscale_all_dim` scores are not scaled.

    Raises:
      ConfigError: the type, or a field, is not one of ours; or a value is illegal.
    """
    given = dict(rope_scaling or {})
    kinds = {str(given.pop(key)) for key in ("type", "rope_type") if key in given} or {"default"}
    faults = [
        f"rope_scaling has the type {kind}, which is not one of {', '.join(_METHODS)}."
        for kind in sorted(kinds - set(_METHODS))
    ]
    if len(kinds) > 1:
        faults.append(f"rope_scaling has two types: {', '.join(sorted(kinds))}.")
    attention_factor = given.pop("attention_factor", None)
    faults += value_faults("attention_factor of rope_scaling", attention_factor, PositiveFloat | None)
    faults += [
        f"rope_scaling has an unknown field {name}={given[name]!r}." for name in given if name not in _NAMES
    ]
    if faults:
        raise ConfigError(faults)
    method = _METHODS[kinds.pop()]
    if method == "none":
        return RotaryScalingConfig()
    needed = {"linear": ["factor"], "yarn": ["factor", "original_max_position_embeddings"]}[method]
    if missing := [f"rope_scaling has no {name}." for name in needed if given.get(name) is None]:
        raise ConfigError(missing)
    defaults: dict[str, Any] = {"mscale": 1.0, "mscale_all_dim": 0.0} if method == "yarn" else {}
    number = lambda x, ours: float(x) if type(x) is int and ours != "original_max_position" else x
    read = {
        ours: number(given[theirs], ours) for theirs, ours in _NAMES.items() if given.get(theirs) is not None
    }
    scaling = RotaryScalingConfig("linear" if method == "linear" else "yarn", **{**defaults, **read})
    scaling.validate()
    if attention_factor is not None and method == "yarn" and scaling.factor > 1:
        # Our field is the mscale that gives this factor.
        both = attention_factor * yarn_magnitude(scaling.factor, scaling.mscale_all_dim)
        scaling = dataclasses.replace(scaling, mscale=(both - 1) / (0.1 * math.log(scaling.factor)))
        scaling.validate()
    return scaling


def rope_from_scaling(config: ModelConfig) -> dict[str, Any]:
    """`rope_scaling` for a model's scaling, by which `scaling_from_rope` finds it again; empty without one.

    Raises:
      ConfigError: the method is ntk, which is another `rope_theta` there.
    """
    scaling = config.rotary_scaling
    if scaling.method == "none":
        return {}
    if scaling.method == "ntk":
        raise ConfigError(
            "model.rotary_scaling.method=ntk has no rope_scaling; it equals a larger model.rope_base, base * factor ** "
            "(R / (R - 2)) with R the rotary width."
        )
    names = _NAMES if scaling.method == "yarn" else {"factor": "factor"}
    written = {theirs: getattr(scaling, ours) for theirs, ours in names.items()}
    # Both names of the type, for old and new readers.
    return {"rope_scaling": {"type": scaling.method, "rope_type": scaling.method, **written}}
