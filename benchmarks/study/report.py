"""Results of the finished runs: a table in Markdown, its interpretation, and a figure."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import paper
from benchmarks.study.corpora import SOURCES
from benchmarks.study.models import GLOBAL_BATCH, SEQ_LEN, VARIANTS
from mlra_jax.markdown import padded

COLORS = {**paper.COLORS, "mha": "black"}
BASELINE = "mha"
MARKS = "<!-- results -->", "<!-- end of results -->"


def losses(results: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Final held-out loss by model and seed, of the runs that are finished."""
    found: dict[str, dict[int, float]] = {name: {} for name in VARIANTS}
    for run in results["runs"]:
        if "loss" in run:
            found[run["variant"]][run["seed"]] = run["loss"]
    return {name: dict(sorted(by_seed.items())) for name, by_seed in found.items() if by_seed}


def pooled_deviation(by_model: Mapping[str, Mapping[int, float]]) -> tuple[float, int] | None:
    """Standard deviation between seeds, one for all models, and its degrees of freedom; None: no model has two."""
    squares = freedom = 0.0
    for by_seed in by_model.values():
        if len(by_seed) > 1:
            freedom += len(by_seed) - 1
            squares += (len(by_seed) - 1) * statistics.variance(by_seed.values())
    return (math.sqrt(squares / freedom), int(freedom)) if freedom else None


def missing(results: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Models and seeds that have no result though other models, or other seeds, have."""
    have = losses(results)
    seeds = sorted({seed for by_seed in have.values() for seed in by_seed})
    return [(name, seed) for seed in seeds for name in VARIANTS if seed not in have.get(name, {})]


def rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The table, its head first: a line for each model that has a result."""
    have = losses(results)
    seeds = sorted({seed for by_seed in have.values() for seed in by_seed})
    to_bits = results["held_out"]["tokens"] / results["held_out"]["bytes"] / math.log(2)
    base = have.get(BASELINE, {})
    lines = [
        [
            "model",
            "parameters",
            "cache, tensor 1",
            "tensor 4",
            *(f"loss, seed {seed}" for seed in seeds),
            "mean",
            f"minus {VARIANTS[BASELINE].label}",
            "bits/byte",
            "tokens/s",
        ]
    ]
    for name, by_seed in have.items():
        model = results["models"][name]
        rates = [r["tokens_per_second"] for r in results["runs"] if r["variant"] == name and "loss" in r]
        mean = statistics.mean(by_seed.values())
        both = [by_seed[s] - base[s] for s in by_seed if s in base]
        lines.append(
            [
                VARIANTS[name].label,
                f"{model['parameters'] / 1e6:.2f} M",
                str(model["cached_values"]["1"]),
                str(model["cached_values"]["4"]),
                *(f"{by_seed[seed]:.4f}" if seed in by_seed else "" for seed in seeds),
                f"{mean:.4f}",
                f"{statistics.mean(both):+.4f}" if both and name != BASELINE else "",
                f"{mean * to_bits:.4f}",
                f"{statistics.median(rates):,.0f}" if all(rates) else "",
            ]
        )
    return lines


def source_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The table of the data, its head first."""
    lines = [["package", "what", "licence", "documents", "held out", "MB", "held out"]]
    for name, counts in results["data"]["sources"].items():
        source = SOURCES[name]
        lines.append(
            [
                source.package,
                source.what,
                source.licence,
                f"{counts['documents']:,}",
                f"{counts['held_out_documents']:,}",
                f"{counts['bytes'] / 1e6:.1f}",
                f"{counts['held_out_bytes'] / 1e6:.2f}",
            ]
        )
    return lines


def _table(lines: Sequence[Sequence[str]], align: str) -> list[str]:
    return padded(lines[0], lines[1:], align)


def comparison(results: Mapping[str, Any]) -> str:
    """Says which differences are significant, given the variation between seeds."""
    have = losses(results)
    means = {name: statistics.mean(by_seed.values()) for name, by_seed in have.items()}
    order = sorted(means, key=means.__getitem__)
    label = lambda name: VARIANTS[name].label
    pooled = pooled_deviation(have)
    if pooled is None or len(order) < 2:
        return "No model has two seeds yet: nothing says how much of a difference is chance."
    deviation, freedom = pooled
    n = min(len(by_seed) for by_seed in have.values())
    error = deviation * math.sqrt(2 / n)
    limit = 2 * error
    spread = max(max(s.values()) - min(s.values()) for s in have.values())
    sentences = [
        f"Between seeds a model's loss differs by {spread:.4f} at most; the standard deviation between seeds, pooled "
        f"over the models ({freedom} degrees of freedom), is {deviation:.4f}. The difference of two means of {n} has a "
        f"standard error of {error:.4f} then, and less than twice that, {limit:.4f}, cannot be told from chance.",
        f"From the lowest mean loss to the highest: {', '.join(f'{label(m)} {means[m]:.4f}' for m in order)}.",
    ]
    apart = [
        f"{label(a)} below {label(b)}"
        for i, a in enumerate(order)
        for b in order[i + 1 :]
        if means[b] - means[a] > limit
    ]
    total = len(order) * (len(order) - 1) // 2
    if apart:
        sentences.append(f"Of the {total} pairs, {len(apart)} are further apart: {'; '.join(apart)}.")
    else:
        sentences.append(f"None of the {total} pairs is further apart.")
    return " ".join(sentences)


def markdown(results: Mapping[str, Any]) -> str:
    """Setting, table and sentences."""
    finished = [run for run in results["runs"] if "loss" in run]
    if not finished:
        return "No run is finished yet.\n"
    settings = []
    for run in finished:
        s = run["setting"]
        versions = ", ".join(f"{name} {version}" for name, version in s["versions"].items())
        line = f"{s['device']}, {versions}, {s['date']}: `{s['command']}`."
        if line not in settings:
            settings.append(line)
    held_out, parameters = results["held_out"], results["models"][BASELINE]["parameters"]
    passes = results["tokens"] / results["data"]["tokens"]["train"]
    lines = [
        *settings,
        "",
        f"{results['steps']:,} steps of {GLOBAL_BATCH} × {SEQ_LEN} tokens: {results['tokens']:,} in all, {passes:.2f} "
        f"passes over the data, {results['tokens'] / parameters:.1f} tokens a parameter; peak learning rate "
        f"{results['lr']:g}. Loss in nats per token over {held_out['tokens']:,} held-out tokens "
        f"({held_out['bytes']:,} bytes) after the last step; cache in values per token and layer on each device.",
        "",
        *_table(rows(results), "lr"),
        "",
        comparison(results),
        "",
        f"The data: {results['data']['tokens']['train']:,} tokens for training and "
        f"{results['data']['tokens']['val']:,} held out, digest {results['data']['digest']}.",
        "",
        *_table(source_rows(results), "lllr"),
    ]
    for run in results["runs"]:
        if "diverged" in run:
            lines += ["", f"{VARIANTS[run['variant']].label}, seed {run['seed']}: {run['diverged']}"]
    if left := missing(results):
        names = ", ".join(f"{VARIANTS[name].label} seed {seed}" for name, seed in left)
        lines += ["", f"Not finished: {names}."]
    return "\n".join(lines) + "\n"


def draw(results: Mapping[str, Any]) -> Figure:
    """Left: held-out loss during training, a line for each run; right: the final one against the cache."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    have = losses(results)
    runs: Sequence[Mapping[str, Any]] = [run for run in results["runs"] if "loss" in run]
    for run in runs:
        tokens, loss = zip(*run["held_out_losses"], strict=True)
        first = run["seed"] == min(have[run["variant"]])
        label = VARIANTS[run["variant"]].label if first else None
        left.plot(
            [t / 1e6 for t in tokens], loss, color=COLORS[run["variant"]], linewidth=1, label=label, alpha=0.8
        )
    left.set_xlabel("training tokens, millions")
    left.set_ylabel("held-out loss, nats per token")
    left.legend()
    for name, by_seed in have.items():
        cached = results["models"][name]["cached_values"]
        for tensor, face in (("1", "none"), ("4", COLORS[name])):
            right.scatter(
                [cached[tensor]] * len(by_seed),
                list(by_seed.values()),
                edgecolors=COLORS[name],
                facecolors=face,
                zorder=2,
            )
        mean = statistics.mean(by_seed.values())
        right.plot(
            [cached["4"], cached["1"]],
            [mean, mean],
            color=COLORS[name],
            linewidth=1,
            label=VARIANTS[name].label,
        )
    right.set_xscale("log", base=2)
    right.set_xticks(ticks := [64, 128, 256, 512, 1024], [str(t) for t in ticks])
    right.minorticks_off()
    right.set_xlabel("cached values per token and layer, each device:\nopen, tensor 1; filled, tensor 4")
    right.set_ylabel("final held-out loss, each seed")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    if runs:
        setting = runs[0]["setting"]
        figure.suptitle(
            f"{results['tokens'] / 1e6:.1f} M training tokens · {setting['device']} · {setting['date']}",
            fontsize=9,
        )
    return figure


def write(results: Mapping[str, Any], out: Path) -> list[Path]:
    """Writes study.md and study.png into `out`; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    text, figure = out / "study.md", out / "study.png"
    text.write_text(markdown(results))
    draw(results).savefig(figure, dpi=150)
    return [text, figure]


def write_docs(results: Mapping[str, Any], docs: Path) -> list[Path]:
    """Puts the results between the marks of `docs`/study.md, the figure into `docs`/figures; returns their paths."""
    page, figure = docs / "study.md", docs / "figures" / "study.png"
    begin, end = MARKS
    text = page.read_text()
    if begin not in text or end not in text:
        raise ValueError(f"{page} lacks the lines {begin} and {end}, between which the results go.")
    body = f"{begin}\n\n{markdown(results)}\n![{figure.stem}](figures/{figure.name})\n\n{end}"
    page.write_text(re.sub(f"{begin}.*{end}", lambda _: body, text, flags=re.DOTALL))
    figure.parent.mkdir(exist_ok=True)
    draw(results).savefig(figure, dpi=150)
    return [page, figure]
