"""A photograph learned by a network: from a place in it to the colour there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tasks import Task

PIXELS = 128 * 192
"""Photographs are made as small as this; smaller ones stay as they are."""


@dataclass(frozen=True)
class Photo:
    """A photograph, small.

    Attributes:
        name: for titles.
        colours: ``(height, width, 3)``, between 0 and 1.
        credit: who took it.
    """

    name: str
    colours: Tensor
    credit: str = ""


def shipped() -> Photo:
    """The photograph of a temple that scikit-learn ships."""
    import sklearn.datasets
    from PIL import Image

    folder = Path(sklearn.datasets.__file__).parent / "images"
    with Image.open(folder / "china.jpg") as image:
        colours = _small(image)
    return Photo("a temple", colours, "photograph by danielbuechele, CC BY 2.0")


def photo(source: Path) -> Photo:
    """A photograph from a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image, or one of fewer than 32 x 32 pixels.
    """
    from PIL import Image, UnidentifiedImageError

    if not source.is_file():
        raise FileNotFoundError(f"{source} is not a file; --data takes an image")
    try:
        with Image.open(source) as image:
            if min(image.size) < 32:
                raise ValueError(f"{source} has fewer than 32 x 32 pixels")
            return Photo(source.stem, _small(image))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{source} cannot be read as an image: {error}") from error


def _small(image: object) -> Tensor:
    import numpy as np
    from PIL import Image

    assert isinstance(image, Image.Image)
    width, height = image.size
    scale = min(1.0, math.sqrt(PIXELS / (width * height)))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX))
    return torch.from_numpy(pixels.copy()).float() / 255


class Field(nn.Module):
    """Fourier features of a place, then a multilayer perceptron with ReLU.

    The features are those of Tancik et al., "Fourier Features Let Networks Learn High
    Frequency Functions in Low Dimensional Domains", 2020; initialization is He's.

    Args:
        depth: hidden layers.
        width: of each.
        features: random frequencies, each with a sine and a cosine.
        cycles: standard deviation of the frequencies, in cycles a picture's height.
    """

    def __init__(
        self,
        depth: int = 4,
        width: int = 128,
        features: int = 64,
        cycles: float = 2.0,
    ) -> None:
        super().__init__()
        frequencies = 2 * math.pi * cycles * torch.randn(2, features)
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies)
        sizes = [2 * features, *[width] * depth]
        layers: list[nn.Module] = []
        for size, wide in pairwise(sizes):
            layers += [nn.Linear(size, wide), nn.ReLU(inplace=True)]
        self.hidden = nn.Sequential(*layers)
        self.colour = nn.Linear(width, 3)
        for module in self.hidden:
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        nn.init.kaiming_normal_(self.colour.weight, nonlinearity="linear")
        nn.init.zeros_(self.colour.bias)

    def forward(self, places: Tensor) -> Tensor:
        """Colours ``(N, 3)`` at places ``(N, 2)``."""
        phases = places @ self.frequencies
        colours: Tensor = self.colour(
            self.hidden(torch.cat([phases.sin(), phases.cos()], 1))
        )
        return colours


@dataclass(frozen=True)
class FieldTask(Task):
    """Learn a photograph from seven eighths of its pixels; judged by the others.

    The metric is the peak signal-to-noise ratio, in decibels: ``-10 log10`` of the mean
    squared error of colours between 0 and 1.

    Attributes:
        photo: what is learned.
        places: ``(P, 2)``, of all pixels, in heights of the picture.
        colours: ``(P, 3)``.
        order: of the pixels, at random; the first eighth is held out.
        batch_size: pixels a step.
    """

    photo: Photo
    places: Tensor
    colours: Tensor
    order: Tensor
    batch_size: int = 8192
    metric = "PSNR"

    @classmethod
    def of(cls, photo: Photo, device: torch.device | str = "cpu") -> FieldTask:
        """The task for a photograph."""
        height, width, _ = photo.colours.shape
        down, along = torch.meshgrid(
            (torch.arange(height) + 0.5) / height,
            (torch.arange(width) + 0.5) / height,
            indexing="ij",
        )
        places = torch.stack([along, down], -1).reshape(-1, 2)
        shuffle = torch.Generator().manual_seed(0)
        order = torch.randperm(height * width, generator=shuffle)
        colours = photo.colours.reshape(-1, 3)
        return cls(photo, places.to(device), colours.to(device), order.to(device))

    @property
    def _held_out(self) -> Tensor:
        return self.order[: len(self.order) // 8]

    @property
    def _learned(self) -> Tensor:
        return self.order[len(self.order) // 8 :]

    def with_batch_size(self, batch_size: int) -> FieldTask:
        return replace(self, batch_size=batch_size)

    @property
    def title(self) -> str:
        return self.photo.name

    @property
    def size(self) -> dict[str, int]:
        return {"train": len(self._learned), "test": len(self._held_out)}

    @property
    def device(self) -> torch.device:
        return self.places.device

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self._learned) // self.batch_size)

    def model(self) -> nn.Module:
        return Field().to(self.device)

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        learned = self._learned
        for _ in range(self.steps_per_epoch):
            drawn = torch.randint(
                len(learned),
                (self.batch_size,),
                generator=generator,
                device=self.device,
            )
            index = learned[drawn]
            yield self.places[index], self.colours[index]

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with self.autocast():
            return F.mse_loss(model(x).float(), y)

    def score(self, model: nn.Module) -> float:
        index = self._held_out
        error = F.mse_loss(model(self.places[index]), self.colours[index])
        return -10 * math.log10(max(error.item(), 1e-12))

    @torch.no_grad()
    def picture(self, model: nn.Module) -> Tensor:
        """What the network has learned: as `Photo.colours`, on the CPU."""
        model.eval()
        colours = torch.cat([model(part) for part in self.places.split(8192)])
        model.train()
        return colours.clamp(0, 1).reshape(self.photo.colours.shape).cpu()
