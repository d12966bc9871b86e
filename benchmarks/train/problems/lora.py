"""Fine-tuning by low-rank adapters: a GPT that knows programs learns prose."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import program_text, prose
from ..models import GPT
from ..tasks import TextTask
from ..workload import Workload, for_sequences
from .problem import settings

RANK, STEPS = 8, 600


def network(symbols: int, context: int) -> nn.Module:
    """A frozen GPT with adapters of rank 8 at all its Linear layers but the head."""
    from peft import LoraConfig, inject_adapter_in_model

    config: Any = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["qkv", "attention_out", "expand", "mlp_out"],
    )
    model: nn.Module = inject_adapter_in_model(
        config, copy.deepcopy(_trained(symbols, context))
    )
    return model


@cache
def _trained(symbols: int, context: int) -> nn.Module:
    """A GPT that AdamW has trained on programs, always the same."""
    data = program_text(400_000, held_out=8_192)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(symbols, context, depth=2, width=64, heads=4)
        task = TextTask(data, lambda *_: model, batch_size=16, context=context)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for _ in range(STEPS):
            loss = task.loss(model, *data.windows(16, context, generator))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def task(source: Path, cache: Path, device: torch.device) -> TextTask:
    """Descriptions of data sets that scikit-learn ships."""
    data = prose(held_out=6_144).to(device)
    return TextTask(data, network, batch_size=16, context=64)


WORKLOAD = Workload(
    "lora",
    "fine-tuning of a GPT by adapters of rank 8",
    task,
    (2.2, 2.005, 1.98),
    **settings(epochs=8, grid_epochs=4, evaluations=2, adapt=for_sequences),
    needs=("peft",),
)
