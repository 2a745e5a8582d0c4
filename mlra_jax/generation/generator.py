"""Prompts in, strings out: `Generator` puts tokenizer, engine and stop strings together.

generator = Generator.from_checkpoint("runs/tiny", mesh=MeshConfig(data=1, tensor=4))
generator.generate("ROMEO:", max_new_tokens=200, temperature=0.8, top_p=0.95)
"""

from __future__ import annotations

import dataclasses
import itertools
import numbers
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, overload

import jax
import numpy as np
import tyro

from mlra_jax.config import ConfigError, MeshConfig, NotNegative, Positive, Seed, Validated
from mlra_jax.data.tokenizers import Tokenizer
from mlra_jax.generation.engine import LENGTH_UNIT, NO_TOKEN, STEPS_PER_RUN, Engine, Rows, round_up
from mlra_jax.generation.load import ONE_DEVICE, ParamDtype, SplitHeads, load_model
from mlra_jax.generation.sampling import GREEDY, NO_NUMBER, NotFiniteError, Sampling
from mlra_jax.generation.text import FinishReason, RowText

STEPS_BETWEEN_STOPS = 16
"""Steps between looks at the text for stop strings: no row runs on for longer after one."""


@dataclasses.dataclass(frozen=True)
class GenerationOptions(Validated):
    """What to generate from each prompt."""

    max_new_tokens: Positive = 128
    """Tokens of a completion, at most."""
    sampling: Annotated[Sampling, tyro.conf.OmitArgPrefixes] = GREEDY
    """How each token is drawn."""
    seed: Seed = 0
    """Of the drawing. A completion depends on its prompt, this and the sample's number, not on the other prompts."""
    n: Positive = 1
    """Samples of each prompt."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Ends a completion before this string; repeat it for several."""
    ignore_eos: bool = False
    """Go on after the end-of-text token."""
    max_len: NotNegative = 0
    """Tokens that the cache holds for each row, prompt and completion together; 0: what the longest one needs."""
    overflow: Literal["refuse", "truncate-left", "shorten"] = "refuse"
    """What happens where prompt and completion exceed max_len: refuse; truncate-left drops the beginning of the
    prompt; shorten ends the completion early."""
    batch_size: Positive = 64
    """Rows (prompts times samples) that are generated at a time, at most."""

    def conflicts(self) -> list[str]:
        faults = []
        if self.n > 1 and self.sampling.temperature == 0:
            faults.append(f"n={self.n} greedy samples would all be the same; give a temperature above 0.")
        if self.batch_size < self.n:
            faults.append(
                f"batch_size={self.batch_size} must be at least n={self.n}: a prompt's samples are one batch."
            )
        if "" in self.stop:
            faults.append("A stop string must not be empty.")
        return faults


DEFAULTS = GenerationOptions()

Prompt = str | Sequence[int]
"""Text, or its token ids."""


def changed(options: GenerationOptions, **changes: Any) -> GenerationOptions:
    """`options` with some fields changed, those of its `sampling` too.

    Raises:
      TypeError: there is no such field; names those that there are.
    """
    names = lambda cls: [field.name for field in dataclasses.fields(cls)]
    known = [*names(GenerationOptions), *names(Sampling)]
    if unknown := [name for name in changes if name not in known]:
        raise TypeError(f"Generation has no option {', '.join(unknown)}; there are: {', '.join(known)}.")
    drawing = {name: changes.pop(name) for name in names(Sampling) if name in changes}
    sampling = dataclasses.replace(changes.pop("sampling", options.sampling), **drawing)
    return dataclasses.replace(options, sampling=sampling, **changes)


@dataclasses.dataclass(frozen=True)
class BatchStats:
    """How the batch was generated in which a completion was; all its rows share one."""

    rows: int
    """Completions in the batch."""
    seconds_to_first_token: float
    """From the tokenized prompts to the first token of every row on the host, without compiling."""
    tokens_per_second: float | None
    """Tokens after the first ones, of all rows together, by the seconds they took; None: there were none."""
    compile_seconds: float
    """Compiling took this long."""
    cache_bytes_per_device: int
    """Bytes of the KV cache on the device that holds most."""
    cache_tokens_per_row: int
    """Tokens that the cache holds for each row."""
    devices: int
    """In the mesh."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """What came of one sample of one prompt."""

    prompt_index: int
    """Which prompt, from 0."""
    sample: int
    """Which of its samples, from 0."""
    prompt: Prompt
    """As given."""
    text: str
    """The completion, without stop string or end of text: what its tokens add to the prompt, a space first included."""
    tokens: list[int]
    """Its ids, without end of text. With finish reason `stop` they are those that complete the stop string."""
    finish_reason: FinishReason
    """`eos`, `stop` or `length`."""
    prompt_tokens: int
    """Tokens of the prompt that the model has seen."""
    prompt_tokens_dropped: int
    """Tokens cut off at the beginning of the prompt, with `overflow` truncate-left."""
    stats: BatchStats
    """Of its batch."""


@dataclasses.dataclass(frozen=True)
class Delta:
    """More text of one completion."""

    prompt_index: int
    """Which prompt, from 0."""
    sample: int
    """Which of its samples, from 0."""
    text: str
    """What is new: whole characters, and nothing that may still turn out to begin a stop string."""


@dataclasses.dataclass(frozen=True)
class FittedPrompt:
    """A prompt that fits the cache together with its completion."""

    index: int
    given: Prompt
    ids: list[int]
    dropped: int
    max_new_tokens: int


_OVERFLOW_HINTS = {
    "refuse": "; raise it, or cut with overflow truncate-left or shorten",
    "truncate-left": ", and nothing of the prompt would be left",
    "shorten": ", and nothing would be left to generate",
}


def is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is a single prompt, and not several."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], numbers.Integral))


def fit_prompts(
    prompts: Sequence[Prompt], options: GenerationOptions, tokenizer: Tokenizer
) -> list[FittedPrompt]:
    """The prompts' tokens, cut as `options.overflow` says; an empty prompt becomes the end-of-text token.

    Raises:
      ConfigError: there is none, or some do not fit or hold ids that the tokenizer lacks: all of them are listed.
    """
    if len(prompts) == 0:
        raise ConfigError(["There is no prompt."])
    fitted, faults = [], []
    for index, given in enumerate(prompts):
        ids = tokenizer.encode(given) if isinstance(given, str) else [int(token) for token in given]
        ids = ids or [tokenizer.eot_id]
        if wrong := [token for token in ids if not 0 <= token < tokenizer.n_vocab]:
            faults.append(
                f"Prompt {index} has the token id {wrong[0]}; ids are 0 to {tokenizer.n_vocab - 1}."
            )
        new, room, dropped = options.max_new_tokens, options.max_len, 0
        if room and len(ids) + new > room:
            if options.overflow == "truncate-left" and new < room:
                dropped = len(ids) - (room - new)
            elif options.overflow == "shorten" and len(ids) < room:
                new = room - len(ids)
            else:
                faults.append(
                    f"Prompt {index} has {len(ids)} tokens; with max_new_tokens={new} that is more than "
                    f"max_len={room}{_OVERFLOW_HINTS[options.overflow]}."
                )
        fitted.append(FittedPrompt(index, given, ids[dropped:], dropped, new))
    if faults:
        raise ConfigError(faults)
    return fitted


class Generator:
    """Text generation with one model.

    Args:
      engine: the model on its mesh.
      tokenizer: of the model.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.engine, self.tokenizer = engine, tokenizer

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str,
        *,
        mesh: MeshConfig = ONE_DEVICE,
        split_heads: SplitHeads = "auto",
        param_dtype: ParamDtype = "auto",
        step: int | None = None,
        tokenizer: str = "",
    ) -> Generator:
        """Reads a training run's checkpoint onto a mesh; every process of a cluster calls it.

        Args:
          checkpoint: a run's folder, its `checkpoints` folder or one step's folder; local or a bucket URL.
          mesh: sizes of the mesh; their product is the number of devices it takes.
          split_heads: whether the query heads of W_qb and W_o are split over `tensor` too; see
            `mlra_jax.generation.load.splits_heads`.
          param_dtype: type in which weights are held; see `mlra_jax.generation.load.load_model`.
          step: updates made by the checkpoint; None: the latest.
          tokenizer: see `mlra_jax.data.get_tokenizer`; empty: the one that the run was trained with.

        Raises:
          ConfigError: mesh, model and tokenizer do not fit together; nothing has been allocated then.
          CheckpointError: there is no such checkpoint, or it does not fit its own configuration.
          ValueError: the tokenizer is not available here.
        """
        loaded = load_model(
            checkpoint,
            mesh,
            split_heads=split_heads,
            param_dtype=param_dtype,
            step=step,
            tokenizer=tokenizer,
        )
        return cls(Engine(loaded.model, loaded.mesh, loaded.tokenizer.n_vocab), loaded.tokenizer)

    @overload
    def generate(self, prompts: Prompt, options: GenerationOptions = DEFAULTS, **changes: Any) -> str: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], options: GenerationOptions = DEFAULTS, **changes: Any
    ) -> list[str]: ...
    def generate(
        self, prompts: Prompt | Sequence[Prompt], options: GenerationOptions = DEFAULTS, **changes: Any
    ) -> str | list[str]:
        """The completion of a prompt, or those of several prompts: n for each, in order.

        Args:
          prompts: one, or a sequence of them; each a string or a list of token ids.
          options: what to generate.
          **changes: fields of `GenerationOptions` or of its `Sampling` that differ from `options`, such as
            max_new_tokens=200 or temperature=0.8.

        Raises:
          ConfigError: an option or token id is not legal, or prompt and completion do not fit max_len or the devices'
            memory.
          NotFiniteError: the logits after a text are NaN or infinite; names the prompt and the position.
          TypeError: there is no such option.
          ValueError: one prompt was given, not as a list, and several samples asked for.
        """
        completions = self.complete(prompts, options, **changes)
        if not is_one(prompts):
            return [c.text for c in completions]
        if len(completions) > 1:
            raise ValueError(f"n={len(completions)} samples of one prompt: give it as a list, to get a list.")
        return completions[0].text

    def complete(
        self, prompts: Prompt | Sequence[Prompt], options: GenerationOptions = DEFAULTS, **changes: Any
    ) -> list[Completion]:
        """As `generate`, with tokens, finish reasons and statistics; always a list."""
        events = self.stream(prompts, options, every_token=False, **changes)
        return [event for event in events if isinstance(event, Completion)]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        options: GenerationOptions = DEFAULTS,
        *,
        every_token: bool = True,
        **changes: Any,
    ) -> Iterator[Delta | Completion]:
        """As `complete`, while it is generated: text as it comes, and the completions when their batch is done.

        With `every_token` steps are run one at a time, else in compiled loops, and text comes in larger pieces.
        """
        options = changed(options, **changes)
        options.validate()
        several: Any = [prompts] if is_one(prompts) else prompts
        fitted = fit_prompts(several, options, self.tokenizer)
        # All batches get one shape, so that they are compiled once.
        batch = min(len(fitted), options.batch_size // options.n)
        max_len = options.max_len or round_up(max(len(p.ids) + p.max_new_tokens for p in fitted), LENGTH_UNIT)
        self.engine.check_memory(batch, options.n, max_len)
        batches = [fitted[i : i + batch] for i in range(0, len(fitted), batch)]
        return itertools.chain.from_iterable(
            self._batch(b, options, batch, max_len, every_token) for b in batches
        )

    def _last(self, prompt: FittedPrompt) -> int | None:
        """The last token of a prompt's text; None: it is empty."""
        return None if prompt.ids[-1] == self.tokenizer.eot_id else prompt.ids[-1]

    def _batch(
        self,
        prompts: list[FittedPrompt],
        options: GenerationOptions,
        batch: int,
        max_len: int,
        every_token: bool,
    ) -> Iterator[Delta | Completion]:
        engine, n = self.engine, options.n
        eos_id = None if options.ignore_eos else self.tokenizer.eot_id
        clock = _Clock(engine)
        rows = engine.start(
            [p.ids for p in prompts],
            [p.max_new_tokens for p in prompts],
            n=n,
            sampling=options.sampling,
            seed=options.seed,
            eos_id=eos_id,
            max_len=max_len,
            batch=batch,
        )
        owners = [(prompt, sample) for prompt in prompts for sample in range(n)]
        texts = [
            RowText(self.tokenizer, options.stop, eos_id, prompt.max_new_tokens, self._last(prompt))
            for prompt, _ in owners
        ]
        longest = max(prompt.max_new_tokens for prompt in prompts)
        received, pending = 0, rows.first_B
        ahead: jax.Array | None = None
        while True:
            tokens = np.asarray(pending).reshape(-1, len(rows.first_B))
            assert (tokens != NO_TOKEN).any()  # the device counts as the host does
            received += len(tokens)
            clock.read()
            stopped = []
            for row, (text, (prompt, sample)) in enumerate(zip(texts, owners, strict=True)):
                if text.done:
                    continue
                for token in tokens[:, row]:
                    if token == NO_NUMBER and not text.done:
                        raise NotFiniteError(
                            f"Prompt {prompt.index}, sample {sample}: the logits for the token at position "
                            f"{len(prompt.ids) + len(text.tokens)} are NaN or infinite; the weights of this checkpoint "
                            "are no good, take one from before its training diverged."
                        )
                    if token != NO_TOKEN:
                        text.push(int(token))
                if text.finish_reason == "stop":
                    stopped.append(row)
                if new := text.take():
                    yield Delta(prompt.index, sample, new)
            if all(text.done for text in texts):
                break
            if stopped:
                rows.stop(stopped)
            if every_token:  # the next step is under way while the host looks at this one's tokens
                pending = rows.step() if ahead is None else ahead
                ahead = rows.step() if received + 1 < longest else None
            else:
                pending = rows.run(STEPS_BETWEEN_STOPS if options.stop else STEPS_PER_RUN)

        stats = clock.stats(rows, texts)
        for text, (prompt, sample) in zip(texts, owners, strict=True):
            assert text.finish_reason is not None
            yield Completion(
                prompt_index=prompt.index,
                sample=sample,
                prompt=prompt.given,
                text=text.text,
                tokens=text.tokens,
                finish_reason=text.finish_reason,
                prompt_tokens=len(prompt.ids),
                prompt_tokens_dropped=prompt.dropped,
                stats=stats,
            )


class _Clock:
    """Times a batch; what the engine compiles meanwhile does not count."""

    def __init__(self, engine: Engine):
        self._engine, self._compiled = engine, engine.compile_seconds
        self._start = self._now()
        self._reads: list[float] = []

    def _now(self) -> float:
        return time.perf_counter() - self._engine.compile_seconds

    def read(self) -> None:
        """Tokens have arrived on the host."""
        self._reads = [*self._reads[:1], self._now()]

    def stats(self, rows: Rows, texts: list[RowText]) -> BatchStats:
        """After the last tokens."""
        later_tokens = sum(max(0, len(text.tokens) - 1) for text in texts)
        return BatchStats(
            rows=len(texts),
            seconds_to_first_token=self._reads[0] - self._start,
            tokens_per_second=later_tokens / (self._reads[-1] - self._reads[0]) if later_tokens else None,
            compile_seconds=self._engine.compile_seconds - self._compiled,
            cache_bytes_per_device=rows.cache_bytes_per_device,
            cache_tokens_per_row=rows.state.cache.capacity,
            devices=self._engine.mesh.size,
        )
