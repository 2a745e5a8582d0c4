"""`mlra-plan CONFIG --topology NAME [--field VALUE ...]`: what training would take on devices that need not be there.

Prints the estimate by which micro-batch and rematerialisation are chosen, and a roofline by formula; then, from the
train step compiled ahead of time by the compiler that would run there, its memory and what it moves between devices.
With `--estimate` nothing is compiled.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence

from mlra_jax.cli import command
from mlra_jax.config import ConfigError

_TOPOLOGY, _ESTIMATE = "--topology", "--estimate"


def _take(argv: Sequence[str]) -> tuple[str, bool, list[str]]:
    """The topology, whether only to estimate, and the other arguments."""
    topology, estimate = "", False
    others: list[str] = []
    rest = iter(argv)
    for arg in rest:
        if arg == _TOPOLOGY:
            topology = next(rest, "")
        elif arg.startswith(f"{_TOPOLOGY}="):
            topology = arg.partition("=")[2]
        elif arg == _ESTIMATE:
            estimate = True
        else:
            others.append(arg)
    if not topology and not {"-h", "--help"} & set(argv):
        raise ConfigError(
            [
                "Name the devices: --topology v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, 2*v5e:16x16 (two slices), "
                "h100:8 or h100:4x8 (4 hosts of 8)."
            ]
        )
    return topology, estimate, others


@contextlib.contextmanager
def _standard_error() -> Iterator[list[str]]:
    """Collects what is written to standard error, by XLA too; shows it if the block fails."""
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
    """Prints the estimate, what the compiler says, and the roofline."""
    topology, estimate_only, argv = _take(argv)

    from mlra_jax.cli.configs import parse_train_args

    config = parse_train_args(argv, prog=f"mlra-plan {_TOPOLOGY} NAME [{_ESTIMATE}]", afresh=True)
    # The compilers of devices that are not there, on whatever machine this is.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    import jax

    jax.config.update("jax_platforms", "cpu")

    from mlra_jax.config import MeshConfig
    from mlra_jax.execution import report
    from mlra_jax.execution.planner import resolve
    from mlra_jax.execution.topologies import Memory, compile_train_step, topology_mesh
    from mlra_jax.sharding import check_train_layout

    with _standard_error():
        mesh = topology_mesh(topology, config.mesh)
    check_train_layout(config, MeshConfig(**mesh.shape))
    config, plan = resolve(config, mesh)
    print("\n".join(report.estimate(config, topology, mesh, plan)), flush=True)
    if not estimate_only:
        with _standard_error() as messages:
            compiled = compile_train_step(config, mesh)
        try:
            hlo = compiled.as_text()
        except jax.errors.JaxRuntimeError:
            hlo = None  # libtpu cannot print some of its programs
        print("\n".join(["", *report.compiled(Memory.of(compiled), plan, hlo, messages)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
