"""Small nets of torch's own layers, each with a loss on one batch that it can learn.

Images are ``(8, 3, 32, 32)`` and texts ``(4, 16)`` unless a builder says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import frog_triton

from .. import FROG

VOCABULARY = 256
CLASSES = 10


@dataclass(frozen=True)
class Trained:
    """A model, and what it is trained for.

    Attributes:
        model: in training mode.
        loss: of one fixed batch; a scalar, called once a step.
    """

    model: nn.Module
    loss: Callable[[], Tensor]


# -- losses -------------------------------------------------------------------------


def classifier(model: nn.Module, inputs: Tensor | None = None) -> Trained:
    """Cross entropy of as many classes as there are examples."""
    x = torch.randn(8, 3, 32, 32) if inputs is None else inputs
    labels = torch.arange(len(x)) % CLASSES

    def loss() -> Tensor:
        scores = model(x)
        return F.cross_entropy(getattr(scores, "logits", scores), labels)

    return Trained(model, loss)


def next_symbol(model: nn.Module) -> Trained:
    """Cross entropy of each next symbol; the model gives ``(batch, length, V)``."""
    ids = text()

    def loss() -> Tensor:
        scores = model(ids[:, :-1])
        return F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten())

    return Trained(model, loss)


def fitted(model: nn.Module, inputs: Tensor, target: Tensor) -> Trained:
    """Mean squared error."""
    return Trained(model, lambda: F.mse_loss(model(inputs), target))


def text(batch: int = 4, length: int = 16) -> Tensor:
    """Symbols ``(batch, length)``; the first three are left for special ones."""
    return torch.randint(3, VOCABULARY, (batch, length))


# -- torch's own layers -------------------------------------------------------------


class _Symbols(nn.Module):
    """Embeds symbols, then a body ``(batch, length, 64)`` alike, then a head."""

    def __init__(self, body: nn.Module, classes: int, pooled: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 64)
        self.body = body
        self.head = nn.Linear(64, classes)
        self.pooled = pooled

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.body(self.embedding(ids))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        scores: Tensor = self.head(hidden.mean(1) if self.pooled else hidden)
        return scores


def encoder() -> Trained:
    """A classifier of text: two encoder layers, the mean over positions, a head."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    body = nn.TransformerEncoder(layer, 2)
    return classifier(_Symbols(body, CLASSES, pooled=True), text(8))


def recurrent(kind: type[nn.LSTM] | type[nn.GRU]) -> Trained:
    """A language model of two recurrent layers."""
    body = kind(64, 64, num_layers=2, batch_first=True)
    return next_symbol(_Symbols(body, VOCABULARY, pooled=False))


def attention() -> Trained:
    """Attention alone, of sequences ``(4, 16, 64)`` to themselves."""
    model = nn.MultiheadAttention(64, 4, batch_first=True)
    x, target = torch.randn(2, 4, 16, 64)
    return Trained(
        model, lambda: F.mse_loss(model(x, x, x, need_weights=False)[0], target)
    )


def _generator() -> nn.Module:
    """DCGAN's: ``(n, 16, 1, 1)`` to images ``(n, 3, 16, 16)``."""
    return nn.Sequential(
        nn.ConvTranspose2d(16, 64, 4, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 3, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


def _discriminator() -> nn.Module:
    """DCGAN's: images ``(n, 3, 16, 16)`` to scores ``(n, 1)``."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, 2, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 1, 4, bias=False),
        nn.Flatten(),
    )


def dcgan(judged: str) -> Trained:
    """One half of the pair; each call of its loss first makes a step of the other.

    The generator is also drawn to fixed images, since the score of one half alone
    need not fall.
    """
    generator, discriminator = _generator(), _discriminator()
    noise, images = torch.randn(8, 16, 1, 1), torch.randn(8, 3, 16, 16).tanh()
    real, fake = torch.ones(8, 1), torch.zeros(8, 1)

    def telling() -> Tensor:
        made = generator(noise).detach()
        right = F.binary_cross_entropy_with_logits(discriminator(images), real)
        return right + F.binary_cross_entropy_with_logits(discriminator(made), fake)

    def making() -> Tensor:
        made = generator(noise)
        passed = F.binary_cross_entropy_with_logits(discriminator(made), real)
        return F.mse_loss(made, images) + 0.01 * passed

    halves = {
        "discriminator": (discriminator, telling),
        "generator": (generator, making),
    }
    model, own_loss = halves.pop(judged)
    ((rival, rival_loss),) = halves.values()
    optimizer = FROG(rival)

    def loss() -> Tensor:
        optimizer.zero_grad()
        rival_loss().backward()
        optimizer.step()
        return own_loss()

    return Trained(model, loss)


def autoencoder() -> Trained:
    """Images ``(8, 3, 16, 16)`` through a code of 16 numbers."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.Flatten(),
        nn.Linear(512, 16),
        nn.Linear(16, 512),
        nn.Unflatten(1, (32, 4, 4)),
        nn.ConvTranspose2d(32, 16, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 3, 4, 2, 1),
    )
    images = torch.randn(8, 3, 16, 16)
    return fitted(model, images, images)


def actor_critic() -> Trained:
    """The clipped objective of PPO on 32 states, advantages and returns."""
    parts = {"body": (8, 64), "body_2": (64, 64), "actor": (64, 4), "critic": (64, 1)}
    model = nn.ModuleDict({name: nn.Linear(*size) for name, size in parts.items()})
    states, advantages, returns = torch.randn(32, 8), torch.randn(32), torch.randn(32)
    actions = torch.randint(4, (32,))
    before: list[Tensor] = []  # log probabilities before the first step

    def loss() -> Tensor:
        hidden = torch.tanh(model["body_2"](torch.tanh(model["body"](states))))
        chosen = model["actor"](hidden).log_softmax(1)[torch.arange(32), actions]
        before[:] = before or [chosen.detach()]
        ratio = (chosen - before[0]).exp()
        clipped = ratio.clamp(0.8, 1.2) * advantages
        gain = torch.minimum(ratio * advantages, clipped).mean()
        return F.mse_loss(model["critic"](hidden)[:, 0], returns) - gain

    return Trained(model, loss)


def normed(norm: Callable[[nn.Module], nn.Module]) -> Trained:
    """A small convolutional net with a reparametrization on each layer."""
    model = nn.Sequential(
        norm(nn.Conv2d(3, 16, 3, 2, 1)),
        nn.ReLU(),
        norm(nn.Conv2d(16, 32, 3, 2, 1)),
        nn.ReLU(),
        nn.Flatten(),
        norm(nn.Linear(2048, 64)),
        nn.ReLU(),
        norm(nn.Linear(64, CLASSES)),
    )
    return classifier(model)


class _Bare(nn.Module):
    """Two layers whose weights are plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(64, 32) / 32**0.5)
        self.up_bias = nn.Parameter(torch.zeros(64))
        self.down = nn.Parameter(torch.randn(CLASSES, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        linear = vars(frog_triton)["linear"]
        scores: Tensor = linear(linear(x, self.up, self.up_bias).relu(), self.down)
        return scores


def bare() -> Trained:
    """Weights without a layer, applied by `frog_triton.linear`."""
    return classifier(_Bare(), torch.randn(8, 32))
