"""Images by a net of depthwise-separable convolutions with group norms."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..data import images
from ..tasks import ImageTask
from ..workload import Workload
from .problem import settings


def network(channels: int, classes: int, size: int) -> nn.Module:
    """A stem and four blocks, each a depthwise and a pointwise convolution."""
    layers: list[nn.Module] = [nn.Conv2d(channels, 24, 3, 2, padding=1, bias=False)]
    width = 24
    for wider, stride in ((48, 1), (48, 2), (96, 1), (96, 1)):
        layers += [
            nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False),
            nn.GroupNorm(8, width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, wider, 1, bias=False),
            nn.GroupNorm(8, wider),
            nn.ReLU(inplace=True),
        ]
        width = wider
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
    return nn.Sequential(*layers)


def task(source: Path, cache: Path, device: torch.device) -> ImageTask:
    """4,000 images to learn from, 1,500 to be judged by."""
    data = images(source, 4_000, cache, test_limit=1_500)
    return ImageTask(data.to(device), network, 64)


WORKLOAD = Workload(
    "depthwise",
    "depthwise-separable net with group norms, 4,000 images of CIFAR-10",
    task,
    (0.30, 0.38, 0.44),
    **settings(reads="images"),
)
