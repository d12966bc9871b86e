"""The routing table: a line for every parameter, or one for all that are alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Route:
    """One line of the routing table.

    Attributes:
        name: the parameter's name in the model.
        shape: its shape.
        updated_by: ``"frog"``, the fallback's name, or ``"-"``.
        reason: why.
    """

    name: str
    shape: tuple[int, ...]
    updated_by: str
    reason: str


class RoutingTable(list[Route]):
    """All routes of a model; prints as a table.

    Attributes:
        note: a line printed below it.
    """

    note: str = ""

    def __str__(self) -> str:
        header = ("parameter", "shape", "updated by", "why")
        lines = [
            (r.name, "x".join(map(str, r.shape)), r.updated_by, r.reason) for r in self
        ]
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        rule = tuple("-" * width for width in widths)
        return "\n".join(
            "  ".join(
                cell.ljust(w) for cell, w in zip(line, widths, strict=True)
            ).rstrip()
            for line in (header, rule, *lines)
        ) + (f"\n{self.note}" if self.note else "")

    def updated_by(self, name: str) -> list[str]:
        """Names of the parameters that `name` updates."""
        return [route.name for route in self if route.updated_by == name]
