"""Optimizers that train in turns, each for the same seconds or the same steps.

A clock of its own stands still while others train and while the metric is taken. In a
race over seconds the learning rate follows the clock, so an optimizer with cheap steps
uses its time for more of them. Whatever slows the machine slows all of them alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .loop import SCHEDULES, Run
from .peers import Peer
from .tasks import Task
from .timing import clock

_FINE = 10_000
"""Parts of a race that the schedule tells apart."""


@dataclass(frozen=True)
class Distance:
    """How long a race is.

    Attributes:
        amount: of the unit.
        unit: ``"seconds"`` or ``"steps"``.
    """

    amount: float
    unit: str = "seconds"

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}"


@dataclass(frozen=True)
class Entry:
    """Who takes part.

    Attributes:
        peer: the optimizer.
        lr: its peak learning rate.
    """

    peer: Peer
    lr: float


class Racer:
    """One optimizer with its network and its clock.

    Args:
        task: what is trained.
        entry: optimizer and rate.
        seed: of the weights, the batches and the sampling.
        distance: of the race.
    """

    def __init__(self, task: Task, entry: Entry, seed: int, distance: Distance) -> None:
        torch.manual_seed(seed)
        peer = entry.peer
        self.task = task
        self.entry = entry
        self.distance = distance
        self.elapsed = 0.0
        self.steps = 0
        self.model = peer.prepare(task.model())
        self.optimizer = peer.optimizer(self.model, entry.lr)
        shape = SCHEDULES["one-cycle"]
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda _: shape(int(_FINE * self.done), _FINE)
        )
        self._batches = self._endless(seed)
        self._clock = clock(task.device)
        self.run = Run(peer.name, entry.lr, seed, metric=task.metric)
        self.run.settings = self._settings(seed)
        self.run.weight_decay = peer.weight_decays[0]
        self.run.batch_size = task.batch_size

    @property
    def done(self) -> float:
        """Share of the race that is behind it."""
        spent = {"seconds": self.elapsed, "steps": self.steps}[self.distance.unit]
        return min(1.0, spent / self.distance.amount)

    def train(self, until: float) -> None:
        """Take steps up to a share of the race, then take the metric."""
        if self.run.diverged:
            return
        losses: list[Tensor] = []
        while self.done < until:
            losses.append(self.step())
        run = self.run
        run.steps.append(self.steps)
        run.seconds.append(self.elapsed)
        if losses:
            run.train_loss.append(torch.stack(losses).mean().item())
            run.values.append(self.task.evaluate(self.model))
        else:  # the step before was longer than a lap
            run.train_loss.append(run.train_loss[-1])
            run.values.append(run.values[-1])
        run.diverged = not (
            math.isfinite(run.train_loss[-1]) and math.isfinite(run.values[-1])
        )

    def finish(self) -> Run:
        """The run, with what is known at its end."""
        run = self.run
        run.forward_backward_ms, run.optimizer_ms = self._clock.medians()
        run.peak_bytes = None  # of all who take part, not of one
        run.state_bytes = self.entry.peer.state_bytes(self.optimizer)
        return run

    def step(self) -> Tensor:
        """Take one step on the clock; returns the loss before it."""
        start = self._clock.seconds()
        x, y = next(self._batches)
        self.entry.peer.adjust(self.optimizer, self.done)
        self._clock.mark()
        loss = self.task.loss(self.model, x, y)
        self.optimizer.zero_grad()
        loss.backward()
        self._clock.mark()
        self.optimizer.step()
        self._clock.mark()
        self._clock.end_step()
        self._clock.wait()
        self.steps += 1
        self.elapsed += self._clock.seconds() - start
        self._schedule.step()
        return loss.detach()

    def _endless(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator(self.task.device).manual_seed(seed)
        while True:
            yield from self.task.batches(generator)

    def _settings(self, seed: int) -> dict[str, Any]:
        return {
            "data": self.task.title,
            **self.task.size,
            "peer": self.entry.peer.name,
            "options": {k: str(v) for k, v in self.entry.peer.options.items()},
            "lr": self.entry.lr,
            "weight_decay": self.entry.peer.weight_decays[0],
            "seed": seed,
            "distance": str(self.distance),
            "batch_size": self.task.batch_size,
            "schedule": f"one-cycle over {self.distance.unit}",
            "device": self.task.device.type,
        }


def race(
    task: Task,
    entries: Sequence[Entry],
    seed: int,
    distance: Distance,
    laps: int = 24,
    on_lap: Callable[[Sequence[Racer]], None] = lambda racers: None,
) -> list[Racer]:
    """Train all in turns; returns them at the end, in the order of the entries.

    Args:
        task: what is trained.
        entries: who takes part.
        seed: of the weights, the batches and the sampling.
        distance: for each of them.
        laps: turns, after each of which the metric is taken.
        on_lap: called whenever one has had a turn.
    """
    for entry in entries:  # what only a first step does is no one's training
        warm = Racer(task, entry, seed + 1, Distance(math.inf))
        for _ in range(2):
            warm.step()
    racers = [Racer(task, entry, seed, distance) for entry in entries]
    for lap in range(1, laps + 1):
        for racer in racers:
            racer.train(lap / laps)
            on_lap(racers)
    return racers
