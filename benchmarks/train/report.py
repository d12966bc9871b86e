"""Tables, pictures and JSON of training runs."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..environment import environment
from .loop import Run, best_setting

Cell = tuple[int, float] | None


def at_best(runs: Sequence[Run], target: float) -> list[Run]:
    """Of each optimizer the longest runs at one setting: that with the most seeds.

    Args:
        runs: of grids and of the settings that came out best.
        target: decides between settings with equally many seeds.
    """
    longest = max(run.settings["epochs"] for run in runs)
    chosen: list[Run] = []
    for mine in by_peer(r for r in runs if r.settings["epochs"] == longest).values():
        seeds = Counter((run.lr, run.weight_decay) for run in mine)
        most = {s for s, count in seeds.items() if count == max(seeds.values())}
        best = best_setting(
            [run for run in mine if (run.lr, run.weight_decay) in most], target
        )
        chosen += [run for run in mine if (run.lr, run.weight_decay) == best]
    return chosen


def median_first(runs: Sequence[Run], target: float) -> Cell:
    """Median step and seconds to the target; None if half of the runs missed it."""
    hits = [run.first(target) for run in runs]
    infinite = (float("inf"), float("inf"))
    steps = statistics.median((hit or infinite)[0] for hit in hits)
    seconds = statistics.median((hit or infinite)[1] for hit in hits)
    return None if steps == float("inf") else (int(steps), seconds)


def by_peer(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs of each optimizer, in the order in which they first appear."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.peer, []).append(run)
    return grouped


def show(value: float, metric: str) -> str:
    """A value of the metric as text."""
    return f"{value:.2%}" if metric == "accuracy" else f"{value:.3f}"


def spread(values: Sequence[float], metric: str) -> str:
    """Median, and the range in brackets."""
    low, high = show(min(values), metric), show(max(values), metric)
    return f"{show(statistics.median(values), metric)} ({low} - {high})"


def rows(runs: Sequence[Run], targets: Sequence[float]) -> list[list[str]]:
    """A header, and a row for each optimizer, as text."""
    metric = runs[0].metric
    table = [
        [
            "optimizer",
            "lr",
            *(f"steps (s) to {_target(t, metric)}" for t in targets),
            f"final {metric}",
            "ms / step",
        ]
    ]
    for peer, mine in by_peer(runs).items():
        cells = [median_first(mine, target) for target in targets]
        pace = statistics.median(run.seconds[-1] / run.steps[-1] for run in mine)
        table.append(
            [
                peer,
                f"{mine[0].lr:g}",
                *("-" if c is None else f"{c[0]} ({c[1]:.1f})" for c in cells),
                spread([run.final for run in mine], metric),
                f"{1000 * pace:.0f}",
            ]
        )
    return table


def detailed_rows(runs: Sequence[Run], targets: Sequence[float]) -> list[list[str]]:
    """As `rows`, with batch, seeds, spread of the steps, halves of a step, memory."""
    metric = runs[0].metric
    table = [
        [
            *("optimizer", "lr", "weight decay", "batch", "seeds"),
            *(f"steps to {_target(t, metric)}" for t in targets),
            *(f"seconds to {_target(t, metric)}" for t in targets),
            *(f"{runs[0].unit} to {_target(t, metric)}" for t in targets),
            *(f"final {metric}", "forward-backward ms", "optimizer ms"),
            *("peak memory", "state"),
        ]
    ]
    for peer, mine in by_peer(runs).items():
        first = mine[0]
        cells = [median_first(mine, target) for target in targets]
        reached = [[r.first(t) for r in mine] for t in targets]
        peaks = [run.peak_bytes for run in mine if run.peak_bytes is not None]
        halves = (
            statistics.median(r.forward_backward_ms for r in mine),
            statistics.median(r.optimizer_ms for r in mine),
        )
        table.append(
            [
                *(peer, f"{first.lr:g}", f"{first.weight_decay:g}"),
                *(str(first.batch_size), str(len({r.seed for r in mine}))),
                *(_steps(c, hits) for c, hits in zip(cells, reached, strict=True)),
                *("-" if c is None else f"{c[1]:.1f}" for c in cells),
                *(
                    "-" if c is None else f"{c[0] * first.units_per_step:,}"
                    for c in cells
                ),
                spread([run.final for run in mine], metric),
                *(f"{ms:.1f}" for ms in halves),
                _mebibytes(max(peaks)) if peaks else "-",
                _mebibytes(first.state_bytes),
            ]
        )
    return table


def _target(value: float, metric: str) -> str:
    return f"{value:.0%}" if metric == "accuracy" else f"{value:g}"


def _steps(cell: Cell, hits: Sequence[Cell]) -> str:
    """Median and range of the steps; a run that missed the target opens the range."""
    if cell is None:
        return "-"
    steps = [hit[0] for hit in hits if hit is not None]
    most = str(max(steps)) if len(steps) == len(hits) else "missed"
    return f"{cell[0]} ({min(steps)} - {most})"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


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


def append(path: Path, run: Run) -> None:
    """Add a run to a file of JSON lines, in place of a torn line at its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(asdict(run)).encode() + b"\n")


def read(path: Path) -> list[Run]:
    """The runs in a file of JSON lines; none if there is no file.

    A last line without an end is what a killed process leaves; it is skipped.

    Raises:
        ValueError: a line that is no run.
    """
    if not path.exists():
        return []
    known = {f.name for f in fields(Run)}
    runs = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            runs.append(Run(**{k: v for k, v in content.items() if k in known}))
        except (json.JSONDecodeError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{path}:{number} is not a run: {error}") from None
    return runs


def plot(path: Path, title: str, runs: Sequence[Run]) -> None:
    """Median of the metric against steps and against seconds, seeds as a band.

    Where batches differ in size or are windows of text, examples or characters take
    the place of steps.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    sizes = {run.units_per_step for run in runs}
    by_unit = len(sizes) > 1 or runs[0].unit != "examples"
    starts = []
    for number, (peer, all_mine) in enumerate(by_peer(runs).items()):
        mine = [run for run in all_mine if not run.diverged]
        if not mine:
            continue
        first = mine[0]
        curves = list(zip(*(run.values for run in mine), strict=True))
        middle = [statistics.median(values) for values in curves]
        starts.append(middle[len(middle) // 8])
        progress = [s * (first.units_per_step if by_unit else 1) for s in first.steps]
        seconds = [
            statistics.median(values)
            for values in zip(*(run.seconds for run in mine), strict=True)
        ]
        for panel, xs in zip(panels, (progress, seconds), strict=True):
            panel.plot(
                xs,
                middle,
                label=f"{peer}, lr {first.lr:g}",
                # matplotlib has ten colours.
                linestyle="-" if number < 10 else "--",
            )
            panel.fill_between(
                xs, [min(v) for v in curves], [max(v) for v in curves], alpha=0.15
            )
    labels = (runs[0].unit if by_unit else "steps", "seconds of training")
    for panel, label in zip(panels, labels, strict=True):
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
        if starts and runs[0].higher_is_better:
            panel.set_ylim(bottom=max(0.0, min(starts) - 0.05))
        elif starts:
            panel.set_ylim(top=max(starts) * 1.05)
    panels[0].set_ylabel(f"test {runs[0].metric}")
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{title}: median of {len({r.seed for r in runs})} seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
