"""`python -m mlra_jax.cli.collectives [CONFIG] [--mesh...]`: what the decode step moves between devices.

Prints a Markdown table; those in docs/decoding.md are made by it. Compiles for simulated CPU devices and allocates
nothing, so that any configuration can be looked at anywhere.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import ClassVar

import jax
import tyro

from mlra_jax.cli import command
from mlra_jax.cli.configs import load_config
from mlra_jax.config import OPTION, MeshConfig, Positive, Validated
from mlra_jax.generation.collectives import step_collectives, table
from mlra_jax.generation.sampling import GREEDY, Sampling
from mlra_jax.sharding import check_decode_layout, make_mesh

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


@command
def main(argv: Sequence[str]) -> int:
    """Prints the table."""
    args = tyro.cli(CollectivesArgs, args=argv, prog="python -m mlra_jax.cli.collectives")
    args.validate()
    n_devices = math.prod(dataclasses.asdict(args.mesh).values())
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", n_devices)
    config = dataclasses.replace(load_config(args.config).model, n_layers=args.layers)
    check_decode_layout(config, args.mesh, args.split_heads)
    collectives = step_collectives(
        config,
        make_mesh(args.mesh, jax.devices()),
        split_heads=args.split_heads,
        batch=args.batch,
        max_len=args.max_len,
        sampling=Sampling(temperature=1.0) if args.sample else GREEDY,
    )
    print("\n".join(table(collectives, args.layers)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
