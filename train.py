"""Trains a model: `python train.py CONFIG [--field VALUE ...]`; `--help` lists the fields."""

from mlra_jax.cli.train import main

if __name__ == "__main__":
    main()
