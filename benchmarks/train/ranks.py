"""Optimizers ranked over problems, with intervals, and the share they nearly win."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Costs = Mapping[str, Mapping[str, Sequence[float]]]
"""Problem, optimizer, and a cost a seed: less is better, infinity is a failure."""

DRAWS = 5000


def ranks(costs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks along the last axis, from 1; equals share the mean of theirs."""
    mine, other = costs[..., :, None], costs[..., None, :]
    ranked: NDArray[np.float64] = (
        0.5 + (other < mine).sum(-1) + (other == mine).sum(-1) / 2
    )
    return ranked


@dataclass(frozen=True)
class Standing:
    """An optimizer's mean rank over problems.

    Attributes:
        peer: the optimizer.
        mean: of its ranks by the median of the seeds.
        low: of 95 % of the mean ranks that redrawn problems and seeds give.
        high: likewise.
        behind: low and high of how far it is behind the first, or who is asked for,
            in the same draws.
        wins: problems on which it is first, alone or with others.
    """

    peer: str
    mean: float
    low: float
    high: float
    behind: tuple[float, float]
    wins: int


def standings(
    costs: Costs, draws: int = DRAWS, ahead: str | None = None
) -> list[Standing]:
    """All optimizers by mean rank, the best first.

    Intervals are of a bootstrap: problems are drawn again with replacement, and on each
    the seeds of each optimizer.

    Args:
        costs: of the same optimizers on every problem.
        draws: of the bootstrap.
        ahead: whom all others are compared with; None: the first.
    """
    peers = list(next(iter(costs.values())))
    random = np.random.default_rng(0)
    own = np.array([[np.median(on[p]) for p in peers] for on in costs.values()])
    placed = ranks(own)
    redrawn = np.stack(
        [
            ranks(np.stack([_medians(on[p], draws, random) for p in peers], -1))
            for on in costs.values()
        ]
    )  # (problems, draws, peers)
    chosen = random.integers(0, len(costs), (len(costs), draws))
    means = redrawn[chosen, np.arange(draws)].mean(0)
    order = np.argsort(placed.mean(0), kind="stable")
    first = order[0] if ahead is None else peers.index(ahead)
    behind = means - means[:, [first]]
    found = []
    for i in order:
        low, high = np.percentile(means[:, i], (2.5, 97.5))
        near, far = np.percentile(behind[:, i], (2.5, 97.5))
        wins = int((own[:, i] == own.min(1)).sum())
        mean = float(placed.mean(0)[i])
        interval = (float(near), float(far))
        found.append(Standing(peers[i], mean, float(low), float(high), interval, wins))
    return found


def _medians(
    costs: Sequence[float], draws: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """Of the seeds, drawn again and again."""
    drawn = random.integers(0, len(costs), (draws, len(costs)))
    medians: NDArray[np.float64] = np.median(np.asarray(costs)[drawn], 1)
    return medians


def profile(
    costs: Sequence[Mapping[str, float]], factors: Sequence[float]
) -> dict[str, list[float]]:
    """The share of cases in which an optimizer is within so many times the best.

    This is the performance profile by which AlgoPerf scores: Dolan and More,
    "Benchmarking optimization software with performance profiles", 2002.

    Args:
        costs: of each case, by optimizer; infinity: it did not get there. Cases in
            which none did are left out.
        factors: times the best.
    """
    cases = [case for case in costs if min(case.values()) < np.inf]
    return {
        peer: [
            float(np.mean([case[peer] <= f * min(case.values()) for case in cases]))
            for f in factors
        ]
        for peer in (cases[0] if cases else [])
    }
