"""Images by a small vision transformer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import images
from ..models import Block
from ..tasks import ImageTask
from ..workload import Workload
from .problem import settings

PATCH, WIDTH, DEPTH, HEADS = 4, 64, 2, 4


class ViT(nn.Module):
    """Patches, blocks of a transformer that looks both ways, and their mean."""

    def __init__(self, channels: int, classes: int, size: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, WIDTH, PATCH, PATCH)
        self.position = nn.Parameter(0.02 * torch.randn((size // PATCH) ** 2, WIDTH))
        self.blocks = nn.Sequential(
            *(Block(WIDTH, HEADS, is_causal=False) for _ in range(DEPTH))
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes)``."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


def task(source: Path, cache: Path, device: torch.device) -> ImageTask:
    """2,560 images to learn from, 1,500 to be judged by."""
    data = images(source, 2_560, cache, test_limit=1_500)
    return ImageTask(data.to(device), ViT, 32)


WORKLOAD = Workload(
    "vit",
    "vision transformer of two blocks, 2,560 images of CIFAR-10",
    task,
    (0.30, 0.35, 0.40),
    **settings(reads="images"),
)
