"""Trains a model: `python train.py CONFIG [--field VALUE ...]`; `--help` lists the fields."""

import sys

from mlra_jax.cli.entry import train

if __name__ == "__main__":
    sys.exit(train())
