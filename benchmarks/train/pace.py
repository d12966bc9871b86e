"""Milliseconds a step, taken while nothing else runs: ``bench train all --pace``.

Runs that go side by side disturb each other, by the caches and the memory that they
share, and one that is resumed on another day may find another machine. So each
optimizer makes a quarter of a run on each problem, one after the other, and the seconds
of all runs are taken to be their steps times that.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from ..environment import environment
from .loop import Run
from .runner import progress_bar
from .suite import Ask, Campaign, make, processes

FILE = "pace.json"

Paces = Mapping[str, Mapping[str, float]]
"""Milliseconds a step by problem and optimizer."""


def measure(campaigns: Iterable[Campaign], out: Path, console: Console) -> None:
    """Take those of some optimizers on some problems, and write them down.

    Args:
        campaigns: say which.
        out: the suite's folder; what its file has of others stays.
        console: for the bar.
    """
    known = {name: dict(own) for name, own in read(out).items()}
    campaigns = list(campaigns)
    with processes(1) as pool, progress_bar(console, 40) as progress:
        bar = progress.add_task("", total=len(campaigns))
        for campaign in campaigns:
            problem, peer = campaign.workload.name, campaign.peer
            progress.update(bar, description=f"{problem}, {peer.name}")
            # The smallest rate, so that no run diverges and ends early.
            ask = Ask(problem, campaign.study, peer.name, min(peer.lrs), 0, 1)
            pace = of_run(pool.submit(make, ask, campaign.place).result())
            if math.isfinite(pace):
                known.setdefault(problem, {})[peer.name] = round(pace, 2)
            progress.advance(bar)
    content = {"environment": environment() | {"threads": 1}, "ms_per_step": known}
    out.mkdir(parents=True, exist_ok=True)
    (out / FILE).write_text(json.dumps(content, indent=1) + "\n")


def of_run(run: Run) -> float:
    """The median over the parts between two evaluations, so without the first steps."""
    points = pairwise(zip(run.steps, run.seconds, strict=True))
    parts = [1000 * (end - start) / (to - at) for (at, start), (to, end) in points]
    return statistics.median(parts) if parts else math.nan


def read(out: Path) -> Paces:
    """Those in a suite's folder; none where they were not taken."""
    path = out / FILE
    if not path.exists():
        return {}
    content: dict[str, Any] = json.loads(path.read_text())
    paces: Paces = content["ms_per_step"]
    return paces


def at(paces: Mapping[str, float], runs: Iterable[Run]) -> list[Run]:
    """Runs with the seconds that their steps take at these paces, where known."""
    return [
        replace(run, seconds=[step * paces[run.peer] / 1000 for step in run.steps])
        if run.peer in paces
        else run
        for run in runs
    ]
