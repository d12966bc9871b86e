"""Images by a convolutional net that has no norms."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..data import images
from ..tasks import ImageTask
from ..workload import Workload
from .problem import settings


def network(channels: int, classes: int, size: int) -> nn.Module:
    """Five convolutions with ReLU, three of stride two, as torch draws them."""
    layers: list[nn.Module] = []
    for width, stride in ((16, 2), (32, 1), (32, 2), (64, 1), (64, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, padding=1), nn.ReLU()]
        channels = width
    layers += [nn.Flatten(), nn.Linear(channels * (size // 8) ** 2, classes)]
    return nn.Sequential(*layers)


def task(source: Path, cache: Path, device: torch.device) -> ImageTask:
    """4,000 images to learn from, 1,500 to be judged by."""
    data = images(source, 4_000, cache, test_limit=1_500)
    return ImageTask(data.to(device), network, 64)


WORKLOAD = Workload(
    "plain-cnn",
    "five convolutions without norms, 4,000 images of CIFAR-10",
    task,
    (0.30, 0.42, 0.49),
    **settings(reads="images"),
)
