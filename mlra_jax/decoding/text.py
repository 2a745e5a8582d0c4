"""The text of one row as its tokens arrive: stop strings, and what may be shown already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mlra_jax.data.tokenizers import Tokenizer

FinishReason = Literal["eos", "stop", "length"]
"""The model ended the text; a stop string came; the row has all the tokens that it may have."""


class RowText:
    """Takes the tokens of one row one by one.

    Args:
      tokenizer: that made the prompt's tokens.
      stop: strings at which the text ends. The text is cut before the first one that is complete, wherever the
        boundaries of its tokens are; if a token completes several, before the one that begins first.
      eos_id: token that ends the text and is no part of it; None: none.
      max_new_tokens: at most so many tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], eos_id: int | None, max_new_tokens: int):
        self.text = ""
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        """None as long as more may come."""
        self._stream = tokenizer.stream()
        self._stop, self._eos_id, self._max = stop, eos_id, max_new_tokens
        self._shown = 0

    @property
    def done(self) -> bool:
        """Whether no more tokens are taken."""
        return self.finish_reason is not None

    def push(self, token: int) -> None:
        """Adds a token; does nothing once the text is finished."""
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
        """What came since the last call and is sure to stay: not what may turn out to begin a stop string."""
        held = 0
        if not self.done:
            longest = max(map(len, self._stop), default=1) - 1
            ends = range(min(longest, len(self.text) - self._shown), 0, -1)
            may_stop = lambda n: any(stop.startswith(self.text[-n:]) for stop in self._stop)
            held = next((n for n in ends if may_stop(n)), 0)
        new = self.text[self._shown : len(self.text) - held]
        self._shown += len(new)
        return new

    def _extend(self, piece: str) -> None:
        before = len(self.text)
        self.text += piece
        # A match must end in the new piece.
        found = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stop]
        if starts := [i for i in found if i >= 0]:
            self.text = self.text[: min(starts)]
            self.finish_reason = "stop"

    def _finish(self, reason: FinishReason) -> None:
        self._extend(self._stream.flush())
        self.finish_reason = self.finish_reason or reason
