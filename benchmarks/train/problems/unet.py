"""Noise taken out of photographs by a small U-Net."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..workload import Workload
from .problem import Problem, settings

CROP, NOISE = 32, 0.2


def _convolutions(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.GroupNorm(4, width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Down twice and up twice, with shortcuts; the output is the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [_convolutions(3, 12), _convolutions(12, 24), _convolutions(24, 48)]
        )
        self.wider = nn.ModuleList(
            [nn.ConvTranspose2d(48, 24, 2, 2), nn.ConvTranspose2d(24, 12, 2, 2)]
        )
        self.up = nn.ModuleList([_convolutions(48, 24), _convolutions(24, 12)])
        self.noise = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Noisy images without their noise."""
        seen, shortcuts = x, list[Tensor]()
        for level in self.down:
            seen = level(F.max_pool2d(seen, 2) if shortcuts else seen)
            shortcuts.append(seen)
        for wider, level, shortcut in zip(
            self.wider, self.up, shortcuts[-2::-1], strict=True
        ):
            seen = level(torch.cat([wider(seen), shortcut], 1))
        clean: Tensor = x - self.noise(seen)
        return clean


@dataclass(frozen=True, kw_only=True)
class Denoising(Problem):
    """Judged by the peak signal-to-noise ratio on crops of another photograph.

    Attributes:
        learned: a photograph ``(3, height, width)``, between 0 and 1.
        other: likewise.
    """

    name = "photographs with noise"
    metric = "PSNR"
    batch_size: int = 16
    steps_per_epoch: int = 50
    learned: Tensor
    other: Tensor

    def model(self) -> nn.Module:
        return UNet().to(self.place)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self._crops(self.learned, self.batch_size, generator)

    def _crops(
        self, photo: Tensor, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Crops with noise, and without."""
        _, height, width = photo.shape
        room = torch.tensor([height - CROP, width - CROP], device=self.place)
        corners = (self.random(count, 2, generator=generator) * room).long()
        clean = torch.stack(
            [photo[:, y : y + CROP, x : x + CROP] for y, x in corners.tolist()]
        )
        noise = self.normal(*clean.shape, generator=generator)
        return clean + NOISE * noise, clean

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model(x), y)

    def score(self, model: nn.Module) -> float:
        noisy, clean = self._crops(self.other, 128, self.held_out())
        return -10 * math.log10(max(F.mse_loss(model(noisy), clean).item(), 1e-12))


def task(source: Path, cache: Path, device: torch.device) -> Denoising:
    """The two photographs that scikit-learn ships."""
    from sklearn.datasets import load_sample_image

    photos = [
        torch.from_numpy(load_sample_image(name).astype(np.float32) / 255)
        .permute(2, 0, 1)
        .to(device)
        for name in ("china.jpg", "flower.jpg")
    ]
    return Denoising(place=device, learned=photos[0], other=photos[1])


WORKLOAD = Workload(
    "unet",
    "small U-Net, noise taken out of photographs",
    task,
    (15.0, 20.1, 23.5),
    **settings(),
)
