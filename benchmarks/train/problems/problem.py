"""What the small problems have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..peers import PEERS
from ..tasks import Task


@dataclass(frozen=True, kw_only=True)
class Problem(Task):
    """A task whose batches are drawn one by one, and whose data are few or made up.

    Attributes:
        name: of the data.
        place: where everything lies.
        batch_size: examples a step.
        steps_per_epoch: batches between two points at which a run may end.
    """

    name: ClassVar[str]

    place: torch.device
    batch_size: int = 64
    steps_per_epoch: int = 80

    @property
    def title(self) -> str:
        return self.name

    @property
    def size(self) -> dict[str, int]:
        return {"steps_per_epoch": self.steps_per_epoch}

    @property
    def device(self) -> torch.device:
        return self.place

    def with_batch_size(self, batch_size: int) -> Self:
        return replace(self, batch_size=batch_size)

    @abstractmethod
    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A batch, from a generator on the device."""

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.draw(generator) for _ in range(self.steps_per_epoch))

    def random(self, *size: int, generator: torch.Generator) -> Tensor:
        """Numbers between 0 and 1, on the device."""
        return torch.rand(*size, generator=generator, device=self.place)

    def normal(self, *size: int, generator: torch.Generator) -> Tensor:
        """Numbers of the standard normal distribution, on the device."""
        return torch.randn(*size, generator=generator, device=self.place)

    def held_out(self) -> torch.Generator:
        """Draws what is the same in every run, and in none of their batches."""
        return torch.Generator(self.place).manual_seed(2**31)

    def pick(self, content: Tensor, generator: torch.Generator) -> Tensor:
        """A batch of entries at random."""
        index = torch.randint(
            len(content), (self.batch_size,), generator=generator, device=self.place
        )
        return content[index]


_VARIANTS = ("FROG plain", "FROG paper")
"""Of FROG, which the other workloads compare."""

_PEERS = tuple(peer for name, peer in PEERS.items() if name not in _VARIANTS)


def settings(**options: Any) -> dict[str, Any]:
    """Of all problems: four parts of a run, of which a search takes two."""
    usual = {"epochs": 4, "grid_epochs": 2, "evaluations": 4, "peers": _PEERS}
    return usual | options
