"""All small problems with every optimizer: ``frog-triton bench train all``.

Each optimizer looks for its rate on each problem, with seed 0 and runs of half the
length; is run with other seeds at the best; and with some of them at three times the
best, half the length. Runs go side by side, each in a process of one thread, and each
is a line in ``runs.jsonl`` of its problem's folder as soon as it ends.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..environment import environment
from . import report
from .choice import variants
from .loop import Job, Run, best_setting, train
from .peers import Peer
from .problems import PROBLEMS
from .runner import progress_bar
from .tasks import Task
from .workload import Workload

TOO_LARGE = 3.0
"""Factor on the best rate in the runs that show what an optimizer forgives."""


@dataclass(frozen=True)
class Place:
    """Where a suite reads and computes.

    Attributes:
        data: of images.
        cache: for decoded images.
        device: to train on.
    """

    data: Path
    cache: Path
    device: str


@dataclass(frozen=True)
class Ask:
    """A run by names, as it is handed to another process.

    Attributes:
        problem: one of `PROBLEMS`.
        study: whose variants of FROG take part; None: the workload's peers.
        peer: the optimizer's name.
        lr: its peak learning rate.
        seed: of the weights, the batches and the sampling.
        epochs: how long.
    """

    problem: str
    study: str | None
    peer: str
    lr: float
    seed: int
    epochs: int

    def job(self, place: Place) -> Job:
        """What is run."""
        workload = PROBLEMS[self.problem]
        return Job(
            _task(self.problem, place),
            variants(workload, self.study)[self.peer],
            self.lr,
            self.seed,
            self.epochs,
            schedule=workload.schedule,
            evaluations=workload.evaluations,
        )


@cache
def _task(problem: str, place: Place) -> Task:
    device = torch.device(place.device)
    return PROBLEMS[problem].task(place.data, place.cache, device)


@dataclass(frozen=True)
class Campaign:
    """One optimizer on one problem, from the search to the last seed.

    Attributes:
        workload: the problem.
        peer: the optimizer.
        study: see `Ask`.
        seeds: how many runs are reported.
        place: where.
    """

    workload: Workload
    peer: Peer
    study: str | None
    seeds: int
    place: Place

    @cached_property
    def search(self) -> list[Ask]:
        """The runs of the search; with one rate there is none."""
        if len(self.peer.lrs) == 1:
            return []
        return [self._ask(lr, 0, self.workload.grid_epochs) for lr in self.peer.lrs]

    def reported(self, lr: float) -> list[Ask]:
        """The runs at the best rate."""
        seeds = range(1, self.seeds + 1)
        return [self._ask(lr, seed, self.workload.epochs) for seed in seeds]

    def strained(self, lr: float) -> list[Ask]:
        """The runs at too large a rate."""
        seeds = range(1, min(2, self.seeds) + 1)
        epochs = self.workload.grid_epochs
        return [self._ask(TOO_LARGE * lr, seed, epochs) for seed in seeds]

    def best(self, ledger: Ledger) -> float | None:
        """The rate that ended best in the search, once that is done."""
        if not self.search:
            return self.peer.lrs[0]
        tried = [run for run in map(ledger.find, self.search) if run is not None]
        return best_setting(tried)[0] if len(tried) == len(self.search) else None

    def known(self, ledger: Ledger) -> list[Ask]:
        """Its runs, as far as they can be told."""
        best = self.best(ledger)
        if best is None:
            return self.search
        return [*self.search, *self.reported(best), *self.strained(best)]

    def size(self) -> int:
        """All runs of it."""
        return len(self.search) + len(self.reported(0)) + len(self.strained(0))

    def _ask(self, lr: float, seed: int, epochs: int) -> Ask:
        return Ask(self.workload.name, self.study, self.peer.name, lr, seed, epochs)


def _alone() -> None:
    """A process takes one thread, and leaves the bar alone."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.ERROR)


def make(ask: Ask, place: Place) -> Run:
    """Make a run; one whose optimizer fails has diverged, and says with what."""
    job = ask.job(place)
    try:
        return train(job)
    except Exception as error:
        run = Run(ask.peer, ask.lr, ask.seed, metric=job.task.metric, diverged=True)
        run.settings = job.settings()
        run.batch_size = job.task.batch_size
        run.weight_decay = run.settings["weight_decay"]
        run.error = f"{type(error).__name__}: {error}"
        return run


class Ledger:
    """The runs that have been made, a file of lines for each problem.

    Args:
        out: the folder; one for each problem is made in it.
        place: where runs are made.
    """

    def __init__(self, out: Path, place: Place) -> None:
        self.out = out
        self.place = place
        self._environment = environment() | {"threads": 1}
        self._runs: dict[str, dict[str, Run]] = {}
        self._keys: dict[Ask, str] = {}

    def find(self, ask: Ask) -> Run | None:
        """The run, if it has been made."""
        if ask not in self._keys:
            self._keys[ask] = _key(ask.job(self.place).settings())
        return self._of(ask.problem).get(self._keys[ask])

    def keep(self, ask: Ask, run: Run) -> None:
        """Write a run down."""
        run.environment = self._environment
        for name in ("values", "seconds", "train_loss"):
            setattr(run, name, [float(f"{v:.6g}") for v in getattr(run, name)])
        report.append(self._lines(ask.problem), run)
        self._of(ask.problem)[_key(run.settings)] = run

    def _of(self, problem: str) -> dict[str, Run]:
        if problem not in self._runs:
            held = report.read(self._lines(problem))
            self._runs[problem] = {_key(run.settings): run for run in held}
        return self._runs[problem]

    def _lines(self, problem: str) -> Path:
        return self.out / problem / "runs.jsonl"


def _key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def processes(count: int) -> Executor:
    """Processes for runs, each of one thread."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, context, _alone)


def run_all(
    campaigns: Sequence[Campaign],
    ledger: Ledger,
    pool: Executor,
    side_by_side: int,
    console: Console,
) -> None:
    """Make what is not yet there.

    Args:
        campaigns: in the order in which they are made.
        ledger: of the runs.
        pool: makes them.
        side_by_side: how many at a time.
        console: for the bar, which counts runs.
    """
    running: dict[Future[Run], Ask] = {}
    with pool, progress_bar(console, 40) as progress:
        bar = progress.add_task("", total=sum(c.size() for c in campaigns))
        while True:
            known = [ask for c in campaigns for ask in c.known(ledger)]
            missing = [ask for ask in known if ledger.find(ask) is None]
            progress.update(bar, completed=len(known) - len(missing))
            waiting = (ask for ask in missing if ask not in running.values())
            for ask in islice(waiting, side_by_side - len(running)):
                title = f"{ask.problem}, {ask.peer}, lr {ask.lr:g}"
                progress.update(bar, description=title)
                running[pool.submit(make, ask, ledger.place)] = ask
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                ledger.keep(running.pop(future), future.result())
