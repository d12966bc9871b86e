"""The demo's picture: what each optimizer's network shows, and how it got there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..pictures import picture
from .field import FieldTask
from .loop import Run
from .race import Racer
from .report import draw_curves


def draw(
    path: Path, task: FieldTask, racers: Sequence[Racer], runs: Sequence[Run]
) -> None:
    """Draw the photograph as learned by each, above the curves of all runs.

    Args:
        path: of the picture.
        task: what was learned.
        racers: of the race that is shown.
        runs: of all races.
    """
    seeds = len({run.seed for run in runs})
    told = "one seed" if seeds == 1 else f"median and range of {seeds} seeds"
    title = f"{racers[0].distance} of training each ({told})"
    with picture(path, title, (12.5, 6.6)) as figure:
        above, below = figure.subfigures(2, 1, height_ratios=(1, 2.4))
        panels = above.subplots(1, len(racers) + 1)
        shown = [("the photograph", task.photo.colours)]
        shown += [
            (f"{r.run.peer}: {r.run.final:.1f} dB", task.picture(r.model))
            for r in racers
        ]
        for panel, (name, colours) in zip(panels, shown, strict=True):
            panel.axis("off")
            panel.imshow(colours.numpy())
            panel.set_title(name)
        draw_curves(below, runs)
        if task.photo.credit:
            above.supxlabel(task.photo.credit, fontsize=7, color="#777777")
