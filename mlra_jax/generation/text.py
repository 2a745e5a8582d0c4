"""The text of one row as its tokens arrive: stop strings, and what may be shown already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mlra_jax.data.tokenizers import Tokenizer

FinishReason = Literal["eos", "stop", "length"]
"""The model ended the text, a stop string came, or the row has its maximum number of tokens."""


class RowText:
    """Assembles the text of one row token by token, each at constant cost.

    Args:
      tokenizer: the one that made the prompt's tokens.
      stop: strings at which the text ends. It is cut before the first complete one, wherever token boundaries are; if
        one token completes several, before the one that begins first.
      eos_id: token that ends the text and is not part of it; None: no token does.
      max_new_tokens: most tokens of the row.
      after: the prompt's last token, after which the text continues; None: the prompt is empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        eos_id: int | None,
        max_new_tokens: int,
        after: int | None = None,
    ):
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        """Why the text ended; None while it continues."""
        self._stream = tokenizer.stream(after)
        self._stop, self._eos_id, self._max = stop, eos_id, max_new_tokens
        self._sure: list[str] = []
        self._held = ""  # the longest end of the text that might begin a stop string
        self._taken = 0  # pieces of `_sure` that `take` has returned

    @property
    def text(self) -> str:
        """The text so far, whole characters only."""
        return "".join(self._sure) + self._held

    @property
    def done(self) -> bool:
        """Whether the text has ended."""
        return self.finish_reason is not None

    def push(self, token: int) -> None:
        """Adds a token; does nothing once the text has ended."""
        if self.done:
            return
        if token == self._eos_id:
            self._finish("eos")
            return
        self.tokens.append(token)
        self._extend(self._stream.push(token))
        if not self.done and len(self.tokens) == self._max:
            self._finish("length")

    def take(self) -> str:
        """The text since the last call, except an end that might begin a stop string."""
        new = "".join(self._sure[self._taken :])
        self._taken = len(self._sure)
        return new

    def _extend(self, piece: str) -> None:
        text = self._held + piece  # a stop string that ends in the piece begins in it
        if starts := [i for stop in self._stop if (i := text.find(stop)) >= 0]:
            self._sure.append(text[: min(starts)])
            self._held, self.finish_reason = "", "stop"
            return
        longest = max(map(len, self._stop), default=1) - 1
        ends = range(max(0, len(text) - longest), len(text))
        may_stop = lambda i: any(stop.startswith(text[i:]) for stop in self._stop)
        sure = next(filter(may_stop, ends), len(text))
        self._sure.append(text[:sure])
        self._held = text[sure:]

    def _finish(self, reason: FinishReason) -> None:
        self._extend(self._stream.flush())
        if not self.done:
            self._sure.append(self._held)
            self._held, self.finish_reason = "", reason
