"""``bench stability``: its trials, its verdicts, and the command."""

import json
import math
from dataclasses import replace

import pytest
import torch

from frog_triton.benchmarks.train import stability
from frog_triton.benchmarks.train.loop import SCHEDULES
from frog_triton.benchmarks.train.peers import Peer
from frog_triton.benchmarks.train.stability import OFFERED, Trial, rows, survive
from frog_triton.benchmarks.train.survival_cases import CASES
from frog_triton.cli import main

pytest.importorskip("sklearn")


def _short(name, steps=20):
    return replace(CASES[name], steps=steps)


def _trial(case, peer=OFFERED["AdamW"], rate=1.0, seed=0):
    return Trial(case, case.schedules[-1], rate, peer, seed)


def _outcome(case, peer=OFFERED["AdamW"], **more):
    found = survive(_trial(case, peer, **more))
    return {name: value for name, value in found.items() if name != "seconds"}


@pytest.mark.parametrize("name", ["overfit-mlp", "past-norm", "mlm", "gan"])
def test_case_is_the_same_for_the_same_seed(name):
    case = _short(name)
    first = _outcome(case)
    assert first["finite"] and math.isfinite(first["end"])
    assert _outcome(case) == first and _outcome(case, seed=1)["end"] != first["end"]


@pytest.mark.parametrize("name", CASES)
def test_case_makes_as_many_steps_as_it_says(name):
    case = CASES[name]
    assert sum(1 for _ in case.batches(torch.Generator())) == case.steps
    assert set(case.schedules) <= set(SCHEDULES)


def test_peers_have_their_usual_rates():
    rates = {name: peer.lrs for name, peer in OFFERED.items()}
    frog = rates.pop("FROG")
    assert frog == rates.pop("FROG plain") == rates.pop("FROG paper")
    expected = {"SGD": (0.1,), "AdamW": (1e-3,), "Muon": (0.02,), "SOAP": (3e-3,)}
    assert rates == expected
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    groups = OFFERED["FROG"].optimizer(model, *frog).param_groups
    assert groups[0]["weight_decay"] == stability.FROG(model).defaults["weight_decay"]
    muon = OFFERED["Muon"].optimizer(model, 0.5)
    assert [group["lr"] for group in muon.param_groups] == [0.5, 1e-3]


def test_a_run_that_ends_badly_did_not_survive():
    counted = []
    wild = Peer("wild", OFFERED["SGD"].build, (1e30,))
    case = CASES["overfit-mlp"]
    found = survive(_trial(case, wild), counted.append)
    assert not found["survived"] and not found["finite"] and found["spike"] is None
    assert sum(counted) == case.steps and len(counted) < case.steps
    idle = Peer("idle", OFFERED["SGD"].build, (1e-9,))
    found = survive(_trial(case, idle))
    assert found["finite"] and found["reached"] is None and found["end"] > 2
    assert not found["survived"]


def test_spikes_count_after_the_mark():
    case = replace(CASES["overfit-mlp"], mark=math.inf)
    found = survive(_trial(case))
    assert found["survived"] and found["reached"] == 0 and found["spike"] > 2
    found = survive(_trial(CASES["overfit-mlp"]))
    assert found["survived"] and found["reached"] > 0 and found["spike"] < 0.1


def _entry(peer, rate, seed, survived=True, **more):
    entry = {"case": "c", "schedule": "s", "metric": "loss", "finite": True}
    entry |= {"peer": peer, "rate": rate, "seed": seed, "survived": survived}
    return entry | {"spike": 0.1, "end": 0.02} | more


def test_table():
    table = rows(
        [
            _entry("A", 1.0, 0),
            _entry("A", 1.0, 1, spike=3.0, end=0.03),
            _entry("B", 1.0, 0, survived=False, spike=None, end=2.0),
            _entry("B", 1.0, 1),
            _entry("A", 10.0, 0, survived=False, finite=False, spike=None, end=None),
            {"case": "c", "schedule": "s", "peer": "B", "rate": 10.0, "error": {}},
        ]
    )
    assert table == [
        ["case", "schedule", "rate", "A", "B"],
        ["c", "s", "1x", "ok 3, 0.03", "1/2 0.1, 2"],
        ["c", "s", "10x", "died inf", "error"],
        ["survived", "", "1x", "2/2, 3", "1/2, 0.1"],
        ["survived", "", "10x", "0/1, inf", "0/1, -"],
    ]


def test_command(tmp_path, capsys):
    code = main(
        ["bench", "stability", "--case", "overfit-mlp", "--peers", "AdamW", "SGD"]
        + ["--rates", "1", "10", "--out", str(tmp_path / "made")]
        + ["--plot", str(tmp_path / "fates.png")]
    )
    assert code == 0
    assert (tmp_path / "fates.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "overfit-mlp" in printed and "survived" in printed
    found = json.loads((tmp_path / "made" / "stability.json").read_text())
    assert found["environment"]["torch"]
    runs = {(run["peer"], run["rate"]): run for run in found["results"]}
    assert len(runs) == 4 and runs["AdamW", 10.0]["lr"] == pytest.approx(1e-2)
    assert runs["AdamW", 1.0]["survived"] and not runs["SGD", 10.0]["survived"]
    lines = (tmp_path / "made" / "stability.md").read_text().splitlines()
    assert lines[0] == "| case | schedule | rate | AdamW | SGD |" and len(lines) == 6


def test_files_of_the_callers_choice(tmp_path):
    code = main(
        ["bench", "stability", "--case", "overfit-mlp", "--peers", "SGD", "--rates"]
        + ["1", "--json", str(tmp_path / "a"), "--markdown", str(tmp_path / "b")]
    )
    assert code == 0
    assert json.loads((tmp_path / "a").read_text())["results"][0]["survived"]
    assert "| survived |" in (tmp_path / "b").read_text()


def test_unknown_peer(capsys):
    assert main(["bench", "stability", "--peers", "LBFGS"]) == 2
    assert "no peer is called 'LBFGS'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "none"], "invalid choice"),
        (["--rates", "0"], "must be above 0"),
        (["--seeds", "0"], "must be at least 1"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "stability", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_package_is_named(capsys, monkeypatch):
    absent = replace(OFFERED["SGD"], needs=("no_such_package",))
    monkeypatch.setitem(OFFERED, "SGD", absent)
    assert main(["bench", "stability", "--peers", "SGD"]) == 2
    assert "SGD is left out: it needs no_such_package" in capsys.readouterr().out


def test_results_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    """As where a disk is full."""

    def full(path, text):
        raise OSError("no space left")

    monkeypatch.setattr("frog_triton.benchmarks.records.write_text", full)
    path = str(tmp_path / "a.json")
    assert main(["bench", "stability", "--json", path, "--peers", "SGD"]) == 1
    assert "a.json cannot be written: no space left" in capsys.readouterr().err
