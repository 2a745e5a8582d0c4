"""The entry points of the console commands; each imports its module only when it is called."""

import functools

from mlra_jax.cli import run

train, plan, decode, evaluate = (
    functools.partial(run, name) for name in ("train", "plan", "decode", "evaluate")
)
prepare, plot, convert, export, describe, serve = (
    functools.partial(run, name) for name in ("prepare", "plot", "convert", "export", "describe", "serve")
)
