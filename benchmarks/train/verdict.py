"""Who got as far sooner, and by how much."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .loop import Run


@dataclass(frozen=True)
class Lead:
    """How much sooner one optimizer got as far as another did.

    Both are held to what the worse of them had in the end, which both have reached.

    Attributes:
        peer: the other.
        seconds: its seconds to there over ours; below 1 it was sooner. Median of the
            seeds, as is what follows.
        steps: likewise.
        ours: our seconds to there.
        others: the other's.
    """

    peer: str
    seconds: float
    steps: float
    ours: float
    others: float

    def __str__(self) -> str:
        """For a table: times sooner in seconds and in steps."""
        if self.seconds == math.inf:
            return "it diverged"
        return f"{self.seconds:.1f}x, {self.steps:.1f}x"


def leads(runs: Sequence[Run], ours: str = "FROG") -> list[Lead]:
    """The lead of one optimizer over each other one, over the seeds of both.

    Args:
        runs: of all of them, each with the same seeds.
        ours: its name.
    """
    mine = {run.seed: run for run in runs if run.peer == ours}
    others = dict.fromkeys(run.peer for run in runs if run.peer != ours)
    found = []
    for peer in others:
        each = [_lead(mine[run.seed], run) for run in runs if run.peer == peer]
        middle = (statistics.median(column) for column in zip(*each, strict=True))
        found.append(Lead(peer, *middle))
    return found


def _lead(ours: Run, other: Run) -> tuple[float, float, float, float]:
    """Fields of a `Lead` for one seed."""
    if other.diverged:
        return math.inf, math.inf, ours.seconds[0], math.inf
    if ours.diverged:
        return 0.0, 0.0, math.inf, other.seconds[0]
    worse = min if ours.higher_is_better else max
    level = worse(ours.final, other.final)
    our_hit, other_hit = ours.first(level), other.first(level)
    assert our_hit is not None and other_hit is not None
    return (
        other_hit[1] / our_hit[1],
        other_hit[0] / our_hit[0],
        our_hit[1],
        other_hit[1],
    )


def sentence(leads: Iterable[Lead], ours: str = "FROG") -> str:
    """The verdict, in seconds, on each of the others."""
    ahead, level, behind, diverged = [], [], [], []
    for lead in leads:
        if lead.seconds == math.inf:
            diverged.append(f"{lead.peer} diverged")
        elif 0.95 < lead.seconds < 1.05:
            level.append(f"{lead.peer} was level")
        elif lead.seconds > 1:
            ahead.append(
                f"as {lead.peer} {lead.seconds:.1f} times sooner "
                f"({lead.ours:.1f} s, not {lead.others:.1f})"
            )
        else:
            times = "" if not lead.seconds else f" {1 / lead.seconds:.1f} times"
            behind.append(f"{lead.peer} got as far as {ours}{times} sooner")
    parts = [f"{ours} got as far {_listed(ahead)}"] if ahead else []
    return "; ".join([*parts, *level, *behind, *diverged]) + "."


def _listed(parts: Sequence[str]) -> str:
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
