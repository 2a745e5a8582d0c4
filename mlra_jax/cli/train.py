"""`mlra-train CONFIG [--field VALUE ...]`: trains a model, or continues its training."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mlra_jax.cli import command


@command
def main(argv: Sequence[str]) -> int:
    """Parses the configuration, joins the other processes if there are any, trains.

    Exit status 0: trained, or saved and stopped by SIGTERM; 1: diverged; 2: refused.
    """
    from mlra_jax.cli.configs import parse_train_args
    from mlra_jax.distributed import initialize, take_args

    # JAX takes three quarters of a GPU's memory otherwise; the planner counts on what it takes.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    distributed, argv = take_args(argv)
    config = parse_train_args(argv)

    from mlra_jax.training.loop import DivergedError, train

    initialize(distributed)
    try:
        train(config)
    except DivergedError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
