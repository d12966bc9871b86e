"""FROG's diagnostics in TensorBoard: every tenth step, a scalar a layer and quantity.

python examples/tensorboard_logging.py
tensorboard --logdir runs/frog
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import frog_triton


class DiagnosticsLogger:
    """Writes what `FROG.diagnose` finds every few steps; others cost nothing more."""

    def __init__(
        self, opt: frog_triton.FROG, writer: SummaryWriter, every: int = 10
    ) -> None:
        self.opt, self.writer, self.every = opt, writer, every
        self.count = 0

    def step(self) -> None:
        """A step of the optimizer, looked at when it is time."""
        look = self.count % self.every == 0
        with self.opt.diagnose() if look else nullcontext() as found:
            self.opt.step()
        if look:
            for layer, values in found.read().items():
                for name, value in values.items():
                    self.writer.add_scalar(f"{name}/{layer}", value, self.count)
        self.count += 1


def main(folder: str = "runs/frog", steps: int = 40) -> None:
    """Train a toy and log it."""
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = x.square().sum(1, keepdim=True)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    with frog_triton.FROG(model) as opt, SummaryWriter(folder) as writer:
        logger = DiagnosticsLogger(opt, writer)
        for _ in range(steps):
            opt.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            logger.step()


if __name__ == "__main__":
    main(*sys.argv[1:])
