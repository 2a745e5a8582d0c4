"""`mlra-plan CONFIG --topology NAME [--field VALUE ...]`: plans training for devices that are not at hand.

Prints the estimate by which micro-batch and rematerialisation are chosen, a roofline by formula, and what the whole run
takes by it; then compiles the train step ahead of time with the target's own compiler, and prints its memory and
collectives. With `--estimate` nothing is compiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence

import tyro

from mlra_jax.cli import command
from mlra_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class PlanArgs:
    """The options of this command; all others are those of `mlra-train`."""

    topology: str = ""
    """Target devices, such as v5e:16x16 or h100:8."""
    estimate: bool = False
    """Only estimate; compile nothing. Needs neither libtpu nor a CUDA plugin."""


@contextlib.contextmanager
def _standard_error() -> Iterator[list[str]]:
    """Captures standard error, XLA's included; shows it if the block fails."""
    sys.stderr.flush()
    lines: list[str] = []
    with tempfile.TemporaryFile("w+b") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        failed = True
        try:
            yield lines
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            text = file.read().decode(errors="replace")
            lines += text.splitlines()
            if failed:
                sys.stderr.write(text)


@command
def main(argv: Sequence[str]) -> int:
    """Prints the estimate, the roofline and what the compiler says."""
    args, rest = tyro.cli(PlanArgs, args=argv, add_help=False, return_unknown_args=True)
    if not args.topology and not {"-h", "--help"} & set(rest):
        raise ConfigError(
            "Name the devices: --topology v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, 2*v5e:16x16 (two slices), "
            "h100:8 or h100:4x8 (4 hosts of 8)."
        )

    from mlra_jax.cli.configs import parse_train_args

    config = parse_train_args(rest, prog="mlra-plan --topology NAME [--estimate]", afresh=True)
    # Ahead-of-time compilation for absent hardware, on whatever machine this is.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    import jax

    jax.config.update("jax_platforms", "cpu")

    from mlra_jax.config import MeshConfig
    from mlra_jax.execution import report
    from mlra_jax.execution.planner import resolve
    from mlra_jax.execution.topologies import Memory, Topology, compile_train_step, topology_mesh
    from mlra_jax.sharding import check_train_layout

    mesh = Topology.of(args.topology).abstract_mesh(config.mesh)
    check_train_layout(config, MeshConfig(**mesh.shape))
    config, plan = resolve(config, mesh)
    print("\n".join(report.estimate(config, args.topology, mesh, plan)), flush=True)
    if not args.estimate:
        with _standard_error() as messages:
            compiled = compile_train_step(config, topology_mesh(args.topology, config.mesh))
        try:
            hlo = compiled.as_text()
        except jax.errors.JaxRuntimeError:
            hlo = None  # libtpu cannot print some of its programs
        print("\n".join(["", *report.compiled(Memory.of(compiled), plan, hlo, messages)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
