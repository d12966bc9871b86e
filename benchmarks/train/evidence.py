"""What the runs of all problems say: tables, pictures and JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..pictures import looks, picture
from . import pace, report
from .loop import Run
from .ranks import Standing, profile, standings
from .suite import TOO_LARGE
from .workload import Workload

LINES = "runs.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What an optimizer did on a problem.

    Attributes:
        workload: the problem.
        runs: at its best rate.
        strained: at three times that.
    """

    workload: Workload
    runs: Sequence[Run]
    strained: Sequence[Run]

    @property
    def finals(self) -> list[float]:
        """The metric at the end, as a cost."""
        sign = -1 if self.runs[0].higher_is_better else 1
        return [sign * run.final for run in self.runs]

    def to_target(self, target: float) -> tuple[float, float]:
        """Median steps and seconds; infinite if half of the runs missed it."""
        cell = report.median_first(self.runs, target)
        return cell or (math.inf, math.inf)

    @property
    def diverged(self) -> int:
        """Runs at its best rate that did."""
        return sum(run.diverged for run in self.runs)

    @property
    def survived(self) -> int:
        """Runs at three times the best rate that reached the easiest target."""
        easiest = self.workload.targets[0]
        return sum(
            not run.diverged and run.first(easiest) is not None for run in self.strained
        )


def outcomes(workload: Workload, runs: Sequence[Run]) -> dict[str, Outcome]:
    """What came of each optimizer whose runs have come to an end.

    Args:
        workload: the problem.
        runs: all that were made.
    """
    found = {}
    for peer, mine in report.by_peer(runs).items():
        long = [run for run in mine if run.settings["epochs"] == workload.epochs]
        if long:
            at_best = report.at_best(long, None)
            lr = TOO_LARGE * at_best[0].lr
            strained = [
                run
                for run in mine
                if math.isclose(run.lr, lr)
                and run.settings["epochs"] == workload.grid_epochs
                and run.seed
            ]
            found[peer] = Outcome(workload, at_best, strained)
    return found


def gather(out: Path, workloads: Sequence[Workload]) -> dict[str, dict[str, Outcome]]:
    """Outcomes by problem and optimizer, of all problems that have any.

    Args:
        out: the folder with one folder for each problem.
        workloads: the problems.
    """
    paces, found = pace.read(out), {}
    for workload in workloads:
        runs = report.read(out / workload.name / LINES)
        found[workload.name] = outcomes(
            workload, pace.at(paces.get(workload.name, {}), runs)
        )
    return {name: own for name, own in found.items() if own}


def complete(
    found: Mapping[str, Mapping[str, Outcome]],
) -> dict[str, dict[str, Outcome]]:
    """Those of optimizers that were run on every problem, in the order of the first."""
    common = [
        peer
        for peer in next(iter(found.values()), {})
        if all(peer in own for own in found.values())
    ]
    return {name: {peer: own[peer] for peer in common} for name, own in found.items()}


MEASURES: dict[str, Callable[[Outcome], list[float]]] = {
    "final value": lambda outcome: outcome.finals,
    "steps to the middle target": lambda outcome: _firsts(outcome, 0),
    "seconds to the middle target": lambda outcome: _firsts(outcome, 1),
}
"""What ranks are of: a cost for each seed."""


def _firsts(outcome: Outcome, part: int) -> list[float]:
    target = outcome.workload.deciding_target
    hits = [run.first(target) for run in outcome.runs]
    return [math.inf if hit is None else float(hit[part]) for hit in hits]


def ranked(
    found: Mapping[str, Mapping[str, Outcome]],
) -> dict[str, list[Standing]]:
    """Standings by each of `MEASURES`."""
    return {
        name: standings(
            {
                problem: {peer: measure(outcome) for peer, outcome in own.items()}
                for problem, own in found.items()
            }
        )
        for name, measure in MEASURES.items()
    }


def rank_rows(
    found: Mapping[str, Mapping[str, Outcome]], ranked: Mapping[str, Sequence[Standing]]
) -> list[list[str]]:
    """A header, and a row for each optimizer, the best mean rank first."""
    table = [
        [
            "optimizer",
            *(f"mean rank by {name}" for name in ranked),
            "first on",
            "survived 3x",
            "diverged",
        ]
    ]
    by_peer = {name: {s.peer: s for s in found} for name, found in ranked.items()}
    first = next(iter(ranked.values()), [])
    for standing in first:
        peer = standing.peer
        mine = [own[peer] for own in found.values()]
        strained = sum(len(outcome.strained) for outcome in mine)
        runs = sum(len(outcome.runs) for outcome in mine)
        table.append(
            [
                peer,
                *(
                    f"{s.mean:.2f} ({s.low:.2f} - {s.high:.2f})"
                    for s in (by_peer[name][peer] for name in ranked)
                ),
                f"{standing.wins} of {len(mine)}",
                f"{sum(outcome.survived for outcome in mine)} of {strained}",
                f"{sum(outcome.diverged for outcome in mine)} of {runs}",
            ]
        )
    return table


def value_rows(found: Mapping[str, Mapping[str, Outcome]]) -> list[list[str]]:
    """A header, and the median final values, a row for each problem."""
    peers = list(next(iter(found.values()), {}))
    table = [["problem", "metric", *peers]]
    for name, own in found.items():
        best = min(statistics.median(outcome.finals) for outcome in own.values())
        cells = []
        for outcome in own.values():
            middle = statistics.median(outcome.finals)
            text = _value(outcome)
            cells.append(f"**{text}**" if middle == best else text)
        metric = next(iter(own.values())).runs[0].metric
        table.append([name, metric, *cells])
    return table


def _value(outcome: Outcome) -> str:
    if outcome.diverged * 2 > len(outcome.runs):
        return "diverged"
    first = outcome.runs[0]
    return report.show(statistics.median(r.final for r in outcome.runs), first.metric)


def step_rows(found: Mapping[str, Mapping[str, Outcome]]) -> list[list[str]]:
    """A header, and milliseconds a step, a row for each problem."""
    peers = list(next(iter(found.values()), {}))
    table = [["problem", *peers]]
    for name, own in found.items():
        table.append(
            [name, *(f"{report.step_ms(outcome.runs):.0f}" for outcome in own.values())]
        )
    return table


def problem_rows(own: Mapping[str, Outcome]) -> list[list[str]]:
    """A header, and a row for each optimizer, with what happens at three times."""
    runs = [run for outcome in own.values() for run in outcome.runs]
    targets = next(iter(own.values())).workload.targets
    table = report.detailed_rows(runs, targets)
    table[0] += ["at three times the rate", "survived that"]
    for row, outcome in zip(table[1:], own.values(), strict=True):
        metric = runs[0].metric
        ends = [run.final for run in outcome.strained]
        row += [
            report.spread(ends, metric) if ends else "-",
            f"{outcome.survived} of {len(ends)}",
        ]
    return table


FACTORS = [1 + i / 50 for i in range(151)]
"""Of the profiles: up to four times the best, as in AlgoPerf."""


def profiles(
    found: Mapping[str, Mapping[str, Outcome]], part: int
) -> dict[str, list[float]]:
    """Performance profiles over all problems and all of their targets.

    Args:
        found: the outcomes.
        part: 0 for steps, 1 for seconds.
    """
    cases = [
        {peer: outcome.to_target(target)[part] for peer, outcome in own.items()}
        for own in found.values()
        for target in next(iter(own.values())).workload.targets
    ]
    return profile(cases, FACTORS)


def draw(
    path: Path,
    found: Mapping[str, Mapping[str, Outcome]],
    standings: Sequence[Standing],
) -> None:
    """Mean ranks with their intervals, and the profiles in steps and seconds."""
    title = f"{len(found)} small problems, each optimizer at its best of equal grids"
    with picture(path, title, (11.5, 4.8)) as figure:
        left, *right = figure.subplots(1, 3, width_ratios=(1, 1.1, 1.1))
        look = dict(
            zip((s.peer for s in standings), looks(len(standings)), strict=True)
        )
        for place, s in enumerate(standings):
            colour = look[s.peer]["color"]
            left.plot([s.low, s.high], [place, place], color=colour, linewidth=2)
            left.plot([s.mean], [place], "o", color=colour)
        left.set_yticks(range(len(standings)), [s.peer for s in standings])
        left.invert_yaxis()
        left.set_xlabel("mean rank by final value, 95 %")
        for part, (panel, unit) in enumerate(
            zip(right, ("steps", "seconds"), strict=True)
        ):
            for peer, shares in profiles(found, part).items():
                panel.plot(FACTORS, shares, label=peer, linewidth=1.8, **look[peer])
            panel.set_xlabel(f"within so many times the fewest {unit}")
            panel.set_ylim(-0.02, 1.02)
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        right[0].set_ylabel("share of all targets")
        handles, labels = right[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5)


def write(out: Path, workloads: Sequence[Workload]) -> list[list[str]]:
    """Write all tables and pictures; returns the table of ranks.

    Raises:
        FileNotFoundError: there is no run that has come to an end.
        ValueError: no optimizer was run on all problems that have runs.
    """
    found = gather(out, workloads)
    if not found:
        raise FileNotFoundError(f"{out} holds no run that has come to an end")
    for name, own in found.items():
        (out / name / "table.md").write_text(report.markdown(problem_rows(own)) + "\n")
        runs = [run for outcome in own.values() for run in outcome.runs]
        about = next(iter(own.values())).workload.about
        report.plot(out / name / "curves.png", about, runs)
    shared = complete(found)
    if not all(shared.values()):
        raise ValueError(
            f"no optimizer was run on each of {', '.join(found)}, so there are no "
            "ranks; the same command without --report goes on"
        )
    ranking = ranked(shared)
    table = rank_rows(shared, ranking)
    sections = {
        "Mean ranks": table,
        "Final values": value_rows(shared),
        "Milliseconds a step": step_rows(shared),
    }
    (out / "ranks.md").write_text(
        "\n\n".join(f"## {k}\n\n{report.markdown(v)}" for k, v in sections.items())
        + "\n"
    )
    draw(out / "summary.png", shared, ranking["final value"])
    (out / "ranks.json").write_text(
        json.dumps(_content(shared, ranking), indent=1) + "\n"
    )
    return table


def _content(
    found: Mapping[str, Mapping[str, Outcome]],
    ranking: Mapping[str, Sequence[Standing]],
) -> dict[str, Any]:
    """As JSON can hold it; what was not reached is null."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "ranks": {name: [asdict(s) for s in own] for name, own in ranking.items()},
        "problems": {
            name: {
                peer: {
                    "lr": outcome.runs[0].lr,
                    "finals": [finite(run.final) for run in outcome.runs],
                    "targets": {
                        f"{target:g}": [finite(v) for v in outcome.to_target(target)]
                        for target in outcome.workload.targets
                    },
                    "ms_per_step": finite(report.step_ms(outcome.runs)),
                    "strained": [finite(run.final) for run in outcome.strained],
                    "survived": outcome.survived,
                    "diverged": outcome.diverged,
                }
                for peer, outcome in own.items()
            }
            for name, own in found.items()
        },
    }
