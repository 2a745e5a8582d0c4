"""Generates text from a checkpoint: `python decode.py --checkpoint DIR --prompt TEXT`; `--help` lists the options."""

import sys

from mlra_jax.cli.entry import decode

if __name__ == "__main__":
    sys.exit(decode())
