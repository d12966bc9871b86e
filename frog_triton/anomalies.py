"""How often rows of layers met what is not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from .guards import refuse_to_make_in_graph
from .model.plan import Layer

KINDS = ("nonfinite_samples", "overflowing_momenta")


class Anomalies:
    """Counters of each layer's rows, on the layer's device.

    Attributes:
        counts: by the layer's name, int32 ``(2, R)``: how often a row has met samples
            that are not finite, and how often it stayed because its momentum would not
            have been. R is of the rows that this rank solves.
    """

    def __init__(self) -> None:
        self.counts: dict[str, Tensor] = {}

    def expect(self, layer: Layer, rows: int) -> None:
        """Make, or bring to the layer's device, its counters.

        Args:
            layer: whose.
            rows: how many this rank solves.

        Raises:
            RuntimeError: they would be made while a CUDA graph is captured.
        """
        device = layer.weight.device
        counts = self.counts.get(layer.name)
        if counts is None:
            refuse_to_make_in_graph(layer.name)
            counts = torch.zeros((2, rows), dtype=torch.int32, device=device)
        self.counts[layer.name] = counts.to(device)

    def add_to(self, found: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
        """What was counted, as `FROG.anomalies` reports it; waits for the device.

        Args:
            found: other counts by name; gains these.
        """
        for name, value in self.counts.items():
            rows = dict(zip(KINDS, value.sum(1).tolist(), strict=True))
            if any(rows.values()):
                found[name] = found.get(name, {}) | rows
        return found
