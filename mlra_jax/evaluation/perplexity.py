"""Perplexity of token shards.

A shard is split into consecutive windows of T inputs: each token but the first is predicted once, from the tokens
before it in its window, across document boundaries, with a softmax over all V ids. That is the paper's protocol
(`eval_ppl.py` of its PyTorch code), except that the paper stops early; see `paper_sequences`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mlra_jax.config import DataConfig, require
from mlra_jax.data.pipeline import IGNORED, Batch, EvalBatches, Windows, one_ahead, open_part
from mlra_jax.data.shards import DataError, open_files
from mlra_jax.evaluation.load import Evaluated
from mlra_jax.generation.sampling import NotFiniteError
from mlra_jax.training.step import make_eval_step

Protocol = Literal["exact", "paper"]

PAPER_BATCH = 6
PAPER_TOKENS = 10**8


def paper_sequences(n_tokens: int, seq_len: int) -> int:
    """The number of windows that the paper evaluates in a shard of `n_tokens`: whole batches of 6, at most 10^8 tokens.

    All batches have the same number of tokens, so the paper's mean of batch means is the mean over these windows.
    """
    batch_tokens = PAPER_BATCH * seq_len
    return PAPER_BATCH * min(PAPER_TOKENS // batch_tokens, (n_tokens - 1) // batch_tokens)


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The result for one shard."""

    name: str
    """Path or URL of the shard."""
    tokens: int
    """Number of predicted tokens."""
    nats_per_token: float
    """Mean cross-entropy."""
    n_bytes: int | None
    """Bytes of text of these tokens; end of text has none. None: unknown."""
    seconds: float
    """Time taken."""

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float | None:
        """Total cross-entropy over bytes of text, comparable between tokenizers. None: unknown."""
        if not self.n_bytes:
            return None
        return self.nats_per_token * self.tokens / math.log(2) / self.n_bytes

    def as_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        derived = {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return dataclasses.asdict(self) | derived


def mean(results: Sequence[Perplexity]) -> dict[str, float | None]:
    """Unweighted means over shards (the paper's "Avg" is that of the perplexities)."""
    keys = ("nats_per_token", "perplexity", "bits_per_byte")
    columns = {key: [getattr(r, key) for r in results] for key in keys}
    return {key: None if None in column else float(np.mean(column)) for key, column in columns.items()}


@dataclasses.dataclass(frozen=True)
class Part:
    """What to evaluate of one shard."""

    name: str
    """Path or URL of the shard."""
    batches: EvalBatches
    """Its windows."""


def open_parts(
    paths: Sequence[str], config: DataConfig, vocab_size: int, protocol: Protocol = "exact"
) -> list[Part]:
    """Opens what to evaluate, one part per shard.

    Args:
      paths: shards, folders of shards (all their `*.bin`) or bucket URLs of either; or `embedded`, the held-out split
        of the package's corpus. Empty: the validation shards of `config`.
      config: gives T, and the tokenizer that shards must have been made with; with `verify`, tokens are first checked
        against their checksums.
      vocab_size: ids must be below it.
      protocol: `exact`: all tokens, an incomplete last window included; `paper`: see `paper_sequences`.

    Raises:
      DataError, ValueError: a shard cannot be used, or is too short; says which.
    """
    require(Protocol, protocol=protocol)
    parts, faults = [], []
    for path in paths or [config.path]:
        if path == "embedded" or not paths:
            shards = open_part(dataclasses.replace(config, path=path), "val", vocab_size)
        else:
            shards = open_files(path, config.verify, config.tokenizer)
        windows = Windows(shards, config.seq_len, vocab_size, tails=True)
        for i, (name, n_tokens) in enumerate(zip(shards.names, shards.n_tokens, strict=True)):
            first, count = windows.first_of_shard(i), int(windows.per_shard[i])
            if protocol == "paper":
                count = paper_sequences(n_tokens, config.seq_len)
            if not count:
                needed = 2 if protocol == "exact" else PAPER_BATCH * config.seq_len + 1
                faults.append(
                    f"{name} has {n_tokens} tokens; the {protocol} protocol needs at least {needed}."
                )
                continue
            windows.read([first])  # a vocabulary that does not fit shows before anything is compiled
            parts.append(Part(name, EvalBatches(windows, count, first)))
    if faults:
        raise DataError(faults)
    return parts


def count_bytes(lengths_V: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """A compiled function of targets, sharded in any way: the bytes (int32 scalar) that the counted ones stand for."""

    def count(targets: jax.Array) -> jax.Array:
        lengths = jnp.asarray(lengths_V).at[targets].get(out_sharding=jax.typeof(targets).sharding)
        return jnp.sum(jnp.where(targets != IGNORED, lengths, 0))

    return jax.jit(count)


def evaluate(
    model: Evaluated, parts: Sequence[Part], byte_lengths: np.ndarray | None = None, *, progress: bool = False
) -> Iterator[Perplexity]:
    """Evaluates one part after the other; every process of a cluster calls it and gets the same results.

    Args:
      model: on its mesh.
      parts: see `open_parts`.
      byte_lengths: see `Tokenizer.byte_lengths`; None: do not count bytes.
      progress: whether to show a progress bar, if standard error is a terminal.

    Raises:
      NotFiniteError: the cross-entropy of a part is NaN or infinite.
    """
    sharding, seq_len = model.batch_sharding, model.seq_len
    rows = model.rows(max(part.batches.n_sequences for part in parts))
    step = make_eval_step(model.config)
    bytes_of = None
    if byte_lengths is not None:  # ids past the tokenizer's own stand for no text
        padded = np.zeros(model.config.model.vocab_size, np.int32)
        padded[: len(byte_lengths)] = byte_lengths
        bytes_of = count_bytes(padded)

    def measure(batch: Batch) -> tuple[Any, ...]:
        sums = step(model.params, batch)
        return (*sums, bytes_of(batch["targets"])) if bytes_of else sums

    total = sum(part.batches.n_sequences for part in parts) * seq_len
    bar = tqdm(
        total=total, unit="tok", unit_scale=True, dynamic_ncols=True, disable=None if progress else True
    )
    with bar, jax.set_mesh(model.mesh):
        for part in parts:
            start = time.monotonic()
            bar.set_description(part.name.rsplit("/", 1)[-1])
            sums: list[tuple[np.ndarray, ...]] = []
            for result in one_ahead(map(measure, part.batches.device_batches(sharding, 1, rows))):
                sums.append(result)
                bar.update(int(result[1]))
            nats, tokens, *n_bytes = (
                float(np.sum(column, dtype=np.float64)) for column in zip(*sums, strict=True)
            )
            if not math.isfinite(nats):
                raise NotFiniteError(
                    f"{part.name}: the cross-entropy is {nats}; the weights of this checkpoint are no good, take one "
                    "from before its training diverged."
                )
            yield Perplexity(
                name=part.name,
                tokens=int(tokens),
                nats_per_token=nats / tokens,
                n_bytes=int(n_bytes[0]) if n_bytes else None,
                seconds=time.monotonic() - start,
            )
