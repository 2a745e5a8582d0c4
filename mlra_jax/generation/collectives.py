"""The collectives of the compiled decode step."""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence

from jax.sharding import Mesh

from mlra_jax.config import ModelConfig
from mlra_jax.execution.collectives import Collective, parse_collectives
from mlra_jax.generation.engine import compile_step
from mlra_jax.generation.sampling import Sampling
from mlra_jax.sharding import decode_rules


def step_collectives(
    config: ModelConfig, mesh: Mesh, *, split_heads: bool, batch: int, max_len: int, sampling: Sampling
) -> list[Collective]:
    """The collectives of the decode step, compiled for `mesh` without allocating anything."""
    rules = decode_rules(split_heads)
    compiled = compile_step(config, rules, mesh, batch=batch, max_len=max_len, sampling=sampling)
    hlo = compiled.as_text()
    assert hlo is not None
    return parse_collectives(hlo)


def table(collectives: Sequence[Collective], n_layers: int) -> list[str]:
    """Lines of a Markdown table: each kind of exchange, in program order, and how often it occurs.

    An exchange that occurs at least `n_layers` times is counted as one of every layer.
    """
    lines = [
        "| exchange | devices | each has afterwards | bytes | per layer | besides |",
        "| --- |" + " --- |" * 5,
    ]
    for collective, count in collections.Counter(collectives).items():
        per_layer, besides = divmod(count, n_layers)
        lines.append(f"| {collective} | {collective.bytes:,} | {per_layer or ''} | {besides or ''} |")
    return [re.sub(r" +", " ", line) for line in lines]
