"""Generates text from a checkpoint: `python decode.py --checkpoint DIR --prompt TEXT`; `--help` lists the options."""

import sys

from mlra_jax.cli.decode import main

if __name__ == "__main__":
    sys.exit(main())
