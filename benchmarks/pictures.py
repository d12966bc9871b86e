"""How all pictures look: colours, letters, and how they are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

# Of Okabe and Ito: told apart by all eyes, and in grey.
COLOURS = (
    "#009e73",
    "#0072b2",
    "#d55e00",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f7f7f",
    "#000000",
)
DASHES = ("-", "--", ":", "-.")

SETTINGS: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.titlesize": 12,
    "savefig.dpi": 150,
}


@contextmanager
def picture(path: Path, title: str, size: tuple[float, float]) -> Iterator[Any]:
    """Gives a figure to draw on, and writes it in the end.

    Args:
        path: of the picture; its ending says the form.
        title: above all.
        size: in inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, x=0.01, horizontalalignment="left", weight="bold")
        yield figure
        figure.savefig(path)


def looks(count: int) -> list[dict[str, str]]:
    """Colour and dashes of so many curves."""
    colours = islice(cycle(COLOURS), count)
    return [
        {"color": colour, "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}
        for i, colour in enumerate(colours)
    ]


def label_points(
    panel: Any, places: Sequence[tuple[float, float]], names: Sequence[str]
) -> None:
    """Write names beside points, each where no other name or point is.

    Args:
        panel: laid out.
        places: of the points, as data.
        names: of the points.
    """
    scale = panel.figure.dpi / 72
    dots = [panel.transData.transform(place) for place in places]
    taken = [_box(x, y, x, y, 4 * scale) for x, y in dots]
    inside = panel.get_window_extent()
    line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.5}
    # From the right, so that names there do not have to cross others.
    for i in sorted(range(len(names)), key=lambda i: -dots[i][0]):
        text = panel.annotate(
            names[i],
            places[i],
            (0, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=7.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
            in_layout=False,
        )
        size = text.get_window_extent()
        for dx, dy, side in _offsets():
            left = dots[i][0] + dx * scale - (size.width if side == "right" else 0)
            low = dots[i][1] + dy * scale - size.height / 2
            found = _box(left, low, left + size.width, low + size.height, 2 * scale)
            within = (
                inside.x0 <= found[0]
                and inside.y0 <= found[1]
                and found[2] <= inside.x1
                and found[3] <= inside.y1
            )
            if within and not any(_overlap(found, other) for other in taken):
                break
        else:
            text.remove()  # there is no room for it
            continue
        taken.append(found)
        text.set_position((dx, dy))
        text.set_horizontalalignment(side)
        if abs(dx) > 8 or abs(dy) > 8:  # else it is plain whose it is
            panel.annotate(
                "",
                places[i],
                (dx, dy),
                textcoords="offset points",
                arrowprops=line,
                in_layout=False,
            )


def _offsets() -> Iterator[tuple[int, int, str]]:
    """Where a name may stand, in points from its own: near places first."""
    yield 7, 0, "left"
    yield -7, 0, "right"
    for far in range(12, 160, 8):
        for across, side in product((1, -1), (1, 0.4, 0)):
            dy = round(far * (1 - 0.5 * side))
            dx = round(far * side) * across
            yield dx, -dy, "left" if across > 0 else "right"
            yield dx, dy, "left" if across > 0 else "right"


Box = tuple[float, float, float, float]


def _box(x0: float, y0: float, x1: float, y1: float, margin: float) -> Box:
    return x0 - margin, y0 - margin, x1 + margin, y1 + margin


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
