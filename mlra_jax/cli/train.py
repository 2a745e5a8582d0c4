"""`mlra-train CONFIG [--field VALUE ...]`: trains a model, or continues its training."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Sequence

from mlra_jax.cli import command

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


@command
def main(argv: Sequence[str]) -> int:
    """Parses the configuration, joins the other processes if there are any, trains.

    Exit status 0: trained, or saved and stopped by SIGTERM; 1: diverged, or could not write; 2: refused.
    """
    from mlra_jax.cli.configs import parse_train_args
    from mlra_jax.distributed import initialize, take_args

    # JAX takes three quarters of a GPU's memory otherwise; the planner counts on what it takes.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    distributed, argv = take_args(argv)
    config = parse_train_args(argv)

    from mlra_jax.training.checkpoints import SaveError
    from mlra_jax.training.loop import DivergedError, train

    # Orbax logs a traceback of what it then raises, which is explained below.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    initialize(distributed)
    try:
        train(config)
    except (DivergedError, SaveError) as error:
        message = str(error)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = error.filename or config.run_dir
        message = f"Writing to {where} failed ({error.strerror}); the checkpoints in {config.run_dir} are safe, and "
        message += "the same command continues when the cause is gone."
    else:
        return 0
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
