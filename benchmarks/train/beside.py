"""Variants of FROG, each ranked alone among all other optimizers.

The variants of a study would push each other, and everybody else, down one ranking. So
each takes FROG's place among the optimizers of another suite, in turn.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import report
from .evidence import Outcome, complete, gather
from .ranks import Standing, standings
from .workload import Workload

OURS = "FROG"
FILE = "beside.md"

Outcomes = Mapping[str, Mapping[str, Outcome]]
"""By problem and optimizer."""


def write(
    out: Path, suite: Path, chosen_on: Sequence[Workload], all_: Sequence[Workload]
) -> list[list[str]]:
    """Write both tables; returns that of ranks.

    Args:
        out: the study's folder.
        suite: that of all optimizers.
        chosen_on: problems that ranks are over.
        all_: problems that values are told of.

    Raises:
        FileNotFoundError: one of the folders holds no run that has come to an end.
    """
    both = [gather(folder, all_) for folder in (out, suite)]
    for folder, found in zip((out, suite), both, strict=True):
        if not found:
            raise FileNotFoundError(f"{folder} holds no run that has come to an end")
    variants, others = both
    names = [w.name for w in chosen_on if w.name in variants and w.name in others]
    ranked = rank_rows(
        {name: variants[name] for name in names}, {name: others[name] for name in names}
    )
    sections = {
        f"Mean ranks over {', '.join(names)}": ranked,
        "Final values": value_rows(variants, others),
    }
    text = (f"## {title}\n\n{report.markdown(t)}\n" for title, t in sections.items())
    (out / FILE).write_text("\n".join(text))
    return ranked


def rank_rows(variants: Outcomes, others: Outcomes) -> list[list[str]]:
    """A header, and a row for each variant that was run everywhere, the best first.

    Args:
        variants: on the problems that ranks are over.
        others: all optimizers, on the same.
    """
    found = []
    for name in complete(variants)[next(iter(variants))]:
        costs = {
            problem: {name: own[name].finals, **_finals(others[problem])}
            for problem, own in variants.items()
        }
        standing = standings(costs, ahead=name)
        mine = next(s for s in standing if s.peer == name)
        second = next(s for s in standing if s.peer != name)
        found.append((mine.mean, [name, *_cells(mine, second)]))
    found.sort(key=lambda pair: pair[0])
    header = ["line", "mean rank by final value", "the best other", "is behind by"]
    table = [[*header, "better than the defaults on"]]
    return table + [[*row, _better(row[0], variants)] for _, row in found]


def _finals(own: Mapping[str, Outcome]) -> dict[str, list[float]]:
    return {peer: outcome.finals for peer, outcome in own.items() if peer != OURS}


def _cells(mine: Standing, second: Standing) -> list[str]:
    return [
        f"{mine.mean:.2f} ({mine.low:.2f} - {mine.high:.2f})",
        f"{second.peer}, {second.mean:.2f}",
        f"{second.behind[0]:.2f} to {second.behind[1]:.2f}",
    ]


def _better(name: str, variants: Outcomes) -> str:
    """On how many problems the seeds' mean is better than that of the defaults."""
    mean = statistics.fmean
    both = [own for own in variants.values() if OURS in own]
    count = sum(mean(own[name].finals) < mean(own[OURS].finals) for own in both)
    return "-" if name == OURS else f"{count} of {len(both)}"


def value_rows(variants: Outcomes, others: Outcomes) -> list[list[str]]:
    """A header, and the mean over the seeds of each variant, then of others.

    Others have looked for their rates. A cell is empty where a variant has not yet as
    many runs as the defaults.
    """
    problems = [name for name in others if name in variants]
    seeds = {p: len(variants[p][OURS].runs) for p in problems if OURS in variants[p]}
    table = [["line", *problems]]
    for found, told in ((variants, "{}"), (others, "{}, searched")):
        names = dict.fromkeys(peer for own in found.values() for peer in own)
        for name in names:
            if found is variants or name != OURS:
                cells = (_mean(found[p].get(name), seeds.get(p, 1)) for p in problems)
                table.append([told.format(name), *cells])
    return table


def _mean(outcome: Outcome | None, seeds: int) -> str:
    if outcome is None or len(outcome.runs) < seeds:
        return ""
    runs = outcome.runs
    value = statistics.fmean(run.final for run in runs)
    text = f"{value:.4f}" if value < 0.1 else report.show(value, runs[0].metric)
    return text if math.isfinite(value) else "diverged"
