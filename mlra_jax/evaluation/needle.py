"""Retrieval from long contexts: whether a model finds a number (the needle) in a long text without meaning.

The task is that of Mohtashami and Jaggi (Landmark Attention, 2023): a pass key is said once, somewhere in repeated
sentences, and asked for at the end. It is made of the tokens of any tokenizer, so that a context has an exact length.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlra_jax.config import ConfigError
from mlra_jax.data.tokenizers import Tokenizer
from mlra_jax.evaluation.scoring import Pair, Scorer

TASK = "mlra_needle"
DEPTHS = (0, 25, 50, 75, 100)
"""Percent of the haystack before the needle."""
DIGITS = 5

HAYSTACK = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = " The pass key is {key}. Remember it."
QUESTION = " What is the pass key? The pass key is"


@dataclasses.dataclass(frozen=True)
class Found:
    """How often a model found the needle."""

    lengths: tuple[int, ...]
    """Tokens of a sequence, the answer included."""
    depths: tuple[int, ...]
    """Where the needle was, in percent of the text around it."""
    share: tuple[tuple[float, ...], ...]
    """Share of the questions that were answered right, for each length and depth."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def sequence(tokenizer: Tokenizer, length: int, depth: float, key: str) -> Pair:
    """The ids of a context and of its answer, `length` in all.

    Args:
      tokenizer: its end of text comes first, as before every document in training.
      length: tokens.
      depth: fraction of the haystack that comes before the needle.
      key: digits.

    Raises:
      ConfigError: the length leaves no room for a haystack.
    """
    needle, question = tokenizer.encode(NEEDLE.format(key=key)), tokenizer.encode(QUESTION)
    answer = tokenizer.encode(f" {key}")
    room = length - 1 - len(needle) - len(question) - len(answer)
    if room < 1:
        raise ConfigError(
            f"A sequence of {length} tokens has no room for a needle and a question of {length - room} tokens; use "
            "longer --needle-lengths."
        )
    haystack = np.resize(tokenizer.encode(HAYSTACK), room).tolist()
    before = round(depth * room)
    return [tokenizer.eot_id, *haystack[:before], *needle, *haystack[before:], *question], answer


def random_key(rng: np.random.Generator, digits: int = DIGITS) -> str:
    """A number that does not begin with 0."""
    first, *rest = rng.integers(0, 10, digits)
    return "".join(map(str, (max(first, 1), *rest)))


def find_needles(
    scorer: Scorer,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    depths: Sequence[int] = DEPTHS,
    *,
    samples: int = 8,
    digits: int = DIGITS,
    seed: int = 0,
    progress: bool = False,
) -> Found:
    """Asks for `samples` pass keys at each length and depth; all tokens of a right answer are the likeliest.

    Args:
      scorer: of the model; its sequences must be as long as the longest of `lengths`.
      tokenizer: the model's.
      lengths: tokens of a sequence.
      depths: percent of the haystack before the needle.
      samples: questions of each kind.
      digits: of a key.
      seed: of the keys.
      progress: whether to show a progress bar.
    """
    rng = np.random.default_rng(seed)
    kinds = list(itertools.product(lengths, depths))
    pairs = [
        sequence(tokenizer, n, depth / 100, random_key(rng, digits))
        for n, depth in kinds
        for _ in range(samples)
    ]
    right = [score.is_greedy for score in scorer.score(pairs, progress=progress)]
    share = np.reshape(right, (len(lengths), len(depths), samples)).mean(axis=2)
    return Found(tuple(lengths), tuple(depths), tuple(map(tuple, share.tolist())))


def heat_map(found: Found, title: str) -> Figure:
    """What was found, as a figure of its own."""
    size = 2 + 0.75 * len(found.lengths), 1.3 + 0.45 * len(found.depths)
    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots(), found, title)
    return figure


def draw(axes: Axes, found: Found, title: str) -> None:
    """Lengths from left to right, depths from top to bottom, each cell with its share."""
    share = np.array(found.share).T
    axes.imshow(share, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(found.lengths)), [f"{n:,}" for n in found.lengths])
    axes.set_yticks(range(len(found.depths)), [f"{depth} %" for depth in found.depths])
    axes.set(xlabel="tokens", ylabel="depth of the needle", title=title)
    for (row, column), value in np.ndenumerate(share):
        axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=8)
