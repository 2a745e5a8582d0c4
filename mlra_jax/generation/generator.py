"""Prompts in, text out: `Generator` combines tokenizer, engine and stop strings.

generator = Generator.from_checkpoint("runs/tiny", mesh=MeshConfig(data=1, tensor=4))
generator.generate("ROMEO:", max_new_tokens=200, temperature=0.8, top_p=0.95)
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, overload

import tyro

from mlra_jax.config import ConfigError, MeshConfig, NotNegative, Positive, Seed, Validated
from mlra_jax.data.tokenizers import Tokenizer
from mlra_jax.generation.engine import LENGTH_UNIT, STEPS_PER_RUN, Engine, Logprobs, Request, round_up
from mlra_jax.generation.load import ONE_DEVICE, load_model
from mlra_jax.generation.loop import Event, GenerationLoop
from mlra_jax.generation.sampling import GREEDY, NotFiniteError, Sampling
from mlra_jax.generation.text import FinishReason, RowText


@dataclasses.dataclass(frozen=True)
class GenerationOptions(Validated):
    """What to generate from each prompt."""

    max_new_tokens: Positive = 128
    """Most tokens of a completion."""
    sampling: Annotated[Sampling, tyro.conf.OmitArgPrefixes] = GREEDY
    """How each token is chosen."""
    seed: Seed = 0
    """Sampling seed. A completion depends on it, its prompt and the sample's number, but not on other prompts."""
    n: Positive = 1
    """Samples per prompt."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """End a completion before this string; repeat the option for several strings."""
    ignore_eos: bool = False
    """Continue after the end-of-text token."""
    max_len: NotNegative = 0
    """Tokens that the cache holds per row, for prompt and completion; 0: what the longest one needs."""
    overflow: Literal["refuse", "truncate-left", "shorten"] = "refuse"
    """What to do if prompt and completion exceed max_len: refuse; truncate-left drops the beginning of the prompt;
    shorten ends the completion early."""
    batch_size: Positive = 64
    """Most completions that are generated at a time; the next one begins when one has ended."""
    logprobs: Logprobs | None = None
    """Also give the log-probability of each token, and of this many most probable ones. Not in the printed text: see
    --json."""

    def conflicts(self) -> list[str]:
        faults = []
        if self.n > 1 and self.sampling.temperature == 0:
            faults.append(f"n={self.n} greedy samples would all be the same; give a temperature above 0.")
        if "" in self.stop:
            faults.append("A stop string must not be empty.")
        return faults


DEFAULTS = GenerationOptions()

Prompt = str | Sequence[int]
"""Text, or its token ids."""
Options = GenerationOptions | Sequence[GenerationOptions]
"""Options for all prompts, or for each."""


def changed(options: GenerationOptions, **changes: Any) -> GenerationOptions:
    """`options` with some fields changed, including those of its `sampling`.

    Raises:
      TypeError: there is no such field (the message names all fields), or `sampling` is not a `Sampling`.
    """
    names = lambda x: [field.name for field in dataclasses.fields(x)]
    sampling = changes.pop("sampling", options.sampling)
    if not isinstance(sampling, Sampling):
        raise TypeError(f"sampling={sampling!r} must be a Sampling, not {type(sampling).__name__}.")
    known = [*names(options), *names(sampling)]
    if unknown := [name for name in changes if name not in known]:
        raise TypeError(f"Generation has no option {', '.join(unknown)}; there are: {', '.join(known)}.")
    of_sampling = {name: changes.pop(name) for name in names(sampling) if name in changes}
    return dataclasses.replace(options, sampling=dataclasses.replace(sampling, **of_sampling), **changes)


def options_by_prompt(options: Options, n_prompts: int, **changes: Any) -> list[GenerationOptions]:
    """The options of each prompt.

    Args:
      options: for all prompts, or a list with one for each.
      n_prompts: number of prompts.
      **changes: see `changed`; a list, except for `stop`, holds one value for each prompt.

    Raises:
      ConfigError: a list has another length, a value is not legal, or `max_len` or `batch_size` differ.
      TypeError: there is no such option.
    """
    given = {"options": options, **changes}
    lists = {k: v for k, v in given.items() if isinstance(v, list | tuple) and k != "stop"}
    faults = [
        f"{name} has {len(values)} values for {n_prompts} prompt(s); give one for each prompt, or one for all."
        for name, values in lists.items()
        if len(values) != n_prompts
    ]
    if not faults:
        one = lambda i: changed(**given | {name: values[i] for name, values in lists.items()})
        found = [one(i) for i in range(n_prompts)]
        faults = [*dict.fromkeys(fault for options in found for fault in options.faults())]
        for name in ("max_len", "batch_size"):
            if len(values := {getattr(options, name) for options in found}) > 1:
                faults.append(f"{name} must be the same for all prompts, not {sorted(values)}.")
    if faults:
        raise ConfigError(faults)
    return found


@dataclasses.dataclass(frozen=True)
class CompletionStats:
    """Time and memory that a completion took, and its batch until then. No time includes compilation."""

    rows: int
    """Rows of the batch: completions that are generated at a time."""
    seconds_to_first_token: float
    """From tokenized prompts to this completion's first token on the host, its wait for a row included."""
    seconds: float
    """From tokenized prompts to its last token on the host."""
    tokens_per_second: float | None
    """Rate of its tokens after the first; None: there were none."""
    occupancy: float | None
    """Share of the rows that made a token, over all steps of the batch so far; None: there was no step."""
    compile_seconds: float
    """Time spent compiling so far."""
    cache_bytes_per_device: int
    """Bytes of the KV cache on the device that holds the most."""
    cache_tokens_per_row: int
    """Tokens that the cache can hold per row."""
    devices: int
    """Devices in the mesh."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sample for one prompt."""

    prompt_index: int
    """Which prompt, from 0."""
    sample: int
    """Which of its samples, from 0."""
    prompt: Prompt
    """The prompt, as given."""
    text: str
    """What the completion's tokens add to the prompt, a leading space included; without stop string or end of text."""
    tokens: list[int]
    """Its token ids, without the end of text. With finish reason `stop`, they include the stop string."""
    finish_reason: FinishReason
    """`eos` (end-of-text token), `stop` (stop string) or `length`."""
    prompt_tokens: int
    """Tokens of the prompt that the model was given."""
    prompt_tokens_dropped: int
    """Tokens dropped from the beginning of the prompt (`overflow` truncate-left)."""
    stats: CompletionStats
    """What it took."""
    logprobs: list[float] | None = None
    """Natural logarithm of each token's probability under the model itself (temperature 1, no filter, no penalty)."""
    top_logprobs: list[list[tuple[int, float]]] | None = None
    """For each token's place, the most probable ids with theirs, the most probable first."""


@dataclasses.dataclass(frozen=True)
class Delta:
    """A new piece of text of one completion."""

    prompt_index: int
    """Which prompt, from 0."""
    sample: int
    """Which of its samples, from 0."""
    text: str
    """The new text: whole characters only, and nothing that might still become part of a stop string."""


@dataclasses.dataclass(frozen=True)
class FittedPrompt:
    """A prompt that fits into the cache together with its completion."""

    index: int
    given: Prompt
    ids: list[int]
    dropped: int
    options: GenerationOptions
    """The prompt's options, with `max_new_tokens` reduced to the room there is."""


_OVERFLOW_HINTS = {
    "refuse": "; raise it, or cut with overflow truncate-left or shorten",
    "truncate-left": ", and nothing of the prompt would be left",
    "shorten": ", and nothing would be left to generate",
}


def is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is a single prompt rather than several."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], numbers.Integral))


def fit_prompts(
    prompts: Sequence[Prompt], options: Sequence[GenerationOptions], tokenizer: Tokenizer
) -> list[FittedPrompt]:
    """The prompts' tokens, cut as each one's `overflow` says; an empty prompt becomes the end-of-text token.

    Raises:
      ConfigError: there is no prompt, or some do not fit or have ids that the tokenizer lacks; lists all of them.
    """
    if len(prompts) == 0:
        raise ConfigError("There is no prompt.")
    fitted, faults = [], []
    for index, (given, own) in enumerate(zip(prompts, options, strict=True)):
        ids = tokenizer.encode(given) if isinstance(given, str) else [int(token) for token in given]
        ids = ids or [tokenizer.eot_id]
        if wrong := [token for token in ids if not 0 <= token < tokenizer.n_vocab]:
            faults.append(
                f"Prompt {index} has the token id {wrong[0]}; ids are 0 to {tokenizer.n_vocab - 1}."
            )
        new, room, dropped = own.max_new_tokens, own.max_len, 0
        if room and len(ids) + new > room:
            if own.overflow == "truncate-left" and new < room:
                dropped = len(ids) - (room - new)
            elif own.overflow == "shorten" and len(ids) < room:
                new = room - len(ids)
            else:
                faults.append(
                    f"Prompt {index} has {len(ids)} tokens; with max_new_tokens={new} that is more than "
                    f"max_len={room}{_OVERFLOW_HINTS[own.overflow]}."
                )
        own = dataclasses.replace(own, max_new_tokens=new)
        fitted.append(FittedPrompt(index, given, ids[dropped:], dropped, own))
    if faults:
        raise ConfigError(faults)
    return fitted


class Generator:
    """Text generation with one model.

    Args:
      engine: the model on its mesh.
      tokenizer: the model's tokenizer.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.engine, self.tokenizer = engine, tokenizer

    @classmethod
    def from_checkpoint(cls, checkpoint: str, *, mesh: MeshConfig = ONE_DEVICE, **options: Any) -> Generator:
        """Reads a training run's checkpoint onto a mesh; every process of a cluster calls it.

        Args:
          checkpoint: a run's folder, its `checkpoints` folder or one step's folder; local or a bucket URL.
          mesh: sizes of the mesh; their product is the number of devices that are used.
          **options: `split_heads`, `param_dtype`, `step` and `tokenizer`, as in `load_model`.

        Raises:
          ConfigError: mesh, model and tokenizer do not fit together; nothing has been allocated.
          CheckpointError: there is no such checkpoint, or it does not fit its own configuration.
          ValueError: the tokenizer is not available.
        """
        loaded = load_model(checkpoint, mesh, **options)
        return cls(Engine(loaded.model, loaded.mesh, loaded.tokenizer.n_vocab), loaded.tokenizer)

    @overload
    def generate(self, prompts: Prompt, options: Options = DEFAULTS, **changes: Any) -> str: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], options: Options = DEFAULTS, **changes: Any
    ) -> list[str]: ...
    def generate(
        self, prompts: Prompt | Sequence[Prompt], options: Options = DEFAULTS, **changes: Any
    ) -> str | list[str]:
        """The completion of a prompt, or the completions of several prompts: n for each, in order.

        Args:
          prompts: one prompt or a sequence of them; each a string or a list of token ids.
          options: what to generate, for all prompts or as a list with one for each.
          **changes: fields of `GenerationOptions` or of its `Sampling` that differ from `options`, such as
            max_new_tokens=200 or temperature=0.8. A list holds one value for each prompt: temperature=[0, 0.8],
            sampling=[...]. (`stop` is a list itself; to vary it, use a list of `options`.)

        Raises:
          ConfigError: an option or token id is not legal, prompt and completion do not fit max_len or the devices'
            memory, or a list does not have one value for each prompt; max_len and batch_size cannot vary.
          NotFiniteError: logits are NaN or infinite; the message names the prompt and the position.
          TypeError: there is no such option.
          ValueError: several samples were asked for of a single prompt that is not in a list.
        """
        completions = self.complete(prompts, options, **changes)
        if not is_one(prompts):
            return [c.text for c in completions]
        if len(completions) > 1:
            raise ValueError(f"n={len(completions)} samples of one prompt: give it as a list, to get a list.")
        return completions[0].text

    def complete(
        self, prompts: Prompt | Sequence[Prompt], options: Options = DEFAULTS, **changes: Any
    ) -> list[Completion]:
        """Like `generate`, but returns a list of `Completion`s, with tokens, finish reasons and statistics."""
        events = self.stream(prompts, options, every_token=False, **changes)
        return [event for event in events if isinstance(event, Completion)]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        options: Options = DEFAULTS,
        *,
        every_token: bool = True,
        **changes: Any,
    ) -> Iterator[Delta | Completion]:
        """Like `complete`, but yields text as it is generated, and a completion when it and all earlier ones are done.

        With `every_token` steps run one at a time, otherwise in compiled loops, and text comes in larger pieces.
        """
        several: Any = [prompts] if is_one(prompts) else prompts
        by_prompt = options_by_prompt(options, len(several), **changes)
        fitted = fit_prompts(several, by_prompt, self.tokenizer)
        shared = by_prompt[0]
        # Few sizes, since each is compiled.
        completions = sum(own.n for own in by_prompt)
        rows = min(1 << (completions - 1).bit_length(), shared.batch_size)
        longest = max(len(p.ids) + p.options.max_new_tokens for p in fitted)
        max_len = shared.max_len or round_up(longest, LENGTH_UNIT)
        self.engine.check_memory(rows, max_len)
        return self._generate(fitted, rows, max_len, 1 if every_token else STEPS_PER_RUN)

    def _last(self, prompt: FittedPrompt) -> int | None:
        """The last token of a prompt's text; None: it is empty."""
        return None if prompt.ids[-1] == self.tokenizer.eot_id else prompt.ids[-1]

    def _eos_id(self, prompt: FittedPrompt) -> int | None:
        """The token that ends its completion; None: none does."""
        return None if prompt.options.ignore_eos else self.tokenizer.eot_id

    def _generate(
        self, prompts: list[FittedPrompt], rows: int, max_len: int, max_steps: int
    ) -> Iterator[Delta | Completion]:
        """Generates all completions, `rows` at a time, and yields them in order."""
        engine, every = self.engine, [p.options for p in prompts]
        start, compiled = engine.clock(), engine.compile_seconds
        loop = GenerationLoop(
            engine,
            rows,
            max_len,
            known=[own.sampling for own in every],
            top_logprobs=max((own.logprobs for own in every if own.logprobs is not None), default=None),
        )
        running: dict[int, _Running] = {}
        # The longest first: then rows end about together, and none is left alone at the end.
        for prompt in sorted(prompts, key=lambda p: -p.options.max_new_tokens):
            own = prompt.options
            for sample in range(own.n):
                request = Request(
                    prompt.ids,
                    own.max_new_tokens,
                    own.sampling,
                    own.seed,
                    sample,
                    self._eos_id(prompt),
                    own.logprobs,
                    may_stop=bool(own.stop),
                )
                text = RowText(
                    self.tokenizer, own.stop, request.eos_id, own.max_new_tokens, self._last(prompt)
                )
                running[loop.submit(request)] = _Running(prompt, sample, text)
        place = lambda number: (running[number].prompt.index, running[number].sample)
        order = sorted(running, key=place, reverse=True)
        while running:
            for event in loop.step(max_steps):
                one = running.get(event.request)
                if one is None or one.stats is not None:
                    continue
                ended = one.add(event)
                if ended and event.finish is None:
                    loop.cancel(event.request)
                if new := one.text.take():
                    yield Delta(one.prompt.index, one.sample, new)
                if ended:
                    later, seconds = len(one.text.tokens) - 1, event.time - one.first_time
                    one.stats = CompletionStats(
                        rows=loop.rows.batch,
                        seconds_to_first_token=one.first_time - start,
                        seconds=event.time - start,
                        tokens_per_second=later / seconds if later > 0 and seconds > 0 else None,
                        occupancy=loop.stats.occupancy,
                        compile_seconds=engine.compile_seconds - compiled,
                        cache_bytes_per_device=loop.rows.cache_bytes_per_device,
                        cache_tokens_per_row=loop.rows.state.cache.capacity,
                        devices=engine.mesh.size,
                    )
            while order and (one := running[order[-1]]).stats is not None:
                del running[order.pop()]
                yield one.completion(one.stats)


@dataclasses.dataclass
class _Running:
    """A completion that is not finished, or waits for earlier ones."""

    prompt: FittedPrompt
    sample: int
    text: RowText
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    first_time: float = 0.0
    stats: CompletionStats | None = None

    def add(self, event: Event) -> bool:
        """Adds new tokens; returns whether the completion has ended."""
        if not self.text.tokens:
            self.first_time = event.time
        for token in event.tokens:
            self.text.push(token)
        self.logprobs += event.logprobs or ()
        self.top_logprobs += map(list, event.top_logprobs or ())
        if event.finish == "error" and not self.text.done:
            raise NotFiniteError(
                f"Prompt {self.prompt.index}, sample {self.sample}: the logits for the token at position "
                f"{len(self.prompt.ids) + len(self.text.tokens)} are NaN or infinite; the weights of this checkpoint "
                "are no good, take one from before its training diverged."
            )
        return self.text.done

    def completion(self, stats: CompletionStats) -> Completion:
        """The completion, once its text is done."""
        text, prompt, n = self.text, self.prompt, len(self.text.tokens)
        assert text.finish_reason is not None
        asked = prompt.options.logprobs is not None
        return Completion(
            prompt_index=prompt.index,
            sample=self.sample,
            prompt=prompt.given,
            text=text.text,
            tokens=text.tokens,
            finish_reason=text.finish_reason,
            prompt_tokens=len(prompt.ids),
            prompt_tokens_dropped=prompt.dropped,
            stats=stats,
            logprobs=self.logprobs[:n] if asked else None,
            top_logprobs=self.top_logprobs[:n] if asked else None,
        )
