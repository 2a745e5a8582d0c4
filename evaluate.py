"""Evaluates a checkpoint: `python evaluate.py --checkpoint DIR [--tasks NAMES]`; `--help` lists the options."""

import sys

from mlra_jax.cli.entry import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
