"""Held-out loss of a model right after its latent was split into heads, before any training, by how it was split.

    python benchmarks/split_latents.py CHECKPOINT [--step N] [--sequences 128]

CHECKPOINT is a run of an MLA (or GLA) of ours; its own held-out windows are used. Prints a Markdown table: for each
number of latent heads and branches, the loss with the pieces mixed or not, and with the keys of a branch scaled or not.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
import numpy as np
from jax.sharding import NamedSharding

from mlra_jax.checkpoints import lazy_params, load_config
from mlra_jax.config import ConfigError, MeshConfig
from mlra_jax.convert import split_latents
from mlra_jax.data.pipeline import EvalBatches
from mlra_jax.markdown import head, row
from mlra_jax.sharding import TRAIN_RULES, make_mesh
from mlra_jax.training.step import make_eval_step

SPLITS = ((4, 4), (2, 2), (8, 8), (4, 2), (2, 1), (4, 1))
SEEDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--step", type=int)
    parser.add_argument("--sequences", type=int, default=128)
    args = parser.parse_args()

    config = load_config(args.checkpoint, args.step)
    params = jax.tree.map(np.asarray, lazy_params(args.checkpoint, args.step))
    data = EvalBatches.held_out(config.data, config.model.vocab_size, args.sequences)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, TRAIN_RULES.spec(None, "batch", "length"))
        (batch,) = data.device_batches(sharding, 1, args.sequences)

        def loss(model, params) -> float:
            nats, count = make_eval_step(dataclasses.replace(config, model=model))(
                jax.tree.map(np.asarray, params), batch
            )
            return float(nats / count)

        before = loss(config.model, params)
        print(f"Before: {before:.3f} nats per token.\n")
        names = ("L", "J", "not mixed", "mixed, keys unscaled", "mixed, keys scaled (default)")
        print(*head(names, "r"), sep="\n")
        for heads, branches in SPLITS:
            columns = []
            for seeds, key_scale in (((None,), None), (SEEDS, 1.0), (SEEDS, None)):
                try:
                    made = [
                        split_latents(params, config.model, heads, branches, key_scale=key_scale, seed=seed)
                        for seed in seeds
                    ]
                except ConfigError:
                    break
                losses = [loss(model, split) for split, model in made]
                columns.append(", ".join(f"{x:.3f}" for x in losses))
            if columns:
                print(row((heads, branches, *columns)), flush=True)


if __name__ == "__main__":
    main()
