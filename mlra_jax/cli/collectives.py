"""`python -m mlra_jax.cli.collectives [CONFIG] [--mesh...]`: what the decode step moves between devices.

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
    """Prints what the decode step of a configuration moves between devices, as a Markdown table."""

    at: ClassVar[str] = OPTION
    config: tyro.conf.Positional[str] = "mlra_4"
    """Name or path of a configuration."""
    mesh: MeshConfig = _FOUR_DEVICES
    """The devices, simulated."""
    split_heads: bool = True
    """Whether the query heads of W_qb and W_o are split over tensor."""
    layers: Positive = 4
    """Layers that are compiled: enough to tell what happens in each from what happens once."""
    batch: Positive = 1
    """Rows."""
    max_len: Positive = 4096
    """Tokens in the cache."""
    sample: bool = False
    """Draw tokens instead of taking the most probable ones."""


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
    """Each collective in the order of the program; what happens `n_layers` times happens in every layer."""
    rows = []
    for collective, count in collectives.items():
        per_layer, besides = divmod(count, n_layers)
        rows.append((*collective.cells, f"{collective.bytes:,}", per_layer or "", besides or ""))
    names = ("exchange", "devices", "each has afterwards", "bytes", "per layer", "besides")
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
