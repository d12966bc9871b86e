"""Tables, pictures and JSON of training runs."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..environment import environment
from ..pictures import looks, picture
from .loop import Run, best_setting

Cell = tuple[int, float] | None


def at_best(runs: Sequence[Run], target: float | None) -> list[Run]:
    """Of each optimizer the longest runs at one setting: that with the most seeds.

    Args:
        runs: of grids and of the settings that came out best.
        target: decides between settings with equally many seeds; None: the end does.
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


def step_ms(runs: Sequence[Run]) -> float:
    """Median milliseconds of a step, schedule and batches included."""
    paces = [run.seconds[-1] / run.steps[-1] for run in runs if run.steps]
    return 1000 * statistics.median(paces) if paces else math.nan


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
        pace = step_ms(mine)
        table.append(
            [
                peer,
                f"{mine[0].lr:g}",
                *("-" if c is None else f"{c[0]} ({c[1]:.1f})" for c in cells),
                spread([run.final for run in mine], metric),
                f"{pace:.0f}",
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
    the place of steps. An optimizer looks the same in both panels.

    Args:
        path: of the picture.
        title: of what was trained.
        runs: at one setting of each optimizer.
    """
    count = len({run.seed for run in runs})
    told = "one seed" if count == 1 else f"median and range of {count} seeds"
    with picture(path, f"{title}: {told}", (11.5, 5.2)) as figure:
        draw_curves(figure, runs)


def draw_curves(figure: Any, runs: Sequence[Run]) -> None:
    """What `plot` shows, on a figure or a part of one."""
    from matplotlib.ticker import EngFormatter

    good = {
        peer: mine
        for peer, all_mine in by_peer(runs).items()
        if (mine := [run for run in all_mine if not run.diverged])
    }
    first = runs[0]
    sizes = {run.units_per_step for run in runs}
    by_unit = len(sizes) > 1 or first.unit != "examples"
    panels = figure.subplots(1, 2, sharey=True)
    for look, (peer, mine) in zip(looks(len(good)), good.items(), strict=True):
        for panel, xs in zip(panels, _progress(mine, by_unit), strict=True):
            _curve(panel, xs, mine, f"{peer}, lr {mine[0].lr:g}", look)
    units = (first.unit if by_unit else "steps", "seconds of training")
    if by_unit:
        panels[0].xaxis.set_major_formatter(EngFormatter())
    for panel, unit in zip(panels, units, strict=True):
        panel.set_xlabel(unit)
        panel.set_xlim(left=0)
    low, high = _range(list(good.values()))
    panels[0].set_ylim(low, high)
    panels[0].set_ylabel(f"test {first.metric}")
    if first.metric == "accuracy":
        panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    key = panels[0].get_legend_handles_labels()
    figure.legend(*key, loc="outside lower center", ncols=min(5, max(1, len(good))))


def _progress(runs: Sequence[Run], by_unit: bool) -> tuple[list[float], list[float]]:
    """Where evaluations were made: steps or units, and median seconds."""
    first = runs[0]
    steps: list[float] = [
        s * (first.units_per_step if by_unit else 1) for s in first.steps
    ]
    each = zip(*(run.seconds for run in runs), strict=True)
    return steps, [statistics.median(values) for values in each]


def _curve(
    panel: Any,
    xs: Sequence[float],
    runs: Sequence[Run],
    label: str,
    look: dict[str, str],
) -> None:
    values = list(zip(*(run.values for run in runs), strict=True))
    middle = [statistics.median(v) for v in values]
    panel.plot(xs, middle, label=label, linewidth=1.8, **look)
    low, high = [min(v) for v in values], [max(v) for v in values]
    panel.fill_between(xs, low, high, color=look["color"], alpha=0.18, linewidth=0)


def _range(groups: Sequence[Sequence[Run]]) -> tuple[float | None, float | None]:
    """What to show of the metric: all there is from a fifth of the way on."""
    if not groups:
        return None, None
    late = [v for runs in groups for r in runs for v in r.values[len(r.values) // 5 :]]
    low, high = min(late), max(late)
    room = 0.03 * (high - low)
    return low - room, high + room
