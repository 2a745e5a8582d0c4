"""The collectives of a compiled program, read off its HLO."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_INSTRUCTION = re.compile(rf" = (?P<result>\(.*?\)|\S+) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+\d\w*)\[(?P<shape>[\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program."""

    kind: str
    """HLO opcode: all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute or collective-broadcast."""
    devices: int
    """Size of the group of devices that take part."""
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    """Dtypes and shapes of the result on each device."""

    @property
    def bytes(self) -> int:
        """Size of the larger side of the exchange: of the arrays before a scatter, or after a gather."""
        width = lambda dtype: math.ceil(int((re.findall(r"\d+", dtype) or ["8"])[0]) / 8)
        held = sum(width(dtype) * math.prod(shape) for dtype, shape in self.arrays)
        return held * self.devices if self.kind == "reduce-scatter" else held

    @property
    def cells(self) -> tuple[str, str, str]:
        """Kind, devices and arrays, as tables show them."""
        arrays = " and ".join(f"{dtype}[{','.join(map(str, shape))}]" for dtype, shape in self.arrays)
        return self.kind, str(self.devices), arrays


def _group_size(line: str) -> int:
    """The number of devices in a group of the collective in this line of HLO."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return len(set(re.findall(r"\d+", pairs[1])))
    groups = re.search(r"replica_groups=(.*)", line)
    assert groups is not None, line
    if explicit := re.match(r"\{\{([\d,]+)\}", groups[1]):  # {{0,1},{2,3}}
        return explicit[1].count(",") + 1
    if iota := re.match(r"\[\d+,(\d+)\]<=", groups[1]):  # [2,2]<=[4]: 2 groups of 2
        return int(iota[1])
    # mesh['a'=2,'b'=2] {'b'}, also with device_ids=([2,2]T(1,0)) between
    if mesh := re.match(r"mesh\[(.*?)\](?:, device_ids=\(.*?\)\))? \{(.*?)\}", groups[1]):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh[2]))
    raise NotImplementedError(f"These replica groups are not understood: {groups[1][:80]}")


def _of_line(line: str) -> Collective | None:
    """The collective that a line of HLO starts, if any."""
    instruction = _INSTRUCTION.search(line)
    if instruction is None:
        return None
    arrays = _arrays(instruction["result"])
    nested = instruction["result"].startswith("((")  # ((operands), results), in newer versions of all of them
    if instruction["start"] and (nested or instruction["kind"] in ("all-gather", "collective-permute")):
        # The result of an asynchronous collective also holds the operands, and for some what the hardware waits on.
        arrays = tuple(a for a in arrays if a[1])
        arrays = arrays[len(arrays) // 2 :]
    return Collective(instruction["kind"], _group_size(line), arrays)


def _arrays(result: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(
        (m["dtype"], tuple(int(n) for n in m["shape"].split(",") if n)) for m in _ARRAY.finditer(result)
    )


_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>\S+) \(.*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)|(?:branch|called)_computations=\{(.*?)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def executed_collectives(hlo: str) -> dict[Collective, int]:
    """The collectives of a program compiled for CPU, GPU or TPU, and how often each is executed per run.

    A collective in a loop counts once per iteration, where the program states the trip count. One that the compiler
    has split into steps (a chain, on TPU) counts once. Collectives within single devices are left out.

    Raises:
      NotImplementedError: the replica groups of a collective have an unknown form.
    """
    computations = dict(_computations(hlo))
    times = _times(computations)
    chains: dict[str, tuple[Collective, int]] = {}
    executed: dict[Collective, int] = {}
    for name, lines in computations.items():
        # On TPU a reduce-scatter is a fusion that calls an all-reduce and a slice.
        if not times.get(name) or name.startswith("all-reduce-scatter"):
            continue
        for line in lines:
            if scattered := re.search(r" = (\S+|\(.*?\)) fusion\(.*calls=%(all-reduce-scatter\S*?),", line):
                inner = next(filter(None, map(_of_line, computations[scattered[2]])), None)
                collective = inner and Collective("reduce-scatter", inner.devices, _arrays(scattered[1]))
            else:
                collective = _of_line(line)
            if collective is None or collective.devices == 1:
                continue
            if chain := re.search(r'chain_id="(\d+)"', line):
                previous = chains.get(chain[1], (collective, 0))[1]
                chains[chain[1]] = collective, max(previous, times[name])
            else:
                executed[collective] = executed.get(collective, 0) + times[name]
    for collective, n in chains.values():
        executed[collective] = executed.get(collective, 0) + n
    return executed


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    """The names and lines of the program's computations; the entry computation is called `ENTRY`."""
    name = ""
    lines: list[str] = []
    for line in hlo.splitlines():
        if begins := _COMPUTATION.match(line):
            name, lines = ("ENTRY" if begins["entry"] else begins["name"]), []
        elif line.startswith("}"):
            yield name, lines
        else:
            lines.append(line)


def _times(computations: dict[str, list[str]]) -> dict[str, int]:
    """The number of times that each computation is executed."""
    times: dict[str, int] = {}

    def visit(name: str, n: int) -> None:
        times[name] = times.get(name, 0) + n
        for line in computations.get(name, []):
            for match in _CALLED.finditer(line):
                for called in re.findall(r"[\w.\-]+", match[1] or match[2]):
                    again = _trips(line, computations) if match[0].startswith("body=") else 1
                    if called in computations:
                        visit(called, n * again)

    visit("ENTRY", 1)
    return times


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """The trip count of the loop in this line of HLO; 1 where the program does not state it."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    bounds = [int(n) for each in lines for n in re.findall(r" s32\[\]\S* constant\((\d+)\)", each)]
    return max(bounds, default=1)
