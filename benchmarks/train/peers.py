"""The optimizers that are compared, each with its grid of learning rates.

All grids have the same number of entries, spaced by about a factor of three, and are
centred on what is usual for the optimizer on small convolutional networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ... import FROG


@dataclass(frozen=True)
class Peer:
    """One optimizer of a comparison.

    Attributes:
        name: in tables.
        build: makes the optimizer from the model and keyword arguments.
        lrs: learning rates to try.
        options: keyword arguments other than ``lr``.
    """

    name: str
    build: Callable[..., torch.optim.Optimizer]
    lrs: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The optimizer for a fresh model."""
        return self.build(model, lr=lr, **self.options)


def _sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **options)


def _adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **options)


PEERS = (
    Peer("FROG", FROG, (6e-3, 2e-2, 6e-2, 2e-1)),
    Peer("SGD", _sgd, (3e-2, 1e-1, 3e-1, 1.0), {"momentum": 0.9, "weight_decay": 5e-4}),
    Peer("AdamW", _adamw, (1e-3, 3e-3, 1e-2, 3e-2), {"weight_decay": 1e-2}),
)
