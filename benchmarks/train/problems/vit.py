"""Images by a small vision transformer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..data import images
from ..models import ViT
from ..tasks import ImageTask
from ..workload import Workload
from .problem import settings


def network(channels: int, classes: int, size: int) -> nn.Module:
    """Patches of 4 x 4 pixels, two blocks of width 64, four heads."""
    return ViT(channels, classes, size, patch=4, depth=2, width=64, heads=4)


def task(source: Path, cache: Path, device: torch.device) -> ImageTask:
    """2,560 images to learn from, 1,500 to be judged by."""
    data = images(source, 2_560, cache, test_limit=1_500)
    return ImageTask(data.to(device), network, 32)


WORKLOAD = Workload(
    "vit",
    "vision transformer of two blocks, 2,560 images of CIFAR-10",
    task,
    (0.30, 0.34, 0.40),
    **settings(reads="images"),
)
