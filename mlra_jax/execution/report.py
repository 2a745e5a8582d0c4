"""Plans and compiled train steps as lines of Markdown."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from jax.sharding import AbstractMesh, Mesh

from mlra_jax.config import TrainConfig
from mlra_jax.execution.accelerators import GIB, find_accelerator
from mlra_jax.execution.collectives import executed_collectives
from mlra_jax.execution.planner import Plan
from mlra_jax.execution.topologies import Memory
from mlra_jax.markdown import table

_LEAST = 2**20
"""Bytes per step below which a collective is left out."""


def estimate(config: TrainConfig, topology: str, mesh: Mesh | AbstractMesh, plan: Plan) -> list[str]:
    """Describes the plan, its estimated memory, the roofline, and how long the whole run takes by it."""
    kind = mesh.abstract_mesh.abstract_device.device_kind
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    tokens = config.data.global_batch * config.data.seq_len
    lines = [
        f"{config.name} on {topology}: {mesh.size} x {kind}, {axes}; {config.data.global_batch} sequences of "
        f"{config.data.seq_len} tokens a step.",
        f"Estimated: {plan}.",
    ]
    chip = find_accelerator(kind)
    if chip is None:
        return [*lines, f"The peak rates of a {kind} are not known: no roofline."]
    costs = plan.costs
    best, worst = costs.at_best(chip), costs.in_sequence(chip)
    parts = ", ".join(f"{what} {s:.3f} s" for what, s in costs.parts(chip).items())
    rate = lambda seconds: f"{tokens / seconds / mesh.size:,.0f}"
    mfu = lambda seconds: f"{100 * costs.model_flops / seconds / chip.flops:.0f} %"
    days = lambda seconds: f"{config.steps * seconds / 86400:.3g} days at {tokens / seconds:,.0f} tokens/s"
    sent = ", ".join(f"{axis} {size / 1e9:.1f}" for axis, size in costs.link_bytes.items()) or "none"
    return [
        *lines,
        f"Roofline (formulas at peak rates, nothing measured): {best:.2f} s a step if all overlaps, "
        f"{worst:.2f} s if nothing does ({parts}); {rate(best)} or {rate(worst)} tokens/s a device, MFU {mfu(best)} or "
        f"{mfu(worst)}.",
        f"The whole run, {config.steps:,} steps or {config.steps * tokens / 1e9:.4g} G tokens: {days(best)} if all "
        f"overlaps, {days(worst)} if nothing does; at 40 % MFU {days(costs.model_flops / chip.flops / 0.4)}.",
        f"Per device and step: {costs.model_flops / 1e12:.0f} TFLOP of the model, {costs.recomputed_flops / 1e12:.0f} "
        f"recomputed; {costs.memory_bytes / 1e9:.0f} GB of memory traffic; GB sent over {sent}.",
    ]


def compiled(memory: Memory, plan: Plan, hlo: str | None, messages: Sequence[str]) -> list[str]:
    """Describes the compiled step: memory, warnings, collectives with their sizes.

    Args:
      memory: memory of the compiled step.
      plan: the plan to compare it with.
      hlo: the compiled program; None: the compiler cannot print it.
      messages: the compiler's output to standard error.
    """
    of = f" of {plan.capacity / GIB:.1f} GiB" if plan.capacity else ""
    complaints = sum("nvoluntary full rematerialization" in message for message in messages)
    lines = [
        f"Compiled: {memory.total / GIB:.2f} GiB{of} a device ({memory.arguments / GIB:.2f} arguments, "
        f"{memory.temporaries / GIB:.2f} temporaries, {memory.outputs / GIB:.2f} new outputs; estimated "
        f"{plan.total / GIB:.2f}). Warnings of involuntary full rematerialization: {complaints}.",
    ]
    if hlo is None:
        return [
            *lines,
            "The compiler cannot print this program: what it moves between devices stays unknown.",
        ]
    executed = executed_collectives(hlo)
    rows = [
        (*c.cells, f"{c.bytes / 1e6:,.1f}", times, f"{c.bytes * times / 1e9:.2f}")
        for c, times in sorted(executed.items(), key=lambda item: -item[0].bytes * item[1])
        if c.bytes * times >= _LEAST
    ]
    names = ("collective", "devices", "result on each", "MB", "times a step", "GB")
    total: collections.Counter[str] = collections.Counter()
    for collective, times in executed.items():
        total[collective.kind] += collective.bytes * times
    sums = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in total.most_common())
    return [*lines, "", *table(names, rows), "", f"GB in all: {sums or 'none'}."]
