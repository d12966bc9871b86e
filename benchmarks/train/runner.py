"""Makes runs one after another, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .loop import Job, Run, train


def progress_bar(console: Console, width: int) -> Progress:
    """A bar that counts steps, with a description of so many characters before it."""
    return Progress(
        TextColumn(f"{{task.description:{width}}}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def train_all(
    jobs: Sequence[Job],
    console: Console,
    on_run: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Make the runs.

    Args:
        jobs: in this order.
        console: for the bar, which counts steps.
        on_run: called with each run as it ends.
    """
    runs: list[Run] = []
    if not jobs:
        return runs
    with progress_bar(console, 34) as progress:
        bar = progress.add_task("", total=sum(job.steps for job in jobs))
        for number, job in enumerate(jobs, 1):
            title = f"{job.peer.name}, lr {job.lr:g}, seed {job.seed}"
            progress.update(bar, description=f"{number}/{len(jobs)} {title}")
            runs.append(train(job, lambda count: progress.advance(bar, count)))
            on_run(runs[-1])
    return runs
