"""Two networks against each other: one makes points, one tells them from real ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..workload import Workload
from .problem import Problem, settings

NOISE = 8
PENALTY = 1.0
"""On the judge's slope at real points, without which neither learns: Mescheder et al.,
"Which training methods for GANs do actually converge?", 2018."""


class Pair(nn.Module):
    """A judge of points in the plane, and a forger that makes them from noise."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = _mlp(2, 128, 128, 128, 1)
        self.forger = _mlp(NOISE, 128, 128, 128, 2)


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide_in, wide_out in pairwise(widths):
        layers += [nn.Linear(wide_in, wide_out), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True, kw_only=True)
class Ring(Problem):
    """Points in eight clusters on a circle, forged.

    Judged by the energy distance of forged points to real ones, which is zero where
    both have the same distribution: Szekely and Rizzo, "Energy statistics", 2013.
    """

    name = "points on a ring"
    metric = "energy distance"
    batch_size: int = 256

    def model(self) -> nn.Module:
        return Pair().to(self.place)

    def parts(self, model: nn.Module) -> Sequence[nn.Module]:
        """The judge, and then the forger, each with an optimizer of its own."""
        assert isinstance(model, Pair)
        return [model.judge, model.forger]

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self._draw(self.batch_size, generator)

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Real points, and noise."""
        turn = (8 * self.random(count, generator=generator)).floor() * (math.pi / 4)
        points = torch.stack([turn.cos(), turn.sin()], 1)
        blur = self.normal(count, 2, generator=generator)
        return points + 0.05 * blur, self.normal(count, NOISE, generator=generator)

    def losses(self, model: nn.Module, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        assert isinstance(model, Pair)
        x = x.requires_grad_()
        real = model.judge(x)
        (slope,) = torch.autograd.grad(real.sum(), x, create_graph=True)
        with torch.no_grad():
            forged = model.forger(y)
        told = F.softplus(-real).mean() + F.softplus(model.judge(forged)).mean()
        yield told + PENALTY / 2 * slope.square().sum(1).mean()
        yield F.softplus(-model.judge(model.forger(y))).mean()

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Of both together, to look at."""
        return torch.stack(list(self.losses(model, x, y))).sum()

    def score(self, model: nn.Module) -> float:
        assert isinstance(model, Pair)
        real, noise = self._draw(1024, self.held_out())
        forged = model.forger(noise)
        across = torch.cdist(real, forged).mean()
        within = torch.cdist(real, real).mean() + torch.cdist(forged, forged).mean()
        return (2 * across - within).item()


def task(source: Path, cache: Path, device: torch.device) -> Ring:
    """Generated."""
    return Ring(place=device)


WORKLOAD = Workload(
    "gan",
    "a forger and a judge of points on a ring",
    task,
    (0.1, 0.0415, 0.026),
    **settings(),
)
