"""Ranks, their intervals, and performance profiles."""

import dataclasses
import math

import numpy as np
import pytest

from frog_triton.benchmarks.train import evidence
from frog_triton.benchmarks.train.loop import Run
from frog_triton.benchmarks.train.problems import PROBLEMS
from frog_triton.benchmarks.train.ranks import profile, ranks, standings


def test_equals_share_a_rank():
    costs = np.array([[3.0, 1.0, 2.0, 2.0, np.inf, np.inf]])
    assert ranks(costs).tolist() == [[4.0, 1.0, 2.5, 2.5, 5.5, 5.5]]


def test_standings_of_one_that_always_wins():
    costs = {
        str(problem): {"A": [2.0, 2.1], "B": [1.0, 1.1], "C": [3.0, np.inf]}
        for problem in range(4)
    }
    first, second, third = standings(costs, draws=200)
    assert [s.peer for s in (first, second, third)] == ["B", "A", "C"]
    assert (first.mean, first.low, first.high, first.wins) == (1, 1, 1, 4)
    assert second.behind == (1, 1) and third.mean == 3


def test_interval_holds_what_problems_disagree_on():
    costs = {
        str(problem): {"A": [float(problem % 2)] * 3, "B": [0.5] * 3}
        for problem in range(10)
    }
    one, other = standings(costs, draws=2000)
    assert one.mean == other.mean == 1.5 and one.wins == other.wins == 5
    # Ten fair coins: the mean of ranks 1 and 2 has a deviation of 0.16, so 95 % lie
    # within 1.2 and 1.8.
    assert one.low == pytest.approx(1.2, abs=0.11)
    assert one.high == pytest.approx(1.8, abs=0.11)
    low, high = other.behind
    assert low < 0 < high


def test_seeds_are_drawn_again():
    costs = {"only": {"A": [0.0, 0.0, 10.0], "B": [5.0, 5.0, 5.0]}}
    first, _ = standings(costs, draws=2000)
    assert first.peer == "A" and (first.low, first.high) == (1, 2)


def test_profile():
    cases = [
        {"A": 10.0, "B": 15.0, "C": math.inf},
        {"A": 40.0, "B": 10.0, "C": math.inf},
        dict.fromkeys("ABC", math.inf),
    ]
    shares = profile(cases, [1.0, 2.0, 4.0])
    assert shares == {"A": [0.5, 0.5, 1.0], "B": [0.5, 1.0, 1.0], "C": [0.0] * 3}
    assert profile(cases[2:], [1.0]) == {}


def _run(peer, lr, seed, epochs, values, diverged=False):
    settings = {"epochs": epochs}
    return Run(
        *(peer, lr, seed, [10, 20], values, [1.0, 2.0]),
        diverged=diverged,
        metric="accuracy",
        settings=settings,
    )


def _found(name):
    """A wins, B loses one of two seeds, C has not come to an end."""
    workload = dataclasses.replace(PROBLEMS[name], targets=(0.3, 0.5, 0.7))
    runs = [
        _run("A", 0.1, 0, 2, [0.2, 0.3]),
        _run("A", 0.1, 1, 4, [0.5, 0.8]),
        _run("A", 0.1, 2, 4, [0.4, 0.6]),
        _run("A", 0.3, 1, 2, [0.1, 0.2]),
        _run("A", 0.3, 0, 2, [0.9, 0.9]),  # of the search
        _run("B", 0.1, 1, 4, [0.3, 0.4]),
        _run("B", 0.1, 2, 4, [0.3, math.nan], diverged=True),
        _run("B", 0.3, 1, 2, [0.3, 0.4]),
        _run("C", 0.1, 0, 2, [0.9, 0.9]),
    ]
    return evidence.outcomes(workload, runs)


def test_outcomes():
    found = _found("vit")
    assert list(found) == ["A", "B"]
    a, b = found["A"], found["B"]
    assert a.finals == [-0.8, -0.6] and a.to_target(0.7) == (math.inf, math.inf)
    assert a.to_target(0.5) == (15, 1.5)
    assert (a.survived, len(a.strained)) == (0, 1)
    assert (b.survived, len(b.strained), b.diverged) == (1, 1, 1)


def test_tables_and_files(tmp_path, monkeypatch):
    found = {"vit": _found("vit"), "depthwise": _found("depthwise")}
    ranking = evidence.ranked(found)
    header, *rows = evidence.rank_rows(found, ranking)
    first = dict(zip(header, rows[0], strict=True))
    assert first["optimizer"] == "A" and first["first on"] == "2 of 2"
    assert first["mean rank by final value"] == "1.00 (1.00 - 1.00)"
    assert first["survived 3x"] == "0 of 2" and first["diverged"] == "0 of 4"
    header, *rows = evidence.value_rows(found)
    assert rows[0] == ["vit", "accuracy", "**70.00%**", "20.00%"]
    assert evidence.step_rows(found)[1] == ["vit", "100", "100"]
    monkeypatch.setattr(evidence, "gather", lambda out, workloads: found)
    for name in found:
        (tmp_path / name).mkdir()
    evidence.write(tmp_path, [])
    for name in ("ranks.md", "ranks.json", "summary.png", "vit/table.md"):
        assert (tmp_path / name).stat().st_size > 100


def test_only_who_ran_everywhere_is_ranked():
    found = {"vit": _found("vit"), "depthwise": _found("depthwise")}
    del found["depthwise"]["B"]
    assert all(list(own) == ["A"] for own in evidence.complete(found).values())


def test_without_a_common_optimizer_there_are_no_ranks(tmp_path, monkeypatch):
    found = {"vit": _found("vit"), "depthwise": _found("depthwise")}
    del found["vit"]["A"], found["depthwise"]["B"]
    monkeypatch.setattr(evidence, "gather", lambda out, workloads: found)
    for name in found:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="no optimizer was run on each of vit, dep"):
        evidence.write(tmp_path, [])
    assert (tmp_path / "vit" / "table.md").exists()
