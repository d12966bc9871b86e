"""A picture of which optimizers survive: a cell for each training and rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..pictures import picture

# By the share of the runs that survived; all eyes tell them apart.
SHADES = ("#b2182b", "#f4a582", "#fddbc7", "#92c5de", "#2166ac")

GAP = 0.35
"""Between optimizers, and above the sums, in cells."""


def draw(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Draw how many runs survived, by optimizer and rate, and by training.

    Args:
        path: of the picture.
        entries: what trials are called and what came of them.
    """
    peers = list(dict.fromkeys(entry["peer"] for entry in entries))
    rates = sorted({entry["rate"] for entry in entries})
    trained = list(dict.fromkeys((e["case"], e["schedule"]) for e in entries))
    lived: dict[tuple[object, ...], list[bool]] = {}
    for entry in entries:
        column = (entry["peer"], entry["rate"])
        for row in ((entry["case"], entry["schedule"]), "sum"):
            fate = bool(entry.get("survived", False))
            lived.setdefault((row, *column), []).append(fate)
    width = len(peers) * (len(rates) + GAP)
    size = (max(7.0, 2.0 + 0.46 * width), 1.8 + 0.32 * (len(trained) + 1))
    with picture(path, "Runs that survived, by optimizer and rate", size) as figure:
        panel = figure.subplots()
        rows: dict[object, float] = {"sum": 0.0} | {
            row: i + 1 + GAP for i, row in enumerate(trained)
        }
        columns: dict[tuple[object, ...], float] = {
            (peer, rate): i * (len(rates) + GAP) + j
            for i, peer in enumerate(peers)
            for j, rate in enumerate(rates)
        }
        for (trained_or_sum, *place), fates in lived.items():
            _cell(panel, columns[tuple(place)], rows[trained_or_sum], fates)
        for i, peer in enumerate(peers):
            x = i * (len(rates) + GAP) + (len(rates) - 1) / 2
            panel.annotate(
                peer,
                (x, -0.6),
                (0, 16),
                textcoords="offset points",
                ha="center",
                weight="bold",
            )
        panel.set_xlim(-0.6, width - GAP - 0.4)
        panel.set_ylim(len(trained) + GAP + 0.6, -0.6)
        panel.set_xticks(list(columns.values()), [f"{r:g}x" for _, r in columns])
        names = ["all trainings", *(f"{case}, {how}" for case, how in trained)]
        panel.set_yticks(list(rows.values()), names)
        panel.tick_params(length=0, top=True, bottom=False, labelsize=8)
        panel.tick_params(labeltop=True, labelbottom=False)
        panel.grid(visible=False)
        panel.spines[:].set_visible(False)
        _legend(panel, len({entry.get("seed") for entry in entries}))


def _cell(panel: Any, x: float, y: float, fates: Sequence[bool]) -> None:
    """One square; how many survived is written where some did, and in the sums."""
    share = sum(fates) / len(fates)
    shade = SHADES[_shade(share)]
    panel.barh(y, 0.92, left=x - 0.46, height=0.9, color=shade)
    if y == 0 or 0 < share < 1:
        light = shade in SHADES[1:4]
        text = f"{sum(fates)}/{len(fates)}"
        colour = "black" if light else "white"
        panel.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)


def _shade(share: float) -> int:
    """All and none have a colour of their own."""
    if share in (0, 1):
        return -1 if share else 0
    return 1 + min(2, int(3 * share))


def _legend(panel: Any, seeds: int) -> None:
    from matplotlib.patches import Patch

    told = ("none", "under a third", "under two thirds", "more", "all")
    patches = [
        Patch(color=shade, label=label)
        for shade, label in zip(SHADES, told, strict=True)
    ]
    noun = "seed" if seeds == 1 else "seeds"
    panel.legend(
        handles=patches,
        title=f"of {seeds} {noun} a cell; rates are times each optimizer's usual one",
        title_fontsize=9,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        ncols=len(patches),
    )
