"""Tables, pictures and JSON of training runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..environment import environment
from .loop import Run

Cell = tuple[int, float] | None


def median_first(runs: Sequence[Run], target: float) -> Cell:
    """Median step and seconds to the target; None if half of the runs missed it."""
    hits = [run.first(target) for run in runs]
    infinite = (float("inf"), float("inf"))
    steps = statistics.median((hit or infinite)[0] for hit in hits)
    seconds = statistics.median((hit or infinite)[1] for hit in hits)
    return None if steps == float("inf") else (int(steps), seconds)


def rows(runs: Sequence[Run], targets: Sequence[float]) -> list[list[str]]:
    """A header, and a row for each optimizer, as text."""
    header = ["optimizer", "lr"]
    header += [f"steps (s) to {target:.0%}" for target in targets]
    header += ["final accuracy", "ms / step"]
    table = [header]
    for peer in dict.fromkeys(run.peer for run in runs):
        mine = [run for run in runs if run.peer == peer]
        cells = [median_first(mine, target) for target in targets]
        finals = [run.final for run in mine]
        pace = statistics.median(run.seconds[-1] / run.steps[-1] for run in mine)
        table.append(
            [
                peer,
                f"{mine[0].lr:g}",
                *("-" if c is None else f"{c[0]} ({c[1]:.1f})" for c in cells),
                f"{statistics.median(finals):.2%} "
                f"({min(finals):.2%} - {max(finals):.2%})",
                f"{1000 * pace:.0f}",
            ]
        )
    return table


def markdown(table: Sequence[Sequence[str]]) -> str:
    """The table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "|" + " --- |" * len(table[0]))
    return "\n".join(lines)


def write_json(
    path: Path, settings: dict[str, Any], tried: Sequence[Run], best: Sequence[Run]
) -> None:
    """All that was measured, with settings and environment."""
    content = {
        "environment": environment(),
        "settings": settings,
        "best": [asdict(run) for run in best],
        "tried": [asdict(run) for run in tried],
    }
    path.write_text(json.dumps(content, indent=1))


def plot(path: Path, title: str, runs: Sequence[Run]) -> None:
    """Median test accuracy against steps and against seconds, seeds as a band."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    lowest = 1.0
    for peer in dict.fromkeys(run.peer for run in runs):
        mine = [run for run in runs if run.peer == peer and not run.diverged]
        if not mine:
            continue
        curves = list(zip(*(run.accuracy for run in mine), strict=True))
        middle = [statistics.median(values) for values in curves]
        lowest = min(lowest, middle[len(middle) // 8])
        seconds = [
            statistics.median(values)
            for values in zip(*(run.seconds for run in mine), strict=True)
        ]
        for panel, xs in zip(panels, (mine[0].steps, seconds), strict=True):
            panel.plot(xs, middle, label=f"{peer}, lr {mine[0].lr:g}")
            panel.fill_between(
                xs, [min(v) for v in curves], [max(v) for v in curves], alpha=0.15
            )
    for panel, label in zip(panels, ("steps", "seconds of training"), strict=True):
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
        panel.set_ylim(bottom=max(0.0, lowest - 0.05))
    panels[0].set_ylabel("test accuracy")
    panels[0].legend()
    figure.suptitle(f"{title}: median of {len({r.seed for r in runs})} seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
