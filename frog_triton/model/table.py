"""The routing table: a row for every parameter, printed in groups of like ones."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .coverage import Coverage, percent

_MOST_SHAPES = 3
"""Shapes of like parameters that have a line each; if there are more, all share one."""

_WIDEST = 72
"""Characters of the names in a line, beyond which the others are left out."""


@dataclass
class Route:
    """One row of the routing table.

    Attributes:
        name: the parameter's name in the model.
        shape: its shape.
        updated_by: ``"frog"``, the fallback's name, or ``"-"``.
        reason: why; then notes, each after a semicolon.
    """

    name: str
    shape: tuple[int, ...]
    updated_by: str
    reason: str

    @property
    def parameters(self) -> int:
        """Its elements."""
        return math.prod(self.shape)

    @property
    def kind(self) -> str:
        """The reason without its notes."""
        return self.reason.partition("; ")[0]

    @property
    def note(self) -> str:
        """The notes of the reason."""
        return self.reason.partition("; ")[2]

    @property
    def frozen(self) -> bool:
        """Whether it takes no gradient, as the reason or a note says."""
        return any(part.startswith("frozen") for part in self.reason.split("; "))

    @property
    def counts_as(self) -> str:
        """``"frozen"``, or who updates it."""
        return "frozen" if self.frozen else self.updated_by


@dataclass(frozen=True)
class Line:
    """One printed line: a parameter, or several that are alike.

    Attributes:
        names: of the parameters or their modules, ``*`` where only numbers differ.
        shape: ``"various"`` where it differs.
        tensors: how many parameters there are.
        parameters: their elements, summed.
        updated_by: as in `Route`; ``"frozen"`` in a line of the totals.
        reason: as in `Route`; in the totals, the share of the trainable parameters.
    """

    names: str
    shape: str
    tensors: int
    parameters: int
    updated_by: str
    reason: str

    def cells(self) -> tuple[str, ...]:
        """As text, a cell for each column."""
        counts = (str(self.tensors), f"{self.parameters:,}")
        return (self.names, self.shape, *counts, self.updated_by, self.reason)


class RoutingTable(list[Route]):
    """The routes of all parameters of a model, in its order.

    Printed, it is headed by its `coverage`; like parameters share a line, and totals
    end it. `full` has a line for each.

    Attributes:
        note: a line printed below it.
    """

    note: str = ""

    @property
    def coverage(self) -> Coverage:
        """How much FROG preconditions."""
        return Coverage.of(self)

    def __str__(self) -> str:
        header = ("parameter", "shape", "tensors", "elements", "updated by", "why")
        parts = (self.lines(), self.totals())
        rows = [[line.cells() for line in part] for part in parts]
        text = _aligned(header, rows, right=(2, 3))
        return "\n".join(filter(None, [str(self.coverage), text, self.note]))

    def full(self) -> str:
        """The table as text with a line for every parameter."""
        header = ("parameter", "shape", "updated by", "why")
        lines = [(r.name, _shape([r]), r.updated_by, r.reason) for r in self]
        return "\n".join(filter(None, [_aligned(header, [lines]), self.note]))

    def lines(self, full: bool = False) -> list[Line]:
        """The routes, like ones together, in the order of the first of each.

        What FROG preconditions is alike if the names differ in numbers only; all
        else if the reason is the same.

        Args:
            full: a line for each.
        """
        if full:
            return [_line([route]) for route in self]
        alike: dict[tuple[str, str, str, bool], list[Route]] = {}
        for route in self:
            name = starred(route.name) if route.updated_by == "frog" else ""
            key = (name, route.updated_by, route.kind, route.frozen)
            alike.setdefault(key, []).append(route)
        lines: list[Line] = []
        for (name, _, _, _), routes in alike.items():
            shapes: dict[tuple[int, ...], list[Route]] = {}
            for route in routes:
                shapes.setdefault(route.shape, []).append(route)
            apart = name and len(shapes) <= _MOST_SHAPES
            lines += map(_line, shapes.values() if apart else [routes])
        return lines

    def totals(self) -> list[Line]:
        """A line for each updater, FROG first, then one for all."""
        found: dict[str, list[Route]] = {}
        for route in self:
            found.setdefault(route.counts_as, []).append(route)
        trainable = self.coverage.all_parameters
        lines = []
        for who in sorted(found, key=lambda who: who != "frog"):
            elements = sum(route.parameters for route in found[who])
            share = "" if who in ("-", "frozen") else percent(elements, trainable)
            lines.append(Line("total", "", len(found[who]), elements, who, share))
        if len(lines) == 1:
            return lines
        elements = sum(line.parameters for line in lines)
        return [*lines, Line("total", "", len(self), elements, "", "")]

    def updated_by(self, name: str) -> list[str]:
        """Names of the parameters that `name` updates."""
        return [route.name for route in self if route.updated_by == name]


def _line(routes: Sequence[Route]) -> Line:
    first = routes[0]
    return Line(
        names=_names(routes),
        shape=_shape(routes),
        tensors=len(routes),
        parameters=sum(route.parameters for route in routes),
        updated_by=first.updated_by,
        reason="; ".join(filter(None, [first.kind, _notes(routes)])),
    )


def _names(routes: Sequence[Route]) -> str:
    """Names for a line: of the parameters, or of modules that have several."""
    parts = [route.name.rpartition(".") for route in routes]
    modules = {module for module, *_ in parts}
    several = len(modules) > 1 and len({leaf for *_, leaf in parts}) > 1
    names = [(several and module) or module + dot + leaf for module, dot, leaf in parts]
    patterns: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        patterns.setdefault(starred(name), []).append(name)
    shown: list[str] = []
    width = 0
    for text in map(pattern, patterns.values()):
        width += len(text) + 2
        if shown and width > _WIDEST:
            shown.append("...")
            break
        shown.append(text)
    return ", ".join(shown) + (f" ({len(modules)} modules)" if several else "")


def starred(name: str) -> str:
    """The same for names that differ in numbers only."""
    return re.sub(r"\d+", "*", name)


def pattern(names: Sequence[str]) -> str:
    """Names that differ in numbers only, as one, with ``*`` for what differs."""
    pieces = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    return "".join(piece[0] if len(set(piece)) == 1 else "*" for piece in pieces)


def _shape(routes: Sequence[Route]) -> str:
    shapes = {route.shape for route in routes}
    return "x".join(map(str, routes[0].shape)) if len(shapes) == 1 else "various"


def _notes(routes: Sequence[Route]) -> str:
    """The note of all routes, or which notes how many have."""
    notes = Counter(route.note for route in routes)
    if len(notes) == 1:
        return routes[0].note
    if len(notes) > 2:
        return "various"
    return ", ".join(f"{note or 'nothing yet'} ({n})" for note, n in notes.items())


def _aligned(
    header: Sequence[str],
    parts: Sequence[Sequence[Sequence[str]]],
    right: Iterable[int] = (),
) -> str:
    """Rows of text under a header, with a rule before each part."""
    rows = [header, *(row for part in parts for row in part)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def text(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    rule = text(["-" * width for width in widths])
    lines = [text(header)]
    for part in parts:
        lines += [rule, *map(text, part)]
    return "\n".join(lines)
