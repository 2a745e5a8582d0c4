"""What a compiled program moves between devices, read off its HLO."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

from jax.sharding import Mesh

from mlra_jax.config import ModelConfig
from mlra_jax.decoding.engine import compile_step
from mlra_jax.decoding.sampling import Sampling
from mlra_jax.sharding import decode_rules

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_INSTRUCTION = re.compile(rf" = (?P<result>\([^=]*\)|\S+) (?P<kind>{'|'.join(_KINDS)})\(")
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+\d\w*)\[(?P<shape>[\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices in a compiled program."""

    kind: str
    """As in HLO: all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute, collective-broadcast."""
    devices: int
    """That exchange with one another."""
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    """Types and shapes that each device has afterwards."""

    @property
    def bytes(self) -> int:
        """Size of the arrays before they are cut or after they are put together: the larger side of the exchange."""
        width = lambda dtype: math.ceil(int((re.findall(r"\d+", dtype) or ["8"])[0]) / 8)
        held = sum(width(dtype) * math.prod(shape) for dtype, shape in self.arrays)
        return held * self.devices if self.kind == "reduce-scatter" else held

    def __str__(self) -> str:
        arrays = " and ".join(f"{dtype}[{','.join(map(str, shape))}]" for dtype, shape in self.arrays)
        return f"{self.kind} | {self.devices} | {arrays}"


def _group_size(line: str) -> int:
    """How many devices exchange with one another in the collective of this line of HLO."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return len(set(re.findall(r"\d+", pairs[1])))
    groups = re.search(r"replica_groups=(.*)", line)
    assert groups is not None, line
    if explicit := re.match(r"\{\{([\d,]+)\}", groups[1]):  # {{0,1},{2,3}}
        return explicit[1].count(",") + 1
    if iota := re.match(r"\[\d+,(\d+)\]<=", groups[1]):  # [2,2]<=[4]: 2 groups of 2
        return int(iota[1])
    if mesh := re.match(r"mesh\[(.*?)\] \{(.*?)\}", groups[1]):  # mesh['a'=2,'b'=2] {'b'}
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh[2]))
    raise NotImplementedError(f"These replica groups are not understood: {groups[1][:80]}")


def parse_collectives(hlo: str) -> list[Collective]:
    """The collectives in the text of a program compiled for the CPU, in order, without those of one device alone.

    Raises:
      NotImplementedError: a collective says in an unknown way which devices take part.
    """
    found = []
    for line in hlo.splitlines():
        if instruction := _INSTRUCTION.search(line):
            arrays = tuple(
                (m["dtype"], tuple(int(n) for n in m["shape"].split(",") if n))
                for m in _ARRAY.finditer(instruction["result"])
            )
            found.append(Collective(instruction["kind"], _group_size(line), arrays))
    return [c for c in found if c.devices > 1]


def step_collectives(
    config: ModelConfig, mesh: Mesh, *, split_heads: bool, batch: int, max_len: int, sampling: Sampling
) -> list[Collective]:
    """The collectives of the decode step, compiled for `mesh` without allocating anything."""
    rules = decode_rules(split_heads)
    compiled = compile_step(config, rules, mesh, batch=batch, max_len=max_len, sampling=sampling)
    hlo = compiled.as_text()
    assert hlo is not None
    return parse_collectives(hlo)


def table(collectives: Sequence[Collective], n_layers: int) -> list[str]:
    """Lines of a Markdown table: each kind of exchange, in the order of the program, and how often it happens.

    What happens at least `n_layers` times is taken to happen in every layer.
    """
    lines = [
        "| exchange | devices | each has afterwards | bytes | per layer | besides |",
        "| --- |" + " --- |" * 5,
    ]
    for collective, count in collections.Counter(collectives).items():
        per_layer, besides = divmod(count, n_layers)
        lines.append(f"| {collective} | {collective.bytes:,} | {per_layer or ''} | {besides or ''} |")
    return [re.sub(r" +", " ", line) for line in lines]
