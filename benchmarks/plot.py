"""Pictures of benchmark results: speed-ups as bars, kernels under a roofline."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..kernels.gpu import GPU

Points = Sequence[tuple[str, int, int, float | None]]


def try_to_draw(
    path: Path,
    title: str,
    points: Points,
    gpu: GPU,
    speedups: Sequence[tuple[str, float]] = (),
) -> None:
    """As `draw`; a picture that cannot be made costs no result, only a warning."""
    if not points:
        return
    try:
        draw(path, title, points, gpu, speedups)
    except (ImportError, OSError) as error:
        print(f"no picture in {path}: {error}", file=sys.stderr)


def draw(
    path: Path,
    title: str,
    points: Points,
    gpu: GPU,
    speedups: Sequence[tuple[str, float]] = (),
) -> None:
    """Draw a roofline with each kernel on it, and speed-ups where there are any.

    Args:
        path: of the PNG.
        title: above both.
        points: name, operations, bytes, and microseconds if they were measured; else
            the point lies on the roof, where no kernel can be above it.
        gpu: whose roof.
        speedups: name, and how many times faster than the rival.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, 2 if speedups else 1, figsize=(11 if speedups else 7, 5), squeeze=False
    )
    roof = axes[0, 0]
    intensities = [max(ops, 1) / moved for _, ops, moved, _ in points]
    low, high = min(*intensities, 1.0) / 2, max(*intensities, 1000.0) * 2
    ridge = gpu.bf16 / gpu.bandwidth
    roof.loglog(
        [low, ridge, high],
        [low * gpu.bandwidth / 1e12, gpu.bf16 / 1e12, gpu.bf16 / 1e12],
        color="black",
        label=f"{gpu.name}, bf16 (datasheet)",
    )
    for (name, ops, _, measured), intensity in zip(points, intensities, strict=True):
        reached = min(intensity * gpu.bandwidth, gpu.bf16)
        if measured is not None:
            reached = max(ops, 1) / (1e-6 * measured)
        roof.plot(intensity, reached / 1e12, "o" if measured else "x")
        roof.annotate(name, (intensity, reached / 1e12), fontsize=6)
    roof.set_xlabel("operations a byte")
    measured_any = any(time is not None for *_, time in points)
    what = "reached" if measured_any else "at most (nothing was timed)"
    roof.set_ylabel(f"TFLOP/s {what}")
    roof.legend(loc="lower right")
    if speedups:
        bars = axes[0, 1]
        names = [name for name, _ in speedups]
        bars.barh(names, [value for _, value in speedups])
        bars.axvline(1.0, color="black")
        bars.invert_yaxis()
        bars.set_xlabel("times faster than the rival")
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
