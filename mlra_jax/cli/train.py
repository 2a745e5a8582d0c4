"""`mlra-train CONFIG [--field VALUE ...]`: trains a model, or continues its training."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from mlra_jax.cli import command
from mlra_jax.errors import explain, is_refusal


@command
def main(argv: Sequence[str]) -> int:
    """Parses the configuration, joins the other processes if there are any, trains.

    Exit status 0: trained, or saved and stopped by SIGTERM; 1: diverged, or could not write; 2: refused.
    """
    from mlra_jax.cli.configs import parse_train_args
    from mlra_jax.distributed import initialize, take_args

    # JAX takes three quarters of a GPU's memory by default; the planner counts on what JAX takes.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    distributed, argv = take_args(argv)
    config = parse_train_args(argv)

    from mlra_jax.training.loop import DivergedError, train
    from mlra_jax.watchdog import Watchdog

    initialize(distributed)
    advice = f"the same command, on every host, continues {config.run_dir} from its last checkpoint"
    with Watchdog(distributed.timeout, advice) as watchdog:
        try:
            train(config)
            return 0
        except Exception as error:
            message = explain(error)
            refused = message is not None and is_refusal(error)
            if not refused and not isinstance(error, DivergedError):
                if watchdog.alone and message is None:
                    raise
                watchdog.wait_for_verdict()  # all of this may come from another process's death
                if isinstance(error, OSError):
                    message = f"{message} Then {advice}."
            if message is None:
                traceback.print_exc()
                message = str(error)
            print(f"error: {message}", file=sys.stderr)
            status = 2 if refused else 1
            watchdog.leave(message, status)
            return status


if __name__ == "__main__":
    sys.exit(main())
