"""One training run, and the search for an optimizer's settings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .peers import Peer
from .tasks import Task
from .timing import clock

SCHEDULES: dict[str, Callable[[int, int], float]] = {}
"""Factors on the learning rate, from the step and the number of steps."""


def _schedule(name: str) -> Callable[[Callable[[int, int], float]], Any]:
    def register(function: Callable[[int, int], float]) -> Callable[[int, int], float]:
        SCHEDULES[name] = function
        return function

    return register


@_schedule("constant")
def _constant(step: int, total: int) -> float:
    """The same all the time."""
    return 1.0


@_schedule("cosine")
def _cosine(step: int, total: int) -> float:
    """Down to zero along half a wave."""
    return 0.5 + 0.5 * math.cos(math.pi * step / total)


@_schedule("one-cycle")
def _one_cycle(step: int, total: int) -> float:
    """Up over a tenth of the steps, then down to zero."""
    warmup = max(1, total // 10)
    return min((step + 1) / warmup, (total - step) / max(1, total - warmup), 1.0)


@_schedule("step")
def _step_drops(step: int, total: int) -> float:
    """Divided by ten at half and again at three quarters of the steps."""
    return float(0.1 ** ((2 * step >= total) + (4 * step >= 3 * total)))


@dataclass(frozen=True)
class Job:
    """A run to be made.

    Attributes:
        task: what is trained.
        peer: the optimizer.
        lr: its peak learning rate.
        seed: of the weights, the batches and the sampling.
        epochs: passes over the data.
        weight_decay: None: the peer's first.
        schedule: one of `SCHEDULES`.
        evaluations: how often an epoch the metric is taken.
    """

    task: Task
    peer: Peer
    lr: float
    seed: int
    epochs: int
    weight_decay: float | None = None
    schedule: str = "one-cycle"
    evaluations: int = 6

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.task.steps_per_epoch

    @property
    def eval_every(self) -> int:
        """Steps between two evaluations."""
        return max(2, self.task.steps_per_epoch // self.evaluations)

    def settings(self) -> dict[str, Any]:
        """All that the run's outcome depends on, as JSON can hold it."""
        decay = self.weight_decay
        return {
            "data": self.task.title,
            **self.task.size,
            "peer": self.peer.name,
            "options": {k: str(v) for k, v in self.peer.options.items()},
            "lr": self.lr,
            "weight_decay": self.peer.weight_decays[0] if decay is None else decay,
            "seed": self.seed,
            "epochs": self.epochs,
            "batch_size": self.task.batch_size,
            "schedule": self.schedule,
            "eval_every": self.eval_every,
            "device": self.task.device.type,
        }


@dataclass
class Run:
    """What one run measured.

    Attributes:
        peer: the optimizer's name.
        lr: its learning rate.
        seed: of the weights, the batches and the sampling.
        steps: the steps at which the metric was taken.
        values: the metric on held-out data at each of them.
        seconds: of training up to each of them, evaluation excluded; see
            `timing.Clock.seconds`.
        diverged: whether the loss stopped being finite, or the optimizer failed.
        error: what the optimizer failed with; the run has no values then.
        train_loss: mean training loss since the evaluation before.
        batch_size: examples a step.
        weight_decay: of the optimizer.
        metric: what the values are; see `Task.metric`.
        forward_backward_ms: median over the steps.
        optimizer_ms: median over the steps.
        peak_bytes: most memory allocated on the GPU; None on a CPU.
        state_bytes: of the tensors in the optimizer's state at the end.
        settings: of the job.
        environment: where it ran.
    """

    peer: str
    lr: float
    seed: int
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    diverged: bool = False
    error: str = ""
    train_loss: list[float] = field(default_factory=list)
    batch_size: int = 0
    weight_decay: float = 0.0
    metric: str = "accuracy"
    forward_backward_ms: float = 0.0
    optimizer_ms: float = 0.0
    peak_bytes: int | None = None
    state_bytes: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the metric is better."""
        return self.metric in ("accuracy", "PSNR")

    @property
    def unit(self) -> str:
        """What `units_per_step` counts: examples, or the characters of a text."""
        return "characters" if "context" in self.settings else "examples"

    @property
    def units_per_step(self) -> int:
        """Examples or characters that a step learns from."""
        return self.batch_size * int(self.settings.get("context", 1))

    @property
    def final(self) -> float:
        """The metric at the end, at its worst if the run diverged."""
        if self.diverged:
            return 0.0 if self.higher_is_better else math.inf
        return self.values[-1]

    def first(self, target: float) -> tuple[int, float] | None:
        """Step and seconds at which the target was first reached, or None."""
        for step, value, seconds in zip(
            self.steps, self.values, self.seconds, strict=True
        ):
            if value >= target if self.higher_is_better else value <= target:
                return step, seconds
        return None


def train(job: Job, on_step: Callable[[int], None] = lambda count: None) -> Run:
    """Make a run.

    Args:
        job: what to run.
        on_step: called with the number of steps done, for progress bars; a run that
            diverges reports those that it leaves out.
    """
    task = job.task
    torch.manual_seed(job.seed)
    model = job.peer.prepare(task.model())
    optimizers = [
        job.peer.optimizer(part, job.lr, job.weight_decay) for part in task.parts(model)
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: SCHEDULES[job.schedule](step, job.steps)
        )
        for optimizer in optimizers
    ]
    generator = torch.Generator(task.device).manual_seed(job.seed)
    settings = job.settings()
    run = Run(job.peer.name, job.lr, job.seed, settings=settings, metric=task.metric)
    run.weight_decay = settings["weight_decay"]
    run.batch_size = task.batch_size
    timer = clock(task.device)
    losses: list[Tensor] = []
    step, elapsed = 0, 0.0
    start = timer.seconds()
    for x, y in _batches(job, generator):
        for optimizer in optimizers:
            job.peer.adjust(optimizer, step / job.steps)
        timer.mark()
        for optimizer, loss in zip(optimizers, task.losses(model, x, y), strict=True):
            optimizer.zero_grad()
            loss.backward()
            timer.mark()
            optimizer.step()
            timer.mark()
            losses.append(loss.detach())
        timer.end_step()
        for schedule in schedules:
            schedule.step()
        step += 1
        on_step(1)
        if step % job.eval_every and step != job.steps:
            continue
        timer.wait()
        elapsed += timer.seconds() - start
        run.steps.append(step)
        run.seconds.append(elapsed)
        run.train_loss.append(torch.stack(losses).mean().item())
        run.values.append(task.evaluate(model))
        losses.clear()
        if not (math.isfinite(run.train_loss[-1]) and math.isfinite(run.values[-1])):
            run.diverged = True
            on_step(job.steps - step)
            break
        start = timer.seconds()
    run.forward_backward_ms, run.optimizer_ms = timer.medians()
    run.peak_bytes = timer.peak_bytes()
    run.state_bytes = sum(map(job.peer.state_bytes, optimizers))
    return run


def _batches(job: Job, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Those of all epochs."""
    for _ in range(job.epochs):
        yield from job.task.batches(generator)


def best_setting(
    runs: Sequence[Run], target: float | None = None
) -> tuple[float, float]:
    """Learning rate and weight decay that reach the target soonest, else end best.

    Args:
        runs: runs of one optimizer, over settings and perhaps seeds.
        target: of the metric; None: the end decides.
    """

    def merit(setting: tuple[float, float]) -> tuple[float, float]:
        mine = [run for run in runs if (run.lr, run.weight_decay) == setting]
        sign = -1 if mine[0].higher_is_better else 1
        end = sign * statistics.median(run.final for run in mine)
        if target is None:
            return end, 0.0
        reached = [run.first(target) for run in mine]
        return statistics.median(hit[0] if hit else math.inf for hit in reached), end

    return min(sorted({(run.lr, run.weight_decay) for run in runs}), key=merit)
