"""Characters of program text by a GPT of two blocks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..data import program_text
from ..models import GPT
from ..tasks import TextTask
from ..workload import Workload, for_sequences
from .problem import settings


def network(symbols: int, context: int) -> nn.Module:
    """Two blocks of width 64, four heads."""
    return GPT(symbols, context, depth=2, width=64, heads=4)


def task(source: Path, cache: Path, device: torch.device) -> TextTask:
    """The sources of torch's layers; 80 steps make an epoch."""
    data = program_text(80 * 16 * 64, held_out=8_192)
    return TextTask(data.to(device), network, batch_size=16, context=64)


WORKLOAD = Workload(
    "char-gpt",
    "characters of program text, GPT of two blocks",
    task,
    (2.4, 2.2, 1.57),
    **settings(adapt=for_sequences),
)
