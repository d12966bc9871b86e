"""Characters of program text by a recurrent net."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import program_text
from ..tasks import TextTask
from ..workload import Workload, for_sequences
from .problem import settings


class LSTM(nn.Module):
    """An embedding, one layer of LSTM and a Linear head."""

    def __init__(self, symbols: int, context: int) -> None:
        super().__init__()
        self.symbol = nn.Embedding(symbols, 64)
        self.recurrent = nn.LSTM(64, 128, batch_first=True)
        self.head = nn.Linear(128, symbols)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, length, symbols)`` of the next symbols."""
        hidden, _ = self.recurrent(self.symbol(x))
        logits: Tensor = self.head(hidden)
        return logits


def task(source: Path, cache: Path, device: torch.device) -> TextTask:
    """The sources of torch's layers; 80 steps make an epoch."""
    data = program_text(80 * 32 * 32, held_out=8_192)
    return TextTask(data.to(device), LSTM, batch_size=32, context=32)


WORKLOAD = Workload(
    "lstm",
    "characters of program text, LSTM",
    task,
    (2.4, 1.48, 1.33),
    **settings(adapt=for_sequences),
)
