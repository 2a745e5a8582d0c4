"""`mlra-train CONFIG [--field VALUE ...]`: trains a model, or continues its training.

With `--check-determinism [STEPS]` it trains that many steps several times instead, and says whether they repeat to the
bit; the run's folder is not touched.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from mlra_jax.cli import command
from mlra_jax.errors import explain, is_refusal


@command
def main(argv: Sequence[str]) -> int:
    """Parses the configuration, joins the other processes if there are any, trains.

    Exit status 0: trained to the last step, or found to repeat; `checkpoint.stop_status` (75): saved and stopped by
    SIGTERM before it; 1: diverged, could not write, lost a process, or does not repeat; 2: refused.
    """
    from mlra_jax.cli.configs import parse_train_args
    from mlra_jax.distributed import initialize, take_args

    # JAX takes three quarters of a GPU's memory by default; the planner counts on what JAX takes.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    distributed, argv = take_args(argv)
    check, argv = take_check(argv)
    config = parse_train_args(argv)

    import jax

    from mlra_jax.training.determinism import check_determinism
    from mlra_jax.training.loop import DivergedError, train
    from mlra_jax.watchdog import Watchdog

    initialize(distributed)
    advice = f"the same command, on every host, continues {config.run_dir} from its last checkpoint"
    with Watchdog(distributed.timeout, advice, distributed.step_timeout) as watchdog:
        try:
            if check is not None:
                found = check_determinism(config, check)
                if jax.process_index() == 0:
                    print(found)
                return 0 if found.repeats else 1
            result = train(config, watchdog.doing)
            return config.checkpoint.stop_status if result.interrupted else 0
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


def take_check(argv: Sequence[str]) -> tuple[int | None, list[str]]:
    """Splits `--check-determinism [STEPS]` off a command line: how many steps, None without it; the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names = "--check-determinism", "--check_determinism"
    parser.add_argument(*names, nargs="?", type=int, const=5, dest="steps", metavar="STEPS")
    options, rest = parser.parse_known_args(list(argv))
    return options.steps, rest


if __name__ == "__main__":
    sys.exit(main())
