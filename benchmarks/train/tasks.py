"""What is trained and how it is judged: the data, the network, the loss, the score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Dataset, Text
from .models import small_cnn


class Task(ABC):
    """Data on its device with a network to train.

    On a GPU the forward pass runs under autocast in bfloat16.

    Attributes:
        batch_size: examples a step.
        metric: what `evaluate` returns; of ``"accuracy"`` and ``"PSNR"`` more is
            better, of all else less.
    """

    batch_size: int
    metric: ClassVar[str]

    @property
    @abstractmethod
    def title(self) -> str:
        """Name of the data."""

    @property
    @abstractmethod
    def size(self) -> dict[str, int]:
        """What distinguishes the data from others of that name."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the data lie."""

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Full batches in the training data."""

    @abstractmethod
    def model(self) -> nn.Module:
        """A fresh network on the device, drawn from the global random state."""

    @abstractmethod
    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of `steps_per_epoch` batches."""

    @abstractmethod
    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Training loss of a batch."""

    def parts(self, model: nn.Module) -> Sequence[nn.Module]:
        """What has an optimizer of its own; mostly the whole model."""
        return [model]

    def losses(self, model: nn.Module, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        """The loss of each part, made when those before it have been stepped."""
        yield self.loss(model, x, y)

    @abstractmethod
    def score(self, model: nn.Module) -> float:
        """The metric on held-out data, for a model in eval mode."""

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """The metric on held-out data."""
        model.eval()
        result = self.score(model)
        model.train()
        return result

    @abstractmethod
    def with_batch_size(self, batch_size: int) -> Task:
        """The same with another batch size."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Bfloat16 on a GPU, nothing elsewhere."""
        kind = self.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


@dataclass(frozen=True)
class ImageTask(Task):
    """Classify images; judged by test accuracy.

    Attributes:
        data: on its device.
        network: makes a model from channels, classes and size of the images.
        batch_size: images a step.
    """

    data: Dataset
    network: Callable[[int, int, int], nn.Module] = small_cnn
    batch_size: int = 128
    metric = "accuracy"

    def with_batch_size(self, batch_size: int) -> Task:
        return replace(self, batch_size=batch_size)

    @property
    def title(self) -> str:
        return self.data.name

    @property
    def size(self) -> dict[str, int]:
        return {"train": len(self.data.train_y), "test": len(self.data.test_y)}

    @property
    def device(self) -> torch.device:
        return self.data.train_x.device

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.data.train_y) // self.batch_size)

    def model(self) -> nn.Module:
        x = self.data.train_x
        model = self.network(x.shape[1], self.data.classes, x.shape[-1])
        if x.device.type == "cuda":  # convolutions on tensor cores read channels last
            for param in model.parameters():
                if param.ndim == 4:
                    param.data = param.data.to(memory_format=torch.channels_last)
        return model.to(x.device)

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        return self.data.batches(self.batch_size, generator)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with self.autocast():
            return F.cross_entropy(model(x), y)

    def score(self, model: nn.Module) -> float:
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for x, y in zip(
            self.data.test_x.split(1000), self.data.test_y.split(1000), strict=True
        ):
            with self.autocast():
                correct += (model(x).argmax(1) == y).sum()
        return correct.item() / len(self.data.test_y)


@dataclass(frozen=True)
class TextTask(Task):
    """Predict the next character; judged by held-out loss in nats a character.

    Attributes:
        data: on its device.
        network: makes a model from the number of symbols and the context.
        batch_size: windows a step.
        context: characters a window.
    """

    data: Text
    network: Callable[[int, int], nn.Module]
    batch_size: int = 32
    context: int = 64
    metric = "loss"

    def with_batch_size(self, batch_size: int) -> Task:
        return replace(self, batch_size=batch_size)

    @property
    def title(self) -> str:
        return self.data.name

    @property
    def size(self) -> dict[str, int]:
        sizes = {"train": len(self.data.train), "test": len(self.data.test)}
        return sizes | {"context": self.context}

    @property
    def device(self) -> torch.device:
        return self.data.train.device

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.data.train) // (self.batch_size * self.context))

    def model(self) -> nn.Module:
        return self.network(self.data.symbols, self.context).to(self.device)

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        draw = partial(self.data.windows, self.batch_size, self.context, generator)
        return (draw() for _ in range(self.steps_per_epoch))

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with self.autocast():
            return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    def score(self, model: nn.Module) -> float:
        held_out = self.data.test
        count = (len(held_out) - 1) // self.context
        x = held_out[: count * self.context].view(count, self.context)
        y = held_out[1 : count * self.context + 1].view(count, self.context)
        size = max(1, 16_384 // self.context)
        losses = [
            self.loss(model, a, b) * len(a)
            for a, b in zip(x.split(size), y.split(size), strict=True)
        ]
        return torch.stack(losses).sum().item() / count
