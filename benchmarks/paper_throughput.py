"""The paper's table of decode throughput on the devices at hand: the whole attention layer, in tokens/ms.

    python -m benchmarks.paper_throughput                                  # on a GPU, or eight
    python -m benchmarks.paper_throughput --size tiny --contexts 256       # on a CPU
    python -m benchmarks.paper_throughput --redraw RESULTS.json            # table and figure alone

The paper decodes a batch of 128 on eight H100, with 128 query heads and a model width of 7168: GQA over 8 devices of
the mesh axis `tensor`, MLA over 8 of `data`, GLA-2 over 2 x 4, MLRA-4 over 4 x 2. Timed is a decode step of the
attention layer: projections, absorption, append, attention, up-projection and output. Assumed, as the paper does not
say: a query rank of 1536 and latents of 512 in all (as in DeepSeek-V3), 8 KV heads of GQA, heads of 128 + 64,
contiguous caches.

With eight devices the paper's mesh runs. With fewer, as many of its `data` groups run as fit, each with its part of the
batch: groups do not communicate, so the others would add their tokens in the same time. With fewer devices than
`tensor`, one device's share of heads, weights and batch runs alone, **without the collectives**
(`benchmarks/attention_layer.py` defines a share). Tokens/ms are always those of the whole batch.

Writes `paper_throughput_DEVICE.json`, `.md` and `.png`; the figure has the paper's points beside ours.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from benchmarks import paper, records
from benchmarks.attention_layer import Place, measure_layers
from benchmarks.figures import draw, show_tokens
from benchmarks.paper_latency import describe, parse_length
from benchmarks.records import Setting
from benchmarks.tensor_parallel import LAYER_HEAD, layer_line, number, tiny
from mlra_jax import markdown
from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.config import AttentionConfig, ModelConfig
from mlra_jax.ops.tuning import slug

BATCH = 128
MESHES: Mapping[str, tuple[int, int]] = {"gqa": (8, 1), "mla": (1, 8), "gla_2": (2, 4), "mlra_4": (4, 2)}
"""The paper's eight devices: of `tensor`, of `data`."""
HEADS: Mapping[str, tuple[int, int]] = {"mla": (1, 1), "gla_2": (2, 1), "mlra_4": (4, 4)}
"""Latent heads, and branches."""


def model_config(variant: str, size: str = "paper") -> ModelConfig:
    """A model with the attention of the paper's table; the rest of it is never run."""
    attention: AttentionConfig = GroupedAttentionConfig(n_kv_heads=8, d_head=128)
    if variant in HEADS:
        attention = LatentAttentionConfig(*HEADS[variant], q_lora_rank=1536, kv_lora_rank=512)
    sizes = {"n_layers": 1, "d_model": 7168, "n_heads": 128, "d_ff": 18432, "vocab_size": 129280}
    config = ModelConfig(**sizes, attention=attention, param_dtype="bfloat16")
    return config if size == "paper" else tiny(config)


def place(variant: str, config: ModelConfig, n_devices: int, split_heads: bool) -> Place:
    """The layout to run: the paper's mesh, as many of its groups as fit, or one device's share."""
    tensor, data = MESHES[variant]
    if tensor > n_devices:
        return Place(variant, config, tensor, split_heads=config.attention.n_branches == 1, share=True)
    groups = max(n for n in range(1, data + 1) if data % n == 0 and n * tensor <= n_devices)
    return Place(variant, config, tensor, groups, split_heads)


def what_ran(layer: Mapping[str, Any]) -> str:
    """Describes what ran."""
    tensor, data = MESHES[layer["variant"]]
    if layer["share"]:
        return f"one device's share of {tensor} x {data}, without the collectives"
    if layer["data"] == data:
        return f"all {tensor * data} devices"
    ran = layer["tensor"] * layer["data"]
    return f"{ran} of {tensor * data} devices; between these and the others nothing passes"


def tokens_per_ms(layer: Mapping[str, Any]) -> float:
    """Throughput of the whole batch: all groups of `data` step at the same time."""
    _, data = MESHES[layer["variant"]]
    groups = 1 if layer["share"] else layer["data"]
    return 1e3 * layer["batch"] * data / groups / layer["us"]


def fastest(record: Mapping[str, Any]) -> dict[str, dict[int, Mapping[str, Any]]]:
    """The faster layout of the query heads, by variant and context."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {v: {} for v in MESHES}
    for layer in sorted(record["layers"], key=tokens_per_ms):
        found[layer["variant"]][layer["context"]] = layer
    return found


def table(record: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown: tokens/ms of each variant, and the paper's."""
    found = fastest(record)
    rows = []
    for context in sorted({c for by_context in found.values() for c in by_context}):
        cells = [show_tokens(context)]
        for v in MESHES:
            layer, theirs = found[v].get(context), paper.THROUGHPUT[v].get(context)
            cells += [number(tokens_per_ms(layer), 0) if layer else "", number(theirs, 0)]
        rows.append(cells)
    names = [name for v in MESHES for name in (paper.NAMES[v], "paper")]
    return [
        *markdown.table(("context", *names), rows, "r"),
        *(
            f"\n{paper.NAMES[v]}: {what_ran(layer)}; query heads {layer['heads']}."
            for v in MESHES
            for layer in list(found[v].values())[:1]
        ),
    ]


def page(record: Mapping[str, Any]) -> list[str]:
    """All tables."""
    device, command = describe(record).split("\n")
    return [
        f"# The paper's throughput of the attention layer on {record['n_devices']} x {record['device']}",
        "",
        f"{device} `{command}`",
        "",
        f"Tokens/ms of a batch of {record['batch']}, 128 query heads, model width 7168, bfloat16 (unless tiny).",
        "*Paper*: its numbers, on eight H100. `benchmarks/paper_throughput.py` says what is measured and assumed.",
        "",
        *table(record),
        "",
        "The layers, as in `benchmarks/tensor_parallel.py`; their batch is that of the devices that ran:",
        "",
        *LAYER_HEAD,
        *map(layer_line, record["layers"]),
        *records.not_measured(record["failures"]),
    ]


def write(record: Mapping[str, Any], stem: pathlib.Path) -> None:
    """Writes `stem`.json, `.md` and `.png`."""
    records.write(stem, record, page(record))
    lines, labels = [], []
    for v, by_context in fastest(record).items():
        points = {context: tokens_per_ms(layer) for context, layer in by_context.items()}
        lines += [paper.series(v, points, paper=False), paper.series(v, paper.THROUGHPUT[v], paper=True)]
        labels += [f"{paper.NAMES[v]}: {what_ran(layer)}" for layer in list(by_context.values())[:1]]
    draw(
        stem.with_suffix(".png"),
        {f"Attention layer, batch {record['batch']}, 128 query heads, width 7168": lines},
        x_label="cached tokens of each row",
        y_label="tokens/ms",
        note=f"Solid: {describe(record)}\n"
        + "\n".join(labels)
        + "\nDashed: the paper's numbers (arXiv 2603.02188), "
        "eight H100 with what they exchange.",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 1 where a case failed."""
    argv = sys.argv[1:] if argv is None else argv
    parser = records.parser("benchmarks.paper_throughput", __doc__)
    parser.add_argument(
        "--cases", nargs="+", choices=list(MESHES), default=list(MESHES), help="variants to measure"
    )
    contexts = sorted(paper.THROUGHPUT["mla"])
    parser.add_argument(
        "--contexts", nargs="+", type=parse_length, default=contexts, help="context lengths in tokens"
    )
    parser.add_argument("--size", choices=("paper", "tiny"), default="paper", help="tiny: sizes for a CPU")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each program")
    parser.add_argument(
        "--redraw", type=pathlib.Path, metavar="JSON", help="rewrite table and figure of a results file"
    )
    args = parser.parse_args(argv)
    if args.runs < 1:
        parser.error("--runs must be at least 1.")
    if args.redraw:
        record = records.redraw(
            parser, args.redraw, lambda record: write(record, args.redraw.with_suffix(""))
        )
        print("\n".join(table(record)))
        return 0
    n_devices, setting = len(jax.devices()), Setting.here("benchmarks.paper_throughput", argv)
    about = {"n_devices": n_devices, "batch": BATCH, "layers": [], "failures": {}}
    record: dict[str, Any] = dataclasses.asdict(setting) | about
    stem = args.out / f"paper_throughput_{slug(setting.device)}"
    print(f"{n_devices} x {setting.device}, {setting.versions}", *LAYER_HEAD, sep="\n", flush=True)
    jobs = []
    for v in args.cases:
        config = model_config(v, args.size)
        # Where each query head reads one latent, whole heads would only be more to read.
        for split_heads in (True, False) if config.attention.n_branches > 1 else (True,):
            where = place(v, config, n_devices, split_heads)
            _, data = MESHES[v]
            if (where, BATCH * where.data // data) not in jobs:
                jobs.append((where, BATCH * where.data // data))
    for result in measure_layers(jobs, dict.fromkeys({batch for _, batch in jobs}, args.contexts), args.runs):
        if isinstance(result, tuple):
            name, why = result
            record["failures"][name] = why
            print(f"{name}: not measured. {why}", flush=True)
        else:
            record["layers"] += [row.record() for row in result]
            print(*(layer_line(row.record()) for row in result), sep="\n", flush=True)
        write(record, stem)
    print(*table(record), f"Written to {stem}.json, .md and .png", sep="\n")
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
