"""A differential equation solved by a network: Poisson's, on a square.

Wanted is u with ``-(u_xx + u_yy) = f`` inside the unit square and ``u = 0`` on its
edge, for the f of which ``sin(2 pi x) sin(pi y) + sin(pi x) sin(3 pi y) / 2`` is the
solution. The network learns from the equation alone, at random points; see Raissi,
Perdikaris and Karniadakis, "Physics-informed neural networks", 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..workload import Workload
from .problem import Problem, settings

MODES = ((2, 1, 1.0), (1, 3, 0.5))
"""Waves along x, waves along y, and height."""


def solution(points: Tensor) -> Tensor:
    """What u is at points ``(N, 2)``."""
    return _sum(points, [height for _, _, height in MODES])


def source_term(points: Tensor) -> Tensor:
    """What f is at points ``(N, 2)``."""
    return _sum(points, [h * math.pi**2 * (a**2 + b**2) for a, b, h in MODES])


def _sum(points: Tensor, heights: list[float]) -> Tensor:
    x, y = (math.pi * points).unbind(1)
    waves = [(a * x).sin() * (b * y).sin() for a, b, _ in MODES]
    return sum((h * w for h, w in zip(heights, waves, strict=True)), torch.zeros(()))


@dataclass(frozen=True, kw_only=True)
class Poisson(Problem):
    """Judged by the error of u relative to u, both as root mean squares."""

    name = "Poisson's equation"
    metric = "relative error"
    batch_size: int = 256

    def model(self) -> nn.Module:
        layers: list[nn.Module] = []
        for wide_in in (2, 64, 64, 64):
            layers += [nn.Linear(wide_in, 64), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(64, 1)).to(self.place)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points inside, and a quarter as many on the edge."""
        inside = self.random(self.batch_size, 2, generator=generator)
        edge = self.random(self.batch_size // 4, 2, generator=generator)
        sides = edge[: len(edge) // 2].round(), edge[len(edge) // 2 :].round()
        edge = torch.cat(
            [
                torch.stack([sides[0][:, 0], edge[: len(edge) // 2, 1]], 1),
                torch.stack([edge[len(edge) // 2 :, 0], sides[1][:, 1]], 1),
            ]
        )
        return inside, edge

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Mean square of what is missing in the equation, and of u on the edge."""
        points = x.requires_grad_()
        (slope,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
        missing = source_term(x)
        for i in range(2):
            along = slope[:, i].sum()
            (bend,) = torch.autograd.grad(along, points, create_graph=True)
            missing = missing + bend[:, i]
        edge: Tensor = model(y)
        return missing.square().mean() + 100 * edge.square().mean()

    def score(self, model: nn.Module) -> float:
        points = self.random(4096, 2, generator=self.held_out())
        found: Tensor = model(points)[:, 0]
        exact = solution(points)
        return float((found - exact).norm() / exact.norm())


def task(source: Path, cache: Path, device: torch.device) -> Poisson:
    """Generated."""
    return Poisson(place=device)


WORKLOAD = Workload(
    "poisson",
    "physics-informed net for Poisson's equation",
    task,
    (0.3, 0.06, 0.018),
    **settings(),
)
