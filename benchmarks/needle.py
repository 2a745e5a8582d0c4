"""A small model that learns to find a number in 512 tokens, and then, trained on, in 4096.

    python -m benchmarks.needle --out runs/needle

Makes a tokenizer of whole words, in which a number of three digits is one token, and shards of the task `mlra_needle`:
documents of all lengths up to that of a sequence. Trains a model of two layers from nothing on sequences of 512 tokens;
then from its parameters (`init_from`), with YaRN (`model.rotary_scaling`), on sequences of 4096. Asks both, and the
first with YaRN but not trained on, for numbers in sequences of up to 4096 tokens, and writes tables and a figure of
heat maps to the folder. Started again, it goes on where it was. Needs the `tokenizers` library.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import time

import jax
import numpy as np
import tokenizers
from matplotlib.figure import Figure
from tokenizers import models, pre_tokenizers

import mlra_jax as mlra
from mlra_jax.cli.evaluate import needle_table
from mlra_jax.data.shards import ShardWriter
from mlra_jax.data.tokenizers import get_tokenizer
from mlra_jax.evaluation import needle
from mlra_jax.evaluation.load import plan_evaluation
from mlra_jax.evaluation.scoring import Scorer
from mlra_jax.figures import save_figure

SHORT, LONG = 512, 4096
LENGTHS = (256, 512, 1024, 2048, 4096)
SHORTEST = 40
"""Tokens of the shortest document."""
DIGITS, SAMPLES = 3, 8
YARN = mlra.RotaryScalingConfig("yarn", factor=LONG / SHORT, original_max_position=SHORT)


def write_tokenizer(path: pathlib.Path) -> None:
    """The words and marks of the task, and the numbers of three digits."""
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    texts = (needle.HAYSTACK, needle.NEEDLE.format(key=""), needle.QUESTION)
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    end = "<|endoftext|>"
    vocabulary = {word: i for i, word in enumerate([end, *words, *map(str, range(100, 1000))])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=end))
    tokenizer.pre_tokenizer = split
    tokenizer.add_special_tokens([end])
    tokenizer.save(str(path))


def write_shards(folder: pathlib.Path, tokenizer: str, longest: int, tokens: int) -> None:
    """Documents of all lengths, evenly on a logarithmic scale, one after another; some are held out."""
    encoder, rng = get_tokenizer(tokenizer), np.random.default_rng(longest)
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in (("train", tokens), ("val", 20 * longest)):
        with ShardWriter(folder, "needle", split, tokenizer=tokenizer) as writer:
            while writer.n_tokens < n:
                length = round(np.exp(rng.uniform(np.log(SHORTEST), np.log(longest))))
                pair = needle.sequence(encoder, length, rng.random(), needle.random_key(rng, DIGITS))
                writer.write(np.concatenate(pair))


def run_config(out: pathlib.Path, length: int, batch: int, steps: int, lr: float) -> mlra.TrainConfig:
    """A run in `out` on the shards for `length` beside it."""
    attention = mlra.LatentAttentionConfig(
        n_latent_heads=2, n_branches=2, q_lora_rank=32, kv_lora_rank=64, d_nope=32, d_rope=32
    )
    return mlra.TrainConfig(
        name=out.name,
        out=str(out),
        model=mlra.ModelConfig(
            vocab_size=924,
            n_layers=2,
            d_model=64,
            n_heads=2,
            d_ff=128,
            attention=attention,
            compute_dtype="float32",
        ),
        execution=mlra.ExecutionConfig(remat="none"),
        data=mlra.DataConfig(
            path=str(out.parent / f"shards_{length}"),
            tokenizer=str(out.parent / "words.json"),
            seq_len=length,
            global_batch=batch,
            micro_batch=batch,
        ),
        optim=mlra.OptimConfig(lr=lr, min_lr=lr / 10, warmup_steps=steps // 20, decay_steps=steps - 1),
        mesh=mlra.MeshConfig(data=1),
        checkpoint=mlra.CheckpointConfig(every=50),
        log=mlra.LogConfig(every=10, eval_every=steps, eval_sequences=8, tensorboard=False),
        steps=steps,
        compilation_cache="",
    )


def ask(config: mlra.TrainConfig, scaling: mlra.RotaryScalingConfig) -> needle.Found:
    """What the run's last checkpoint finds, with this scaling of the rotary frequencies."""
    planned = plan_evaluation(config.run_dir, mlra.MeshConfig(data=1), seq_len=LONG, batch_size=2)
    model = dataclasses.replace(planned.config.model, rotary_scaling=scaling)
    planned = dataclasses.replace(planned, config=dataclasses.replace(planned.config, model=model))
    tokenizer = get_tokenizer(config.data.tokenizer)
    return needle.find_needles(
        Scorer(planned), tokenizer, LENGTHS, samples=SAMPLES, digits=DIGITS, progress=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/needle"))
    parser.add_argument("--steps", type=int, nargs=2, default=(800, 100), metavar=("SHORT", "LONG"))
    args = parser.parse_args()

    short = run_config(args.out / "short", SHORT, batch=8, steps=args.steps[0], lr=4e-3)
    long = run_config(args.out / "long", LONG, batch=2, steps=args.steps[1], lr=1e-3)
    long = dataclasses.replace(
        long, init_from=short.run_dir, model=dataclasses.replace(long.model, rotary_scaling=YARN)
    )
    if not (args.out / "words.json").exists():
        args.out.mkdir(parents=True, exist_ok=True)
        write_tokenizer(args.out / "words.json")
        for config in (short, long):
            tokens = config.data.seq_len * config.data.global_batch * config.steps
            write_shards(pathlib.Path(config.data.path), config.data.tokenizer, config.data.seq_len, tokens)

    found, start = {}, time.perf_counter()
    none = mlra.RotaryScalingConfig()
    for title, config, scaling in (
        (f"trained at {SHORT}", short, none),
        (f"trained at {SHORT}, with YaRN", short, YARN),
        (f"trained on at {LONG}, with YaRN", long, YARN),
    ):
        mlra.train(config)
        found[title] = ask(config, scaling)
        minutes = (time.perf_counter() - start) / 60
        print(
            f"\n{title} ({minutes:.0f} min so far): found, in percent\n",
            *needle_table(found[title]),
            sep="\n",
        )

    figure = Figure(figsize=(13, 3.2), layout="constrained")
    for axes, (title, result) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        needle.draw(axes, result, title)
    save_figure(figure, args.out / "needle.png")
    print(f"\n{args.out / 'needle.png'} · {jax.devices()[0].device_kind}, jax {jax.__version__}")


if __name__ == "__main__":
    main()
