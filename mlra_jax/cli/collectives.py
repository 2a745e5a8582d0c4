"""`python -m mlra_jax.cli.collectives [CONFIG] [--mesh...]`: the collectives of the decode step.

Prints a Markdown table, such as those in docs/decoding.md. Compiles for simulated CPU devices and allocates nothing, so
that any configuration can be looked at anywhere.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import tyro
from jax.sharding import Mesh

from mlra_jax.cli import command
from mlra_jax.cli.configs import load_config
from mlra_jax.config import OPTION, MeshConfig, Positive, Validated
from mlra_jax.execution.collectives import Collective, executed_collectives
from mlra_jax.generation.engine import compile_step
from mlra_jax.generation.sampling import GREEDY, Sampling
from mlra_jax.markdown import table
from mlra_jax.sharding import check_decode_layout, decode_rules, make_mesh

_FOUR_DEVICES = MeshConfig(data=1, tensor=4)


@dataclasses.dataclass(frozen=True)
class CollectivesArgs(Validated):
    """Prints the collectives of a configuration's decode step, as a Markdown table."""

    at: ClassVar[str] = OPTION
    config: tyro.conf.Positional[str] = "mlra_4"
    """Name or path of a configuration."""
    mesh: MeshConfig = _FOUR_DEVICES
    """Simulated devices."""
    split_heads: bool = True
    """Split the query heads of W_qb and W_o over tensor."""
    layers: Positive = 4
    """Layers to compile: enough to tell per-layer collectives from the others."""
    batch: Positive = 1
    """Sequences decoded at once."""
    max_len: Positive = 4096
    """Cache capacity, in tokens."""
    sample: bool = False
    """Sample instead of decoding greedily."""


def step_collectives(args: CollectivesArgs, mesh: Mesh) -> dict[Collective, int]:
    """The collectives of the decode step, and how often each is executed; compiled without allocating anything.

    Raises:
      ConfigError: there is no such configuration, or it cannot be laid out on the mesh.
    """
    config = dataclasses.replace(load_config(args.config).model, n_layers=args.layers)
    check_decode_layout(config, args.mesh, args.split_heads)
    compiled = compile_step(
        config,
        decode_rules(args.split_heads),
        mesh,
        batch=args.batch,
        max_len=args.max_len,
        sampling=Sampling(temperature=1.0) if args.sample else GREEDY,
    )
    hlo = compiled.as_text()
    assert hlo is not None
    return executed_collectives(hlo)


def collectives_table(collectives: Mapping[Collective, int], n_layers: int) -> list[str]:
    """Each collective in program order; one that is executed `n_layers` times is counted as once per layer."""
    rows = []
    for collective, count in collectives.items():
        per_layer, besides = divmod(count, n_layers)
        rows.append((*collective.cells, f"{collective.bytes:,}", per_layer or "", besides or ""))
    names = ("collective", "devices", "result on each", "bytes", "per layer", "other")
    return [re.sub(" +", " ", line) for line in table(names, rows)]


@command
def main(argv: Sequence[str]) -> int:
    """Prints the table."""
    args = tyro.cli(CollectivesArgs, args=argv, prog="python -m mlra_jax.cli.collectives")
    args.validate()
    n_devices = math.prod(dataclasses.asdict(args.mesh).values())
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", n_devices)
    collectives = step_collectives(args, make_mesh(args.mesh, jax.devices()))
    print("\n".join(collectives_table(collectives, args.layers)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
