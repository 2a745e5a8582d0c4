"""The tasks of lm-evaluation-harness (`pip install 'mlra_jax[eval]'`), scored and generated on a mesh."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import itertools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from mlra_jax.config import ConfigError
from mlra_jax.data.tokenizers import Tokenizer
from mlra_jax.errors import UserError
from mlra_jax.evaluation.scoring import Scorer, rolling_windows
from mlra_jax.generation.generator import GenerationOptions, Generator
from mlra_jax.generation.sampling import Sampling

LOCAL_TASKS = Path(__file__).parent / "tasks"
"""Holds `mlra_choice` and `mlra_rolling`, small tasks with their data, for trials without a network."""

PAPER_TASKS = {
    "arc_easy": "acc_norm",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
    "boolq": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "piqa": "acc_norm",
}
"""The paper's zero-shot tasks, and the metric that it reports for each."""

MAX_NEW_TOKENS = 256
"""Default length of a generated text, where its task does not set one."""


class TaskError(UserError):
    """A task that is unknown, or whose data is not available."""


@dataclasses.dataclass(frozen=True)
class TaskSet:
    """Tasks with their data."""

    loaded: dict[str, Any]
    """The result of lm-evaluation-harness's `TaskManager.load`."""
    manager: TaskManager
    """The manager that loaded them."""

    @property
    def generates(self) -> bool:
        """Whether any task generates text."""
        return any(t.get_config("output_type") == "generate_until" for t in self.loaded["tasks"].values())

    @property
    def specs(self) -> list[Any]:
        """The arguments of `simple_evaluate`: groups, and the tasks that are in none."""
        groups = self.loaded["groups"]
        inner = {name for names in self.loaded["group_map"].values() for name in names}
        grouped = {t.task_name for group in groups.values() for t in group.get_all_tasks()}
        tasks = [task for name, task in self.loaded["tasks"].items() if name not in grouped]
        return [group for name, group in groups.items() if name not in inner] + tasks


def load_tasks(names: Sequence[str], folder: str = "") -> TaskSet:
    """Finds tasks, and downloads data where needed.

    Args:
      names: tasks, groups or tags; `paper` stands for those of `PAPER_TASKS`.
      folder: folder with YAML files of further tasks; empty: none.

    Raises:
      TaskError: there is no such task, or its data could not be fetched or read.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its log is long
    if folder and not Path(folder).is_dir():
        raise TaskError(f"There is no folder {folder}; --task-folder takes one with YAML files of tasks.")
    wanted = list(itertools.chain.from_iterable(PAPER_TASKS if n == "paper" else [n] for n in names))
    folders = [LOCAL_TASKS, *([Path(folder)] if folder else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(wanted) <= set(manager.all_tasks):  # reading the harness's own thousands takes seconds
        manager = TaskManager(include_path=folders)
    unknown = [name for name in dict.fromkeys(wanted) if name not in manager.all_tasks]
    if unknown:
        close = {n for name in unknown for n in difflib.get_close_matches(name, manager.all_tasks, 3)}
        hint = f"did you mean {', '.join(sorted(close))}?" if close else "`lm-eval ls tasks` lists them."
        raise TaskError(f"lm-evaluation-harness knows no task {', '.join(unknown)}; {hint}")
    try:
        return TaskSet(manager.load(list(dict.fromkeys(wanted))), manager)
    except Exception as error:  # whatever the network, the hub, the files or the task's own code raise
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise TaskError(
            f"The data of {', '.join(wanted)} could not be loaded ({type(error).__name__}: {reason}). Tasks fetch it "
            "from the Hugging Face hub: check the network, or fill its cache elsewhere and copy it (HF_HOME). "
            "mlra_choice and mlra_rolling need no network."
        ) from error


class HarnessModel(TemplateLM):
    """A model as lm-evaluation-harness expects it.

    Every process of a cluster runs the harness identically; to it they look like one.

    Args:
      scorer: computes log-likelihoods.
      tokenizer: the model's tokenizer.
      make_generator: makes the text generator, when a task first needs it.
      progress: whether to show progress bars, if standard error is a terminal.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        make_generator: Callable[[], Generator],
        *,
        progress: bool = False,
    ):
        super().__init__()
        self._scorer, self._tokenizer, self._progress = scorer, tokenizer, progress
        self._generator = functools.cache(make_generator)
        self.max_length = scorer.model.seq_len

    @property
    def eot_token_id(self) -> int:
        """The id that precedes a text without a context."""
        return self._tokenizer.eot_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encodes `string` without special tokens, whatever is asked for."""
        return self._tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encodes a context and its continuation; spaces between them belong to the continuation, as in the harness.

        The ids of the whole text are split where they begin with those of the context. Where a token spans the boundary
        (the harness would then drop part or all of the continuation), the two are encoded separately.
        """
        kept = context.rstrip()
        context, continuation = kept, context[len(kept) :] + continuation
        ids, whole = self.tok_encode(context), self.tok_encode(context + continuation)
        apart = whole[: len(ids)] != ids or (continuation and len(whole) == len(ids))
        return ids or [self.prefix_token_id], self.tok_encode(continuation) if apart else whole[len(ids) :]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        if lost := [texts[1] for texts, _, continuation in requests if texts[1] and not continuation]:
            raise TaskError(
                f"The tokenizer makes no tokens of the continuation {lost[0]!r}, which so has no score."
            )
        pairs = [(context, continuation) for _, context, continuation in requests]
        return list(self._scorer.score(pairs, progress=self._progress))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, whose first token follows an end-of-text token."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        cut = [list(rolling_windows(ids, self.prefix_token_id, self.max_length)) for ids in texts]
        scores = iter(self._scorer.score([pair for pairs in cut for pair in pairs], progress=self._progress))
        return [sum(next(scores).log_likelihood for _ in pairs) for pairs in cut]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Completes each prompt with the decode engine; prompts that are too long are truncated on the left."""
        prompts, asked = zip(*(request.args for request in requests), strict=True)
        batch_size = self._scorer.model.rows(len(prompts))
        options = [generation_options(kwargs, self.max_length, batch_size) for kwargs in asked]
        return self._generator().generate(prompts, options)


def generation_options(asked: dict[str, Any], max_len: int, batch_size: int) -> GenerationOptions:
    """Translates a task's `generation_kwargs`.

    Raises:
      ConfigError: a value is not legal, or leaves no room for a prompt.
    """
    lengths = (asked.get(key) for key in ("max_gen_toks", "max_new_tokens", "max_tokens"))
    max_new_tokens = next((int(n) for n in lengths if n is not None), min(MAX_NEW_TOKENS, max_len // 2))
    if max_new_tokens >= max_len:
        raise ConfigError(
            f"A task generates {max_new_tokens} tokens, which leaves no room for a prompt in {max_len}; raise "
            "--seq-len."
        )
    until = asked.get("until") or ()
    temperature = float(asked.get("temperature") or 0)
    # Tasks often set sampling options together with do_sample=False.
    sampling = Sampling()
    if asked.get("do_sample", temperature > 0) and temperature > 0:
        sampling = Sampling(
            temperature,
            int(asked.get("top_k") or 0),
            float(asked.get("top_p") or 1),
            float(asked.get("min_p") or 0),
        )
    return GenerationOptions(
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=tuple(s for s in ([until] if isinstance(until, str) else until) if s),
        max_len=max_len,
        overflow="truncate-left",
        batch_size=batch_size,
    )


def run_tasks(
    model: HarnessModel, tasks: TaskSet, *, num_fewshot: int | None = 0, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Returns the metrics of each task and group, with standard errors where the harness has them.

    Args:
      model: the model to evaluate.
      tasks: see `load_tasks`.
      num_fewshot: examples before each question; None: each task's default.
      limit: number of documents to evaluate of each task, for a trial; None: all.
    """
    # Standard output is for results. The harness bootstraps in forked processes, which JAX's threads do not survive.
    with contextlib.redirect_stdout(sys.stderr), mock.patch.dict(os.environ, DISABLE_MULTIPROC="1"):
        found = simple_evaluate(
            model=model,
            tasks=tasks.specs,
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=tasks.manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    names = lambda values: {k.removesuffix(",none"): v for k, v in values.items() if k != "alias"}
    numbers = lambda values: {k: v for k, v in names(values).items() if isinstance(v, int | float)}
    return {task: numbers(values) for task, values in found["results"].items()}


def paper_average(results: dict[str, dict[str, float]]) -> float | None:
    """Mean of the paper's metrics over its seven tasks, in percent; None unless all were evaluated."""
    if not results.keys() >= PAPER_TASKS.keys():
        return None
    return 100 * sum(results[task][metric] for task, metric in PAPER_TASKS.items()) / len(PAPER_TASKS)
