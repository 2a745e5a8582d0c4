"""Evaluates a checkpoint: `python evaluate.py --checkpoint DIR [--tasks NAMES]`; `--help` lists the options."""

import sys

from mlra_jax.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
