"""Handwritten digits through a narrow place: a deep autoencoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import digits
from ..workload import Workload
from .problem import Problem, settings

WIDTHS = (64, 256, 128, 64, 12, 64, 128, 256, 64)


@dataclass(frozen=True, kw_only=True)
class Autoencoder(Problem):
    """Judged by the mean squared error; pixels have unit variance."""

    name = "digits, rebuilt"
    metric = "MSE"
    batch_size: int = 128
    train: Tensor = field(default_factory=lambda: digits().train_x.flatten(1))
    test: Tensor = field(default_factory=lambda: digits().test_x.flatten(1))

    def model(self) -> nn.Module:
        layers: list[nn.Module] = []
        for wide_in, wide_out in pairwise(WIDTHS):
            layers += [nn.Linear(wide_in, wide_out), nn.ReLU()]
        return nn.Sequential(*layers[:-1]).to(self.place)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = self.pick(self.train.to(self.place), generator)
        return x, x

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model(x), y)

    def score(self, model: nn.Module) -> float:
        held_out = self.test.to(self.place)
        return self.loss(model, held_out, held_out).item()


def task(source: Path, cache: Path, device: torch.device) -> Autoencoder:
    """The digits that scikit-learn ships."""
    return Autoencoder(place=device)


WORKLOAD = Workload(
    "autoencoder",
    "deep autoencoder of digits",
    task,
    (0.45, 0.24, 0.104),
    **settings(),
)
