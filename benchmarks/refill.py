"""How well rows that are refilled keep a device busy, against static batches and against the ideal.

    python -m benchmarks.refill                                    # tiny model, any device
    python -m benchmarks.refill --config mlra_4 --prompts 1000     # 2.9 B parameters, one GPU

Prompts of random tokens, whose lengths and those of their completions are drawn evenly from a range, with a shared
beginning on request, go through `GenerationLoop`. *Occupancy* is the share of the rows that made a token, over all
steps. A static batch would step until its longest completion is done.

The *ideal* time is that of all tokens of the prompts at the rate of the best chunk, and of all other tokens at the rate
of steps with every row busy, both measured here with the same programs, at the mean length of the cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np

from benchmarks import decode_step, records
from benchmarks.records import Setting
from mlra_jax.cli.configs import load_config
from mlra_jax.config import MeshConfig
from mlra_jax.generation.engine import LENGTH_UNIT, STEPS_PER_RUN, Engine, Request, Rows, round_up
from mlra_jax.generation.loop import GenerationLoop
from mlra_jax.sharding import make_mesh


def requests(
    n: int, prompt: Sequence[int], new: Sequence[int], shared: int, n_vocab: int, seed: int = 0
) -> list[Request]:
    """`n` requests with lengths drawn evenly from the two ranges; all begin with the same `shared` tokens."""
    rng = np.random.default_rng(seed)
    ids = lambda length: rng.integers(0, n_vocab, length).tolist()
    beginning = ids(shared)
    lengths = zip(rng.integers(*prompt, n, endpoint=True), rng.integers(*new, n, endpoint=True), strict=True)
    return [Request(beginning + ids(length), int(most)) for length, most in lengths]


def static_occupancy(asked: Sequence[Request], rows: int) -> float:
    """Of batches in the order of the requests, each of which ends with its longest completion."""
    later = [request.max_new_tokens - 1 for request in asked]
    batches = [later[i : i + rows] for i in range(0, len(later), rows)]
    return sum(later) / sum(rows * max(batch) for batch in batches)


def generate(engine: Engine, loop: GenerationLoop, asked: Sequence[Request]) -> float:
    """Seconds for all requests, without what is compiled."""
    start = engine.clock()
    for request in sorted(asked, key=lambda request: -request.max_new_tokens):  # as `Generator` does
        loop.submit(request)
    made = 0
    while loop.busy:
        made += sum(len(event.tokens) for event in loop.step())
    assert made == sum(request.max_new_tokens for request in asked)
    return engine.clock() - start


def best_times(
    engine: Engine, rows: Rows, context: int, shapes: Sequence[tuple[int, int]]
) -> tuple[float, float]:
    """Seconds of a token of a prompt in the best of the shapes, and of a step with every row busy."""
    per_token = []
    for n, size in shapes:
        chunk = {}
        for part in range(rows.n_parts):
            chunk |= {part * rows.part_rows + i: (0, np.zeros(size, np.int32)) for i in range(n)}

        def once(chunk: dict = chunk, n: int = n, size: int = size) -> float:
            start = time.perf_counter()
            rows.fill(chunk, n, size)
            jax.block_until_ready(rows.logits_BV)
            return time.perf_counter() - start

        once()
        per_token.append(statistics.median(once() for _ in range(5)) / (len(chunk) * size))

    def steps() -> float:
        with jax.set_mesh(engine.mesh):
            lengths = engine.put(np.full(rows.batch, context, np.int32), "batch")
            left_B = engine.put(np.full(rows.batch, STEPS_PER_RUN, np.int32))
        cache = dataclasses.replace(rows.state.cache, lengths=lengths)
        rows.state = dataclasses.replace(rows.state, cache=cache, left_B=left_B)
        jax.block_until_ready(rows.state)
        start = time.perf_counter()
        assert (np.asarray(rows.run().id_B) >= 0).all()
        return (time.perf_counter() - start) / STEPS_PER_RUN

    steps()
    return min(per_token), statistics.median(steps() for _ in range(3))


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--layers", type=int, default=0, help="0: the model's")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument(
        "--prompt", type=int, nargs=2, default=(8, 128), help="least and most tokens of a prompt"
    )
    parser.add_argument("--new", type=int, nargs=2, default=(4, 128), help="and of a completion")
    parser.add_argument("--shared", type=int, default=0, help="tokens with which all prompts begin")
    args = parser.parse_args()
    config = load_config(args.config).model
    config = dataclasses.replace(
        config, param_dtype=config.compute_dtype, n_layers=args.layers or config.n_layers
    )
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        engine = Engine(decode_step.random_model(config), mesh, config.vocab_size)
    asked = requests(args.prompts, args.prompt, args.new, args.shared, config.vocab_size)
    max_len = round_up(args.shared + args.prompt[1] + args.new[1], LENGTH_UNIT)
    setting = Setting.here("benchmarks.refill", sys.argv[1:])
    print(f"{setting.device}, {setting.date}, {records.versions(vars(setting))}\n`{setting.command}`")
    generate(engine, GenerationLoop(engine, args.rows, max_len), asked)  # compiles
    loop = GenerationLoop(engine, args.rows, max_len)
    seconds, stats = generate(engine, loop, asked), loop.stats
    tokens = sum(len(request.prompt) for request in asked)
    new = sum(request.max_new_tokens for request in asked)
    context = (tokens + new // 2) // len(asked)
    used = {key[3:] for key in engine.programs if key[0] == "prefill"}
    per_token, step = best_times(engine, loop.rows, context, sorted(used))
    ideal = stats.chunk_tokens * per_token + (new - len(asked)) / stats.rows * step
    print(
        f"{len(asked)} prompts, {tokens} tokens in, {new} tokens out, {stats.rows} rows of {max_len}",
        f"occupancy: {stats.occupancy:.1%}; of static batches {static_occupancy(asked, stats.rows):.1%}",
        f"prompts: {stats.chunk_tokens} tokens in {stats.chunks} chunks of {stats.chunk_positions} positions "
        f"({stats.chunk_tokens / stats.chunk_positions:.0%} of them tokens), {stats.shared_tokens} shared",
        f"steps: {stats.steps}, {1e3 * step:.2f} ms each with every row busy; a token of a prompt: "
        f"{1e6 * per_token:.1f} us",
        f"seconds: {seconds:.2f}, ideal {ideal:.2f}, ratio {seconds / ideal:.2f}; {new / seconds:.0f} tokens/s",
        sep="\n",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
