"""The paper's published decoding results, for comparison (arXiv 2603.02188).

Measured by its authors on H100 GPUs with bfloat16 in paged caches. K is 1024 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.figures import Series

K = 1024
NAMES: Mapping[str, str] = {
    "gqa": "GQA",
    "mla": "MLA",
    "gla_2": "GLA-2",
    "mlra_2": "MLRA-2",
    "mlra_4": "MLRA-4",
}
COLORS: Mapping[str, str] = {
    "gqa": "tab:green", "mla": "tab:red", "gla_2": "tab:orange", "mlra_2": "tab:purple", "mlra_4": "tab:blue",
}  # fmt: skip


def _by_tokens(tokens: tuple[int, ...], **values: tuple[float, ...]) -> Mapping[str, Mapping[int, float]]:
    return {name: dict(zip(tokens, row, strict=True)) for name, row in values.items()}


LATENCY_US = _by_tokens(
    (128 * K, 256 * K, 512 * K, 1024 * K, 2048 * K),
    gqa=(50.8, 75.8, 120.4, 208.4, 386.5),
    mla=(136.0, 188.6, 293.0, 490.7, 874.2),
    gla_2=(63.5, 93.0, 152.3, 267.1, 493.4),
    mlra_4=(48.4, 68.4, 103.5, 173.2, 308.2),
)
"""Decode attention in us by cached tokens: batch 1, 64 query heads, one device's share, without projections and
collectives. Read off the vector figure of the authors' page."""

THROUGHPUT = _by_tokens(
    (1 * K, 4 * K, 8 * K, 16 * K),
    gqa=(854, 460, 288, 164),
    mla=(604, 547, 486, 401),
    gla_2=(542, 488, 438, 369),
    mlra_4=(860, 714, 595, 458),
)
"""Throughput of the attention layer on eight H100 in tokens/ms, by cached tokens: 128 query heads, model width 7168,
batch 128."""


def series(variant: str, points: Mapping[int, float], *, paper: bool) -> Series:
    """A line of a figure: the paper's, or ours."""
    label = f"{NAMES[variant]}, {'paper' if paper else 'here'}"
    return Series(label, COLORS[variant], dict(points), faint=paper)
