"""`mlra-decode --checkpoint DIR --prompt TEXT`: generates text from a run's checkpoint."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TextIO

import jax
import tyro

from mlra_jax.checkpoints import load_config
from mlra_jax.cli import command
from mlra_jax.config import ConfigError, MeshConfig
from mlra_jax.data.tokenizers import Tokenizer, get_tokenizer
from mlra_jax.distributed import initialize, take_args
from mlra_jax.execution.back_ends import BackEnds
from mlra_jax.execution.compilation_cache import keep_compiled
from mlra_jax.generation.generator import (
    DEFAULTS,
    Completion,
    Delta,
    GenerationOptions,
    Generator,
    Prompt,
    changed,
    fit_prompts,
    options_by_prompt,
)
from mlra_jax.generation.load import ONE_DEVICE, ParamDtype, SplitHeads
from mlra_jax.textfiles import decode_text, read_text


@dataclasses.dataclass(frozen=True)
class DecodeArgs:
    """Generates text from a run's checkpoint, on one device or several.

    Configuration and tokenizer are the checkpoint's. Text goes to standard output, statistics to standard error. On
    several hosts, run the same command on each with --distributed.auto (TPU pod, Slurm, Open MPI), or with
    --distributed.coordinator HOST:PORT, --distributed.processes N and --distributed.process_id I; the first one prints.
    """

    checkpoint: str
    """A run's folder, its checkpoints folder or one step's folder; local or a bucket URL."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; repeat the option for several prompts."""
    prompts_file: str = ""
    """File with one prompt per line, or `-` for standard input; lines of a .jsonl file are JSON strings, lists of token
    ids, or objects with one of these as their field `prompt` and, where options differ for it, `generation`:
    {"temperature": 0.8, "seed": 1}."""
    step: int | None = None
    """Step of the checkpoint; default: the latest."""
    mesh: MeshConfig = ONE_DEVICE
    """Device mesh. tensor splits the weights and the cache's latent heads, context the cached tokens, data the
    batch."""
    split_heads: SplitHeads = "auto"
    """Also split the query heads of W_qb and W_o over tensor. If not, every device holds them whole, and an MLRA-4
    attention layer has one collective instead of three. auto: what should be faster on these devices."""
    param_dtype: ParamDtype = "auto"
    """Dtype of the weights. auto: bfloat16 on accelerators if the model computes in it, else as stored."""
    tokenizer: str = ""
    """`byte`, `gpt2`, or a path; default: the model's own."""
    generation: Annotated[GenerationOptions, tyro.conf.OmitArgPrefixes] = DEFAULTS
    """Lengths, sampling and stopping."""
    stream: bool = True
    """Print a single completion token by token. Otherwise, and always for several completions or JSON, tokens are
    generated in compiled loops of many steps, which is faster on accelerators."""
    json: bool = False
    """Print one line of JSON per completion: text, tokens, finish reason, speed, cache size."""
    compilation_cache: str | None = None
    """Folder for XLA's persistent compilation cache, empty: none; default: the run's own setting."""


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(type(token) is int for token in value))


def read_prompts(file: str, options: GenerationOptions = DEFAULTS) -> list[tuple[Prompt, GenerationOptions]]:
    """Reads prompts, one per line, and the options of each; `-` is standard input. Empty lines are skipped.

    Args:
      file: its path.
      options: what a line of a .jsonl file may change with its field `generation`.

    Raises:
      FileNotFoundError: there is no such file.
      TextError: it is not UTF-8.
      ConfigError: standard input cannot be read, or a line of a .jsonl file is no prompt or has unknown options.
    """
    text = decode_text(_standard_input(), "standard input") if file == "-" else read_text(file)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not file.endswith(".jsonl"):
        return [(line, options) for _, line in lines]
    prompts = []
    for number, line in lines:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}, line {number} is not JSON: {error}.") from error
        value = value if isinstance(value, dict) else {"prompt": value}
        if not _is_prompt(value.get("prompt")):
            raise ConfigError(
                f"{file}, line {number} is neither a string nor a list of token ids, nor an object with one of them as "
                "its field prompt."
            )
        try:
            prompts.append((value["prompt"], changed(options, **value.get("generation", {}))))
        except TypeError as error:
            raise ConfigError(f"{file}, line {number}: {error}") from error
    return prompts


def _standard_input() -> bytes:
    try:
        if sys.stdin is None:  # as Python has it when the shell has closed it
            raise OSError(errno.EBADF, "it is closed")
        return sys.stdin.buffer.read()
    except OSError as error:
        raise ConfigError(
            f"--prompts-file - reads standard input, which fails: {error.strerror}; name a file instead."
        ) from error


def _prompts(args: DecodeArgs) -> list[tuple[Prompt, GenerationOptions]]:
    prompts: list[tuple[Prompt, GenerationOptions]] = [(prompt, args.generation) for prompt in args.prompt]
    if args.prompts_file == "-" and jax.process_count() > 1:
        raise ConfigError(
            "Standard input reaches only one of several processes; give each of them --prompts-file FILE."
        )
    if args.prompts_file:
        prompts += read_prompts(args.prompts_file, args.generation)
    if not prompts:
        raise ConfigError(
            "There is no prompt; give --prompt TEXT, or --prompts-file FILE with one on each line."
        )
    return prompts


class _Printer:
    """Prints completions, and statistics at the end, on the first process only."""

    def __init__(self, single: Prompt | None, as_json: bool, tokenizer: Tokenizer):
        self._active = jax.process_index() == 0
        self._json = as_json
        self._single = single is not None
        self._text = lambda prompt: prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        self._completions: list[Completion] = []
        if single is not None and not as_json:
            self._print(self._text(single), end="")

    def _print(self, text: str, end: str = "\n", file: TextIO | None = None) -> None:
        if self._active:
            print(text, end=end, file=file, flush=True)

    def show(self, event: Delta | Completion) -> None:
        """Prints a single completion as it comes, several under a line each that names them, or a line of JSON."""
        if isinstance(event, Completion):
            self._completions.append(event)
        if self._json:
            if isinstance(event, Completion):
                record = dataclasses.asdict(event)
                self._print(json.dumps(record | record.pop("stats")))
        elif self._single:
            self._print(event.text if isinstance(event, Delta) else "\n", end="")
        elif isinstance(event, Completion):
            self._print(
                f"=== prompt {event.prompt_index}, sample {event.sample}\n{self._text(event.prompt)}{event.text}"
            )

    def say(self, text: str) -> None:
        """Prints a remark on standard error."""
        self._print(text, file=sys.stderr)

    def report(self, trained_len: int) -> None:
        """Statistics on standard error, and a remark if a text is longer than what was trained on."""
        stats = [c.stats for c in self._completions]
        tokens, last = sum(len(c.tokens) for c in self._completions), max(stats, key=lambda s: s.seconds)
        busy = "" if last.occupancy is None else f", {last.occupancy:.0%} of them busy"
        self._print(
            f"{len(stats)} completion(s), {tokens} tokens: the first after "
            f"{min(s.seconds_to_first_token for s in stats):.3f} s, all after {last.seconds:.3f} s, "
            f"{tokens / max(last.seconds, 1e-9):.1f} tokens/s (compiling: {last.compile_seconds:.1f} s); "
            f"{last.rows} row(s){busy}; KV cache {last.cache_bytes_per_device:,} bytes on each of {last.devices} "
            f"device(s), {last.cache_tokens_per_row} tokens a row",
            file=sys.stderr,
        )
        longest = max(c.prompt_tokens + len(c.tokens) for c in self._completions)
        if longest > trained_len:
            self._print(
                f"note: texts of up to {longest} tokens; the model was trained on {trained_len}.",
                file=sys.stderr,
            )


@command
def main(argv: Sequence[str]) -> int:
    """Generates and prints; returns the exit status."""
    # Weights and cache may fill a GPU, of which JAX leaves a quarter unused by default; read when it is initialized.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    distributed, argv = take_args(argv)
    args = tyro.cli(DecodeArgs, args=argv, prog="mlra-decode")
    initialize(distributed)
    args.generation.validate()
    prompts, given = zip(*_prompts(args), strict=True)
    options = options_by_prompt(given, len(prompts))
    config = load_config(args.checkpoint, args.step)
    fit_prompts(prompts, options, get_tokenizer(args.tokenizer or config.data.tokenizer))
    keep_compiled(config.compilation_cache if args.compilation_cache is None else args.compilation_cache)

    generator = Generator.from_checkpoint(
        args.checkpoint,
        mesh=args.mesh,
        split_heads=args.split_heads,
        param_dtype=args.param_dtype,
        step=args.step,
        tokenizer=args.tokenizer,
    )
    single = sum(own.n for own in options) == 1
    every_token = args.stream and not args.json and single
    events = generator.stream(prompts, options, every_token=every_token)
    printer = _Printer(prompts[0] if single else None, args.json, generator.tokenizer)
    with BackEnds(printer.say) as back_ends:
        for event in events:
            printer.show(event)
    printer.report(config.data.seq_len)
    printer.say(str(back_ends))
    return 0


if __name__ == "__main__":
    sys.exit(main())
