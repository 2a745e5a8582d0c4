"""The text of one row as its tokens arrive: stop strings, and what may be shown already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mlra_jax.data.tokenizers import Tokenizer

FinishReason = Literal["eos", "stop", "length"]
"""The model ended the text; a stop string came; the row has all the tokens that it may have."""


class RowText:
    """Takes the tokens of one row one by one, each at the same cost.

    Args:
      tokenizer: that made the prompt's tokens.
      stop: strings at which the text ends. The text is cut before the first one that is complete, wherever the
        boundaries of its tokens are; if a token completes several, before the one that begins first.
      eos_id: token that ends the text and is no part of it; None: none.
      max_new_tokens: at most so many tokens.
      after: the prompt's last token; None: it has none. The text is what its tokens add to the prompt.
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
        """None as long as more may come."""
        self._stream = tokenizer.stream(after)
        self._stop, self._eos_id, self._max = stop, eos_id, max_new_tokens
        self._sure: list[str] = []
        self._held = ""  # the longest end of the text that may turn out to begin a stop string
        self._taken = 0  # pieces of `_sure`

    @property
    def text(self) -> str:
        """All of it so far, whole characters only."""
        return "".join(self._sure) + self._held

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
        new = "".join(self._sure[self._taken :])
        self._taken = len(self._sure)
        return new

    def _extend(self, piece: str) -> None:
        text = self._held + piece  # a stop string that ends in the piece begins in here
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
