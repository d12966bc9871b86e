"""Pictures of benchmark results: kernels under a roofline, shares and speed-ups."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..kernels.gpu import GPU
from .pictures import COLOURS, label_points, picture


@dataclass(frozen=True)
class Point:
    """A kernel under a roofline.

    Attributes:
        name: of the kernel.
        operations: of matrix products.
        bytes: through memory.
        time_us: that it takes; without one it lies on the roof, above which none can.
    """

    name: str
    operations: int
    bytes: int
    time_us: float | None = None

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.bytes

    def highest(self, gpu: GPU) -> float:
        """Operations a second that no kernel of this intensity exceeds."""
        return min(self.intensity * gpu.bandwidth, gpu.bf16)

    def reached(self, gpu: GPU) -> float:
        """Operations a second."""
        if self.time_us is None:
            return self.highest(gpu)
        return 1e6 * self.operations / self.time_us


@dataclass(frozen=True)
class Roofline:
    """Kernels of one model.

    Attributes:
        title: of the model.
        points: a kernel each.
        speedups: name, and how many times faster than the rival.
    """

    title: str
    points: Sequence[Point]
    speedups: Sequence[tuple[str, float]] = ()


MEASURED = "measured"
ESTIMATED = "estimated from machine code, never measured"
AT_MOST = "at most (nothing was timed)"


def try_to(draw: Callable[..., None], path: Path, *what: Any) -> None:
    """Draw; a picture that cannot be written costs no result, only a warning."""
    try:
        draw(path, *what)
    except OSError as error:
        print(f"no picture in {path}: {error}", file=sys.stderr)


def draw_rooflines(
    path: Path, title: str, rooflines: Sequence[Roofline], gpu: GPU, times: str
) -> None:
    """Draw a roofline with kernels on it for each model; speed-ups where there are any.

    Args:
        path: of the picture.
        title: above all.
        rooflines: of the models.
        gpu: whose roof.
        times: `MEASURED` or `ESTIMATED`: what the times of the points are.
    """
    shown = [roofline for roofline in rooflines if roofline.points]
    if not shown:
        return
    with_bars = any(roofline.speedups for roofline in shown)
    columns = 2 if with_bars or len(shown) > 1 else 1
    rows = len(shown) if with_bars else -(-len(shown) // columns)
    width = 7.6 if columns == 1 else 12.8
    with picture(path, title, (width, 1.0 + 4.4 * rows)) as figure:
        panels = figure.subplots(rows, columns, squeeze=False)
        places = list(panels[:, 0] if with_bars else panels.flat)
        for panel, roofline in zip(places, shown, strict=False):
            _roofline(panel, roofline, gpu, times)
        for empty in places[len(shown) :]:
            empty.set_axis_off()
        if with_bars:
            for panel, roofline in zip(panels[:, 1], shown, strict=True):
                _speedups(panel, roofline.speedups)
        key = places[0].get_legend_handles_labels()
        figure.legend(*key, loc="outside lower left", ncols=columns)
        figure.draw_without_rendering()  # lays all out, so that names find room
        for panel, roofline in zip(places, shown, strict=False):
            _names(panel, roofline, gpu)


def _roofline(panel: Any, roofline: Roofline, gpu: GPU, times: str) -> None:
    points = [point for point in roofline.points if point.operations]
    panel.set_xscale("log")
    panel.set_yscale("log")
    rates = [point.reached(gpu) / 1e12 for point in points]
    intensities = [point.intensity for point in points]
    ridge = gpu.bf16 / gpu.bandwidth
    low, high = min([*intensities, ridge]) / 3, max([*intensities, ridge]) * 4
    memory = low * gpu.bandwidth / 1e12
    for name, rate, dashes in (("bf16", gpu.bf16, "-"), ("tf32", gpu.tf32, ":")):
        panel.plot(
            [low, rate / gpu.bandwidth, high],
            [memory, rate / 1e12, rate / 1e12],
            color="black",
            linestyle=dashes,
            linewidth=1.2,
            label=f"roof of {gpu.name}, {name} (datasheet)",
        )
    timed = any(point.time_us is not None for point in points)
    how = times if timed else AT_MOST
    for point, rate in zip(points, rates, strict=True):
        top = point.highest(gpu) / 1e12
        panel.plot([point.intensity] * 2, [rate, top], color="#bbbbbb", linewidth=0.8)
    panel.plot(
        intensities,
        rates,
        linestyle="",
        marker={MEASURED: "o", ESTIMATED: "D", AT_MOST: "x"}[how],
        markerfacecolor="white" if how == ESTIMATED else COLOURS[1],
        markeredgecolor=COLOURS[1],
        label=how,
    )
    panel.set_xlim(low, high)
    bottom, top = min([*rates, gpu.bf16 / 1e12 / 30]) / 4, gpu.bf16 / 1e12 * 3
    panel.set_ylim(bottom, top)
    panel.set_xlabel("operations a byte")
    panel.set_ylabel(f"TFLOP/s, {'estimated' if how == ESTIMATED else how}")
    without = [point.name for point in roofline.points if not point.operations]
    note = f"\nno products, so not shown: {', '.join(without)}" if without else ""
    panel.set_title(f"{roofline.title}{note}")


def _names(panel: Any, roofline: Roofline, gpu: GPU) -> None:
    points = [point for point in roofline.points if point.operations]
    spots = [(point.intensity, point.reached(gpu) / 1e12) for point in points]
    label_points(panel, spots, [_told(point, gpu) for point in points])


def _told(point: Point, gpu: GPU) -> str:
    if point.time_us is None:
        return point.name
    share = point.reached(gpu) / point.highest(gpu)
    of_roof = f"{share:.0%}" if share >= 0.01 else "<1%"
    return f"{point.name}: {point.time_us:.0f} µs, {of_roof} of the roof"


def _speedups(panel: Any, speedups: Sequence[tuple[str, float]]) -> None:
    if not speedups:
        panel.set_axis_off()
        return
    names = [name for name, _ in speedups]
    values = [value for _, value in speedups]
    bars = panel.barh(range(len(names)), values, color=COLOURS[0])
    panel.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.axvline(1.0, color="black", linewidth=1.2)
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    panel.margins(x=0.12)
    panel.set_xlabel("times faster than the rival")


def draw_shares(
    path: Path,
    title: str,
    layers: Sequence[tuple[str, float, float]],
    left: Sequence[tuple[str, float]],
    cost: str,
) -> None:
    """Draw bars: what layers hold of the parameters, and what they cost of a step.

    Args:
        path: of the picture.
        title: above both.
        layers: name, share of the parameters, share of the step.
        left: name and share of the parameters of what the fallback updates.
        cost: what a step's shares are of.
    """
    names = [*(name for name, *_ in layers), *(name for name, _ in left)]
    with picture(path, title, (11.0, 1.6 + 0.28 * len(names))) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        own = range(len(layers))
        rest = range(len(layers), len(names))
        held = [share for _, share, _ in layers]
        _bars(panels[0], own, held, COLOURS[0], "FROG")
        _bars(panels[0], rest, [s for _, s in left], COLOURS[6], "the fallback")
        _bars(panels[1], own, [share for *_, share in layers], COLOURS[1], "")
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.4, -0.6)
        panels[0].set_title("share of the parameters, by who updates them")
        panels[1].set_title(f"{cost}\n(datasheet rates; nothing was timed)")
        panels[1].set_visible(bool(layers))
        if layers and left:
            figure.legend(loc="upper right", ncols=2)
        for panel in panels:
            panel.margins(x=0.14)
            panel.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
            panel.grid(axis="y", visible=False)


def _bars(
    panel: Any, places: Sequence[int], shares: Sequence[float], colour: str, label: str
) -> None:
    bars = panel.barh(places, shares, color=colour, label=label)
    texts = [_percent(share) for share in shares]
    panel.bar_label(bars, texts, padding=3, fontsize=8)


def _percent(share: float) -> str:
    if not share:
        return ""
    return f"{share:.1%}" if share >= 0.001 else "<0.1%"
