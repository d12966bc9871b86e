"""What is in a kernel's machine code: its instructions, by kind, and its loops."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .offline import disassembly

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_JUMP = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")

_KINDS = {
    "tensor core": r"HGMMA|HMMA|QGMMA|UTC\w*MMA|OMMA",
    "memory": r"LDG|LDGSTS|STG|RED|ATOM|UTMA",
    "shared memory": r"LDS|STS|LDSM|STSM|SHFL",
    "spills": r"LDL|STL",
    "barriers": r"BAR|WARPSYNC|DEPBAR|LDGDEPBAR|SYNCS|MEMBAR|FENCE|WARPGROUP",
    "float": r"F\w+|MUFU|HADD2|HMUL2|HFMA2",
}
"""Kinds of instructions, by how they begin; what is left is integers and control."""

SLOTS = {"memory": 4, "shared memory": 4, "spills": 4}
"""Issue slots that an instruction takes where it is not one: a processor's four
schedulers share one unit for memory."""

SHORTEST_LOOP = 8
"""Instructions below which a jump back waits for something and computes nothing."""


@dataclass(frozen=True)
class Loop:
    """How often a loop of a kernel runs.

    Attributes:
        count: as it is written.
        inner: loops inside of it, in the order in which they begin.
        loads: instructions that load in one iteration, where the assembler may have
            made one of several; 0 where it does not.
    """

    count: int
    inner: Sequence[Loop] = ()
    loads: int = 0


Trips = Sequence[Loop]
"""Loops in the order in which they begin."""


@dataclass(frozen=True)
class Code:
    """Machine code of a kernel.

    Attributes:
        instructions: in order.
        loops: the first instruction and the last of each loop, by where it begins.
    """

    instructions: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]

    def executed(self, trips: Trips) -> Counter[str]:
        """Instructions that a warp executes, by kind.

        Args:
            trips: of its loops; those that are not named run once.
        """
        times = [1] * len(self.instructions)
        _multiply(times, self.instructions, self.loops, trips)
        found: Counter[str] = Counter()
        for instruction, count in zip(self.instructions, times, strict=True):
            found[_kind(instruction)] += count
        return found


def code_of(kernel: object) -> Code:
    """The machine code of what `offline.compiled` gave."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in disassembly(kernel).splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(found[1])
    loops = set()
    for i, instruction in enumerate(instructions):
        jump = _JUMP.search(instruction)
        first = labels.get(jump[1], i) if jump else i
        if i - first >= SHORTEST_LOOP:
            loops.add((first, i))
    return Code(tuple(instructions), tuple(sorted(loops)))


def slots(executed: Counter[str]) -> int:
    """Issue slots of instructions by kind."""
    return sum(SLOTS.get(kind, 1) * count for kind, count in executed.items())


def _kind(instruction: str) -> str:
    name = _PREDICATE.sub("", instruction).split()[0]
    for kind, pattern in _KINDS.items():
        if re.match(rf"(?:{pattern})\b", name):
            return kind
    return "integers and control"


def _multiply(
    times: list[int],
    instructions: Sequence[str],
    loops: Sequence[tuple[int, int]],
    trips: Trips,
) -> None:
    """Count the loops' instructions as often as they run."""
    for first, last in loops:
        if any(a <= first and last <= b and (a, b) != (first, last) for a, b in loops):
            continue  # inside of another
        if not trips:
            return
        loop, trips = trips[0], trips[1:]
        body = range(first, last + 1)
        loads = sum(_kind(instructions[i]) == "memory" for i in body)
        unrolled = max(1, loads // loop.loads) if loop.loads else 1
        for i in body:
            times[i] *= -(-loop.count // unrolled)
        inside = [
            (a, b)
            for a, b in loops
            if first <= a and b <= last and (a, b) != (first, last)
        ]
        _multiply(times, instructions, inside, loop.inner)
