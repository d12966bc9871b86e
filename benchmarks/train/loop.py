"""One training run, and the search for an optimizer's learning rate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from .data import Dataset
from .models import small_cnn
from .peers import Peer


@dataclass
class Run:
    """What one run measured.

    Attributes:
        peer: the optimizer's name.
        lr: its learning rate.
        seed: of the weights, the batches and the sampling.
        steps: the steps at which the test accuracy was taken.
        accuracy: test accuracy at each of them.
        seconds: seconds of training up to each of them, evaluation excluded.
        diverged: whether the loss stopped being finite.
    """

    peer: str
    lr: float
    seed: int
    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    diverged: bool = False

    @property
    def final(self) -> float:
        """Test accuracy at the end."""
        return 0.0 if self.diverged else self.accuracy[-1]

    def first(self, target: float) -> tuple[int, float] | None:
        """Step and seconds at which the target was first reached, or None."""
        for step, accuracy, seconds in zip(
            self.steps, self.accuracy, self.seconds, strict=True
        ):
            if accuracy >= target:
                return step, seconds
        return None


def train(
    data: Dataset,
    peer: Peer,
    lr: float,
    seed: int,
    *,
    epochs: int,
    batch_size: int,
    eval_every: int,
    on_step: Callable[[], None] = lambda: None,
) -> Run:
    """Train the small network with a learning rate that rises, then falls to zero.

    Args:
        data: the data.
        peer: the optimizer.
        lr: its peak learning rate.
        seed: of everything random in the run.
        epochs: passes over the data.
        batch_size: examples a step.
        eval_every: steps between two evaluations.
        on_step: called after each step, for progress bars.
    """
    torch.manual_seed(seed)
    model = small_cnn(data.train_x.shape[1], data.classes, data.train_x.shape[-1])
    optimizer = peer.optimizer(model, lr)
    per_epoch = max(1, len(data.train_y) // batch_size)
    total = epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _warmup_then_linear(step, total)
    )
    generator = torch.Generator().manual_seed(seed)
    run = Run(peer.name, lr, seed)
    elapsed, step = 0.0, 0
    for _ in range(epochs):
        for x, y in data.batches(batch_size, generator):
            start = time.perf_counter()
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            elapsed += time.perf_counter() - start
            step += 1
            on_step()
            if step % eval_every == 0 or step == total:
                run.steps.append(step)
                run.accuracy.append(evaluate(model, data))
                run.seconds.append(elapsed)
                if not torch.isfinite(loss):
                    run.diverged = True
                    for _ in range(total - step):
                        on_step()
                    return run
    return run


def _warmup_then_linear(step: int, total: int) -> float:
    """Factor on the learning rate: up over a tenth of the steps, then down to zero."""
    warmup = max(1, total // 10)
    return min((step + 1) / warmup, (total - step) / max(1, total - warmup), 1.0)


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, batch_size: int = 1000) -> float:
    """Accuracy on the held-out images."""
    model.eval()
    correct = 0
    for start in range(0, len(data.test_y), batch_size):
        logits = model(data.test_x[start : start + batch_size])
        labels = data.test_y[start : start + batch_size]
        correct += int((logits.argmax(1) == labels).sum())
    model.train()
    return correct / len(data.test_y)


def best_lr(runs: Sequence[Run], target: float) -> float:
    """The learning rate that reaches the target soonest, else ends highest.

    Args:
        runs: runs of one optimizer, over learning rates and perhaps seeds.
        target: accuracy.
    """
    lrs = sorted({run.lr for run in runs})

    def merit(lr: float) -> tuple[float, float]:
        mine = [run for run in runs if run.lr == lr]
        reached = [run.first(target) for run in mine]
        steps = statistics.median(
            float("inf") if hit is None else hit[0] for hit in reached
        )
        return steps, -statistics.median(run.final for run in mine)

    return min(lrs, key=merit)
