"""What the runs of all problems say: tables, pictures and JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...cli.output import Console
from ..pictures import looks, picture
from . import report
from .loop import Run, best_setting
from .ranks import Standing, profile, standings
from .suite import TOO_LARGE
from .workload import Workload

Outcomes = Mapping[Workload, Mapping[str, "Outcome"]]
"""By problem and optimizer."""


@dataclass(frozen=True)
class Outcome:
    """What an optimizer did on a problem.

    Attributes:
        workload: the problem.
        runs: at its best rate.
        strained: at three times that.
    """

    workload: Workload
    runs: Sequence[Run]
    strained: Sequence[Run]

    @property
    def finals(self) -> list[float]:
        """The metric at the end, as a cost."""
        sign = -1 if self.runs[0].higher_is_better else 1
        return [sign * run.final for run in self.runs]

    def to_target(self, target: float) -> tuple[float, float]:
        """Median steps and seconds; infinite if half of the runs missed it."""
        cell = report.median_first(self.runs, target)
        return cell or (math.inf, math.inf)

    @property
    def step_ms(self) -> float:
        """Milliseconds of a step, all that is not evaluation."""
        paces = [run.seconds[-1] / run.steps[-1] for run in self.runs if run.steps]
        return 1000 * statistics.median(paces) if paces else math.nan

    @property
    def diverged(self) -> int:
        """Runs at its best rate that did."""
        return sum(run.diverged for run in self.runs)

    @property
    def survived(self) -> int:
        """Runs at three times the best rate that reached the easiest target."""
        easiest = self.workload.targets[0]
        return sum(
            not run.diverged and run.first(easiest) is not None
            for run in self.strained
        )


def outcomes(workload: Workload, runs: Sequence[Run]) -> dict[str, Outcome]:
    """What came of each optimizer whose runs have come to an end.

    Args:
        workload: the problem.
        runs: all that were made.
    """
    found = {}
    for peer, mine in report.by_peer(runs).items():
        long = [run for run in mine if run.settings["epochs"] == workload.epochs]
        if long:
            at_best = report.at_best(long, None)
            lr = TOO_LARGE * at_best[0].lr
            strained = [
                run
                for run in mine
                if math.isclose(run.lr, lr)
                and run.settings["epochs"] == workload.grid_epochs
                and run.seed
            ]
            found[peer] = Outcome(workload, at_best, strained)
    return found
