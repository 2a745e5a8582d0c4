"""`python -m mlra_jax.convert`: the command `mlra-convert`."""

import sys

from mlra_jax.cli.convert import main

sys.exit(main())
