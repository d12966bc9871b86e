"""Layers of a report in lines: alike ones together, with what they sum up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..model.table import pattern, starred

if TYPE_CHECKING:
    from ..costs import Cost, LayerCost


@dataclass(frozen=True)
class LayerLine:
    """One layer, or several that are alike.

    Attributes:
        name: of the layers, ``*`` where only numbers differ.
        layers: as they were counted.
    """

    name: str
    layers: tuple[LayerCost, ...]

    @property
    def label(self) -> str:
        """Name, number and sizes."""
        shape = self.layers[0].layer
        if any(line.layer.dim != shape.dim for line in self.layers):
            return self.name
        times = f"{len(self.layers)} x " if len(self.layers) > 1 else ""
        return f"{times}{self.name}  {shape.rows}x{shape.dim}"

    @property
    def parameters(self) -> int:
        """Of all, biases included."""
        shapes = [line.layer for line in self.layers]
        return sum(shape.rows * shape.row_length for shape in shapes)

    @property
    def operations(self) -> int:
        """Of all."""
        return sum(line.operations for line in self.layers)

    @property
    def bytes(self) -> int:
        """Of all."""
        return sum(line.bytes for line in self.layers)

    @property
    def floor_us(self) -> float:
        """Of all."""
        return sum(line.floor_us for line in self.layers)


def layer_lines(counted: Cost, full: bool = False) -> list[LayerLine]:
    """The layers, alike ones in a line, in the order of the first of each.

    Layers are alike if their names differ in numbers only and they are solved alike.

    Args:
        counted: of a step.
        full: a line for each layer.
    """
    alike: dict[object, list[LayerCost]] = {}
    for line in counted.layers:
        shape = line.layer
        sizes = (shape.rows, shape.row_length, shape.groups, shape.samples)
        key = (starred(shape.name), *sizes, line.formulation)
        alike.setdefault(shape.name if full else key, []).append(line)
    return [
        LayerLine(pattern([line.layer.name for line in lines]), tuple(lines))
        for lines in alike.values()
    ]


def total(counted: Cost) -> LayerLine:
    """All layers."""
    return LayerLine("total of the layers", counted.layers)


def largest(lines: Sequence[LayerLine], most: int) -> list[LayerLine]:
    """Those that cost most, the others together in a last one.

    Args:
        lines: of all layers.
        most: how many there may be.
    """
    if len(lines) <= most:
        return list(lines)
    ordered = sorted(lines, key=lambda line: line.floor_us, reverse=True)
    kept, left = ordered[: most - 1], ordered[most - 1 :]
    rest = tuple(layer for line in left for layer in line.layers)
    return [*kept, LayerLine(f"{len(rest)} other layers", rest)]
