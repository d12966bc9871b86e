"""Small trainings that an optimizer may or may not survive."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import digits
from .models import small_cnn
from .tasks import ImageTask

Networks = Sequence[nn.Module]


@dataclass(frozen=True)
class Case(ABC):
    """A training of a few seconds, the same for the same seed.

    Attributes:
        name: on the command line and in tables.
        about: in a line.
        steps: of the whole run.
        metric: what `end` returns: ``"accuracy"`` or ``"loss"``.
        bar: the least accuracy, or the largest loss, of a run that survived.
        mark: of the training loss; spikes count once it has been below.
        schedules: names in `loop.SCHEDULES`, each a run of its own.
    """

    name: str
    about: str
    steps: int
    metric: str
    bar: float
    mark: float
    schedules: tuple[str, ...] = ("constant",)

    def good(self, end: float) -> bool:
        """Whether a result passes the bar."""
        return end >= self.bar if self.metric == "accuracy" else end <= self.bar

    @abstractmethod
    def networks(self) -> Networks:
        """Fresh networks, each for an optimizer of its own; mostly there is one."""

    @abstractmethod
    def batches(self, generator: torch.Generator) -> Iterator[Any]:
        """The batches of the run, `steps` of them."""

    @abstractmethod
    def losses(self, networks: Networks, batch: Any) -> Iterator[Tensor]:
        """The loss of each network, made when those before it have been stepped."""

    @abstractmethod
    def end(self, networks: Networks, losses: Sequence[float]) -> float:
        """The result.

        Args:
            networks: trained.
            losses: of all steps; of several networks the largest.
        """


@dataclass(frozen=True)
class Unaugmented(ImageTask):
    """The images as they are, so that a network can learn them by heart."""

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self.data.train_x, self.data.train_y
        order = torch.randperm(len(y), generator=generator)
        for index in order.split(self.batch_size)[: self.steps_per_epoch]:
            yield x[index], y[index]


_digits = cache(digits)


@dataclass(frozen=True)
class Digits(Case):
    """Classify the digits, in batches of 64.

    Attributes:
        network: as of `ImageTask`.
    """

    network: Callable[[int, int, int], nn.Module] = small_cnn

    @property
    def task(self) -> ImageTask:
        """The digits with the network."""
        return Unaugmented(_digits(), self.network, 64)

    def networks(self) -> Networks:
        return [self.task.model()]

    def batches(self, generator: torch.Generator) -> Iterator[Any]:
        task = self.task
        for _ in range(self.steps // task.steps_per_epoch):
            yield from task.batches(generator)

    def losses(self, networks: Networks, batch: Any) -> Iterator[Tensor]:
        yield self.task.loss(networks[0], *batch)

    def end(self, networks: Networks, losses: Sequence[float]) -> float:
        return self.task.evaluate(networks[0])


@dataclass(frozen=True)
class OneBatch(Digits):
    """Learn 32 digits by heart; judged by the last training loss."""

    def batches(self, generator: torch.Generator) -> Iterator[Any]:
        data = _digits()
        index = torch.randperm(len(data.train_y), generator=generator)[:32]
        for _ in range(self.steps):
            yield data.train_x[index], data.train_y[index]

    def end(self, networks: Networks, losses: Sequence[float]) -> float:
        return losses[-1]


@dataclass(frozen=True)
class MaskedSymbols(Case):
    """Fill in 15 % of the symbols of a Markov chain; judged on held-out sequences.

    From each symbol the chain mostly goes on to one certain other.
    """

    symbols: int = 8
    length: int = 12

    def networks(self) -> Networks:
        embedding = nn.Embedding(self.symbols + 1, 64)  # one more is the mask
        return [Encoder(embedding, self.length, self.symbols)]

    def batches(self, generator: torch.Generator) -> Iterator[Any]:
        return (self.draw(32, generator) for _ in range(self.steps))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sequences with symbols masked, and what to predict."""
        chain = torch.full((self.symbols, self.symbols), 0.1 / self.symbols)
        chain += 0.9 * torch.eye(self.symbols).roll(3, 1)
        text = torch.randint(0, self.symbols, (count, 1), generator=generator)
        while text.shape[1] < self.length:
            following = torch.multinomial(chain[text[:, -1]], 1, generator=generator)
            text = torch.cat([text, following], 1)
        masked = torch.rand(text.shape, generator=generator) < 0.15
        hidden = text.masked_fill(masked, self.symbols)
        return hidden, text.masked_fill(~masked, -100)  # cross_entropy skips -100

    def losses(self, networks: Networks, batch: Any) -> Iterator[Tensor]:
        hidden, text = batch
        yield F.cross_entropy(networks[0](hidden).flatten(0, 1), text.flatten())

    @torch.no_grad()
    def end(self, networks: Networks, losses: Sequence[float]) -> float:
        held_out = self.draw(512, torch.Generator().manual_seed(2**31))
        return next(self.losses(networks, held_out)).item()


@dataclass(frozen=True)
class Adversaries(Case):
    """A generator and a discriminator of points on a ring; judged by all losses."""

    def networks(self) -> Networks:
        return [_mlp(2, 64, 64, 1), _mlp(8, 64, 64, 2)]

    def batches(self, generator: torch.Generator) -> Iterator[Any]:
        for _ in range(self.steps):
            angle = torch.randint(0, 8, (64,), generator=generator) * (math.pi / 4)
            ring = torch.stack([angle.cos(), angle.sin()], 1)
            noise = torch.randn(64, 2 + 8, generator=generator)
            yield ring + 0.05 * noise[:, :2], noise[:, 2:]

    def losses(self, networks: Networks, batch: Any) -> Iterator[Tensor]:
        judge, forger = networks
        real, noise = batch
        with torch.no_grad():
            forged = forger(noise)
        yield F.softplus(-judge(real)).mean() + F.softplus(judge(forged)).mean()
        yield F.softplus(-judge(forger(noise))).mean()

    def end(self, networks: Networks, losses: Sequence[float]) -> float:
        return max(losses)


class Encoder(nn.Module):
    """A transformer of two blocks that looks both ways.

    Args:
        embedding: makes vectors of 64 from the input.
        length: of the sequences.
        outputs: for every place, or for all together.
        pooled: whether for all together.
    """

    def __init__(
        self, embedding: nn.Module, length: int, outputs: int, pooled: bool = False
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.position = nn.Parameter(torch.randn(length, 64))
        self.blocks = nn.Sequential(_Attention(64), _Mlp(64), _Attention(64), _Mlp(64))
        self.norm = nn.LayerNorm(64)
        self.pooled = pooled
        self.head = nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, length, outputs)``; pooled ``(batch, outputs)``."""
        x = self.norm(self.blocks(self.embedding(x) + self.position))
        logits: Tensor = self.head(x.mean(1) if self.pooled else x)
        return logits


class _Attention(nn.Module):
    """Norm, attention of four heads, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).unbind(2)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return x + out


class _Mlp(nn.Module):
    """Norm, two layers, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(F.gelu(self.expand(self.norm(x))))
        return x + out


class _Patches(nn.Module):
    """Patches of 2x2 pixels, as ``(batch, patches, values)``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.unfold(x, 2, stride=2).transpose(1, 2)


def _mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for c_in, c_out in pairwise(widths):
        layers += [nn.Linear(c_in, c_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _flat_mlp(*hidden: int) -> Callable[[int, int, int], nn.Module]:
    def network(channels: int, classes: int, size: int) -> nn.Module:
        return _mlp(channels * size**2, *hidden, classes).insert(0, nn.Flatten())

    return network


def _plain_cnn(channels: int, classes: int, size: int) -> nn.Module:
    """Three convolutions without norms."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, 2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (size // 4) ** 2, classes),
    )


def _vit(channels: int, classes: int, size: int) -> nn.Module:
    patches = nn.Sequential(_Patches(), nn.Linear(4 * channels, 64))
    return Encoder(patches, (size // 2) ** 2, classes, pooled=True)


# Bars are what AdamW at 1e-3 passes with clear room, seen on five seeds; marks are
# where it has learnt most of what there is to learn.
_ALL = ("constant", "cosine", "one-cycle")
_LISTED: tuple[Case, ...] = (
    # One batch is soon known by heart: AdamW ends near 0.001.
    OneBatch(
        *("overfit-mlp", "one batch of 32 digits, MLP", 200, "loss", 0.1, 0.1),
        network=_flat_mlp(128, 128),
    ),
    OneBatch(
        *("overfit-cnn", "one batch of 32 digits, CNN", 200, "loss", 0.1, 0.1),
        network=_plain_cnn,
    ),
    # 30 epochs of 20 steps, half of them with little left to learn: AdamW ends at
    # 97 % without norms and at 99 % with them.
    Digits(
        *("past-cnn", "30 epochs of digits, CNN without norms", 600),
        *("accuracy", 0.9, 0.1),
        schedules=_ALL,
        network=_plain_cnn,
    ),
    Digits(
        *("past-norm", "30 epochs of digits, CNN with batch norm", 600),
        *("accuracy", 0.9, 0.1),
        schedules=_ALL,
        network=partial(small_cnn, width=16),
    ),
    # Guessing costs log 8 = 2.08; AdamW ends near 0.4.
    MaskedSymbols("mlm", "masked symbols, transformer", 300, "loss", 1.0, 0.8),
    # Ten epochs: AdamW ends at 95 to 98 %.
    Digits(
        *("vit", "digits by patches, transformer", 200, "accuracy", 0.9, 0.3),
        network=_vit,
    ),
    # A net that starts late: AdamW needs 200 steps to the mark, and ends at 92 to 94 %.
    Digits(
        *("deep-mlp", "eight hidden layers without norms", 600),
        *("accuracy", 0.8, 0.3),
        network=_flat_mlp(*[64] * 8),
    ),
    # The losses start at 1.4 and 0.7. Whoever is winning may bring the other's to 20;
    # what blows up passes 50 at once. All steps count.
    Adversaries("gan", "generator and discriminator", 300, "loss", 50.0, math.inf),
)
CASES = {case.name: case for case in _LISTED}
"""All cases by name."""
