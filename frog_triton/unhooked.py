"""Layers whose weight has gradients, but no samples.

Attention that uses its projection's weight without calling the module, a layer fed
nested tensors: FROG sees no activations of theirs. One step without is no proof (a
mixture's expert may not be routed to, an early exit taken), so their rows take the
identity Fisher at first. After `PATIENCE` such steps in a row the fallback updates
them, until samples come (again).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from .routing import Layer

REASON = "its weight is used without calling the module"

PATIENCE = 3
"""Steps with a gradient, and without a call, that prove a layer is used otherwise."""


class Known(NamedTuple):
    """What is to be known, of all ranks, before a step.

    Attributes:
        called: names of layers that were called since the last step.
        sampled: names of layers that have samples.
        used: names of layers whose gradient is not zero, where that is asked.
        bad: whether a gradient is not finite.
    """

    called: set[str]
    sampled: set[str]
    used: set[str]
    bad: bool


class Unhooked:
    """Which layers are let go of, and why.

    Attributes:
        reasons: of those that the fallback updates, by name.
        misses: of the others, in how many steps in a row they had a gradient without a
            call; none where there was no such step.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self.misses: dict[str, int] = {}

    def doubtful(self, layers: Iterable[Layer], called: Collection[str]) -> list[Layer]:
        """Layers that this step may prove unhooked, if their gradient is not zero."""
        return [
            layer
            for layer in layers
            if self.misses.get(layer.name, 0) == PATIENCE - 1
            and layer.name not in called
        ]

    def review(
        self, layers: Iterable[Layer], known: Known, unsampled: Mapping[str, str]
    ) -> tuple[list[Layer], list[Layer]]:
        """Decide, the same on all ranks.

        Args:
            layers: that have a gradient.
            known: of all ranks.
            unsampled: why calls of a layer made no samples, if that is known.

        Returns:
            Layers to let go of, and layers to take back.
        """
        gone, back = [], []
        for layer in layers:
            name = layer.name
            if name in known.sampled or name in known.called:
                self.misses.pop(name, None)
                if name in known.sampled and self.reasons.pop(name, None) is not None:
                    back.append(layer)
            elif name not in self.reasons:
                misses = self.misses.pop(name, 0) + 1
                if misses < PATIENCE:
                    self.misses[name] = misses
                elif name in known.used:
                    self.reasons[name] = unsampled.get(name, REASON)
                    gone.append(layer)
        return gone, back

    def forget(self, name: str) -> None:
        """Begin anew with a layer."""
        self.reasons.pop(name, None)
        self.misses.pop(name, None)

