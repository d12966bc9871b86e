"""Handwritten digits by a deep net without norms or shortcuts, as torch draws it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Dataset, digits
from ..workload import Workload
from .problem import Problem, settings


@dataclass(frozen=True, kw_only=True)
class DeepMLP(Problem):
    """Ten hidden layers of 128; judged by the held-out cross-entropy."""

    name = "digits, deep net"
    metric = "loss"
    data: Dataset = field(default_factory=digits)

    def model(self) -> nn.Module:
        layers: list[nn.Module] = []
        for wide_in in (64, *[128] * 9):
            layers += [nn.Linear(wide_in, 128), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(128, 10)).to(self.place)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        data = self.data
        index = self.pick(torch.arange(len(data.train_y), device=self.place), generator)
        return data.train_x[index].flatten(1), data.train_y[index]

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    def score(self, model: nn.Module) -> float:
        return self.loss(model, self.data.test_x.flatten(1), self.data.test_y).item()


def task(source: Path, cache: Path, device: torch.device) -> DeepMLP:
    """The digits that scikit-learn ships."""
    return DeepMLP(place=device, data=digits().to(device))


WORKLOAD = Workload(
    "deep-mlp",
    "ten hidden layers with ReLU and no norms, digits",
    task,
    (1.0, 0.43, 0.18),
    **settings(),
)
