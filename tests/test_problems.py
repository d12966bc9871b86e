"""The small problems, and the command that runs all of them."""

import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from frog_triton.benchmarks.train import bench, every, evidence, pace, report
from frog_triton.benchmarks.train.data import program_text, prose
from frog_triton.benchmarks.train.loop import Run
from frog_triton.benchmarks.train.models import Block
from frog_triton.benchmarks.train.muon import HostMuon
from frog_triton.benchmarks.train.peers import PEERS, Peer
from frog_triton.benchmarks.train.problems import PROBLEMS, gan, lora, poisson, unet
from frog_triton.benchmarks.train.suite import Campaign, Ledger, Place, run_all
from frog_triton.cli import output

HOST = torch.device("cpu")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "toy.npz"
    y = np.arange(80) % 4
    x = np.random.default_rng(0).integers(0, 256, (80, 32, 32, 3)).astype(np.uint8)
    np.savez(path, train_x=x, train_y=y, test_x=x[:20], test_y=y[:20])
    return path


def _needs(workload):
    for package in (*workload.needs, "sklearn"):
        pytest.importorskip(package)


@pytest.mark.parametrize("name", PROBLEMS)
def test_problem_trains(name, archive, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "STEPS", 2)
    workload = PROBLEMS[name]
    _needs(workload)
    task = workload.task(archive, tmp_path, HOST)
    assert task.device == HOST and task.title
    first, second = (
        next(task.batches(torch.Generator().manual_seed(seed))) for seed in (0, 0)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(0)
    model = task.model()
    before = [param.detach().clone() for param in model.parameters()]
    optimizers = [PEERS["FROG"].optimizer(part, 1e-3) for part in task.parts(model)]
    for optimizer, loss in zip(optimizers, task.losses(model, *first), strict=True):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for (path, new), old in zip(model.named_parameters(), before, strict=True):
        moved = not torch.equal(new, old)
        assert moved == new.requires_grad or "lora_A" in path, path  # B starts at zero
    assert math.isfinite(task.evaluate(model))
    higher = Run("", 0.0, 0, metric=task.metric).higher_is_better
    better = max if higher else min
    easy, middle, hard = workload.targets
    assert better(easy, middle) == middle and better(middle, hard) == hard


def test_all_peers_have_equal_grids():
    for workload in PROBLEMS.values():
        peers = [workload.adapt(peer) for peer in workload.peers]
        assert {len(peer.lrs) for peer in peers} == {5}
        assert {"FROG", "FROG, no Fisher", "Muon"} < {peer.name for peer in peers}


def test_solution_solves_the_equation():
    points = torch.rand(50, 2, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(
        poisson.solution(points).sum(), points, create_graph=True
    )
    bend = sum(
        torch.autograd.grad(slope[:, i].sum(), points, retain_graph=True)[0][:, i]
        for i in range(2)
    )
    # Rounding of float64 times 10 pi^2; measured 3e-14.
    torch.testing.assert_close(-bend, poisson.source_term(points), rtol=0, atol=1e-12)
    _, edge = poisson.Poisson(place=HOST).draw(torch.Generator().manual_seed(0))
    assert ((edge == 0) | (edge == 1)).any(1).all() and edge.unique(dim=0).shape[0] > 60
    assert (poisson.solution(edge).abs() < 1e-5).all()  # measured 3e-7


def test_poissons_loss_vanishes_at_the_solution():
    class Exact(nn.Module):
        def forward(self, points):
            return poisson.solution(points)[:, None]

    task = poisson.Poisson(place=HOST)
    loss = task.loss(Exact(), *task.draw(torch.Generator().manual_seed(0)))
    # Squares of float32 rounding of second derivatives near 50; measured 3e-11.
    assert loss < 1e-9 and task.score(Exact()) == 0


def test_distance_of_a_perfect_forger_is_small():
    task = gan.Ring(place=HOST)

    class Fake(gan.Pair):
        def __init__(self, points):
            super().__init__()
            self.forger = nn.Identity()
            self.forger.forward = lambda noise: points

    real, _ = task._draw(1024, torch.Generator().manual_seed(7))
    apart = task.score(Fake(torch.zeros(1024, 2)))
    # Two samples of 1,024 points differ by chance: measured 0.002; a collapsed forger
    # by about 0.7.
    assert 0 <= task.score(Fake(real)) < 0.01 < 0.5 < apart


def test_denoising_is_judged_in_decibels():
    photo = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0))
    task = unet.Denoising(place=HOST, learned=photo, other=photo)
    # Noise of 0.2 left as it is: -20 log10 0.2 = 13.98, within chance; measured 13.97.
    assert task.score(nn.Identity()) == pytest.approx(13.98, abs=0.1)


def test_texts_share_an_alphabet_and_held_out_parts_are_apart():
    pytest.importorskip("sklearn")
    code, words = program_text(5_000, 2_000), prose(1_500)
    assert code.characters == words.characters and len(code.characters) == 96
    assert (len(code.train), len(code.test), len(words.test)) == (5_000, 2_000, 1_500)
    everything = "".join(code.characters[i] for i in code.train)
    held_out = "".join(code.characters[i] for i in code.test)
    assert held_out[:500] not in everything


def test_a_block_that_looks_both_ways():
    torch.manual_seed(0)
    x = torch.randn(1, 5, 8)
    changed = x.clone()
    changed[0, 4] = torch.randn(8)
    for is_causal in (True, False):
        block = Block(8, 2, is_causal=is_causal)
        assert torch.allclose(block(x)[0, 0], block(changed)[0, 0]) == is_causal


def test_muon_on_a_host_is_torchs():
    torch.manual_seed(0)
    starts = [torch.randn(12, 7), torch.randn(5, 9)]
    ours, torchs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    pair = (
        HostMuon(ours, lr=0.1, weight_decay=0.1),
        torch.optim.Muon(torchs, lr=0.1, weight_decay=0.1),
    )
    for _ in range(3):
        for mine, other in zip(ours, torchs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for mine, other in zip(ours, torchs, strict=True):
        # Torch's products are in bfloat16: three steps of entries near 0.04 each,
        # rounded to 3 digits; measured 1.2e-3.
        torch.testing.assert_close(mine, other, rtol=0, atol=5e-3)


def test_adamw_at_muons_scale():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 2))
    before = model[0].weight.detach().clone()
    optimizer = PEERS["AdamW, Muon's scale"].optimizer(model, 0.1, 0.0)
    model(torch.randn(8, 16)).square().sum().backward()
    optimizer.step()
    moved = (model[0].weight - before).abs()
    # The first step of Adam has entries of one: here times 0.1 / sqrt(16).
    assert moved.max().item() == pytest.approx(0.1 / 4, rel=1e-3)


def _campaign(peer, place, seeds=2):
    workload = dataclasses.replace(
        PROBLEMS["gan"], epochs=2, grid_epochs=1, peers=(peer,)
    )
    return Campaign(workload, workload.adapt(peer), None, seeds, place)


def _run(campaigns, out, place):
    ledger = Ledger(out, place)
    run_all(campaigns, ledger, ThreadPoolExecutor(1), 1, output.console())
    return report.read(out / "gan" / "runs.jsonl")


@pytest.fixture
def short_gan(monkeypatch):
    """Ten steps an epoch, in place of 80."""
    make = lambda *_: gan.Ring(place=HOST, batch_size=16, steps_per_epoch=10)  # noqa: E731
    small = dataclasses.replace(PROBLEMS["gan"], task=make)
    monkeypatch.setitem(PROBLEMS, "gan", small)
    from frog_triton.benchmarks.train import suite

    suite._task.cache_clear()
    yield small
    suite._task.cache_clear()


def test_campaign_searches_reports_and_strains(short_gan, tmp_path):
    place = Place(tmp_path, tmp_path, "cpu")
    runs = _run([_campaign(PEERS["AdamW"], place)], tmp_path, place)
    grid, rest = runs[:5], runs[5:]
    assert [run.lr for run in grid] == list(PEERS["AdamW"].lrs)
    assert {(run.seed, run.settings["epochs"]) for run in grid} == {(0, 1)}
    best = min(grid, key=lambda run: run.final).lr
    assert [(r.lr, r.seed, r.settings["epochs"]) for r in rest] == [
        (best, 1, 2),
        (best, 2, 2),
        (3 * best, 1, 1),
        (3 * best, 2, 1),
    ]
    lines = (tmp_path / "gan" / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "gan" / "runs.jsonl").write_text("".join(lines[:6]) + lines[6][:30])
    again = _run([_campaign(PEERS["AdamW"], place)], tmp_path, place)
    assert [run.values for run in again] == [run.values for run in runs]


def test_what_fails_has_diverged(short_gan, tmp_path, monkeypatch):
    def fails(model, **options):
        raise RuntimeError("no such luck")

    peer = Peer("unlucky", fails, (0.1,))
    monkeypatch.setitem(PROBLEMS, "gan", dataclasses.replace(short_gan, peers=(peer,)))
    place = Place(tmp_path, tmp_path, "cpu")
    runs = _run([_campaign(peer, place)], tmp_path, place)
    assert all(r.diverged and r.final == math.inf for r in runs) and len(runs) == 4
    assert runs[0].error == "RuntimeError: no such luck"
    ours = evidence.outcomes(
        dataclasses.replace(short_gan, epochs=2, grid_epochs=1), runs
    )
    rows = evidence.problem_rows(ours)
    row = dict(zip(rows[0], rows[1], strict=True))
    assert row["survived that"] == "0 of 2" and row["optimizer"] == "unlucky"


def test_command_runs_all(tmp_path, capsys):
    few = ["all", "--problems", "gan", "--peers", "SGD", "--lrs", "0.01"]
    few += ["--seeds", "1", "--out", str(tmp_path)]
    assert bench.main([*few, "--workers", "1"]) == 0
    runs = report.read(tmp_path / "gan" / "runs.jsonl")
    assert [(run.lr, run.settings["epochs"]) for run in runs] == [(0.01, 4), (0.03, 2)]
    assert runs[0].environment["threads"] == 1
    printed = capsys.readouterr().out
    assert "mean rank" in printed and "SGD" in printed
    for picture in ("summary.png", "gan/curves.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "ranks.json").read_text())
    assert content["problems"]["gan"]["SGD"]["lr"] == 0.01
    (tmp_path / "ranks.md").unlink()
    assert bench.main([*few, "--report"]) == 0
    assert "## Mean ranks" in (tmp_path / "ranks.md").read_text()


def _written(folder, finals):
    """Runs of one seed each at the end of `gan`, by optimizer."""
    lines = folder / "gan" / "runs.jsonl"
    for peer, values in finals.items():
        for seed, value in enumerate(values, 1):
            run = Run(peer, 0.1, seed, [4], [value], [1.0], metric="energy distance")
            run.settings = {"epochs": PROBLEMS["gan"].epochs, "seed": seed}
            report.append(lines, run)


def test_variants_are_ranked_one_by_one_among_others(tmp_path, capsys):
    study, suite = tmp_path / "study", tmp_path / "suite"
    for folder in (study, suite):
        (folder / "gan").mkdir(parents=True)
    _written(study, {"FROG": [2.0], "bold": [1.0], "timid": [4.0]})
    _written(suite, {"FROG": [9.0], "SOAP": [3.0], "SGD": [5.0, 5.0]})
    command = ["all", "--study", "lines", "--out", str(study), "--beside", str(suite)]
    assert bench.main([*command, "--report", "--problems", "gan"]) == 0
    assert "bold" in capsys.readouterr().out
    text = (study / "beside.md").read_text()
    rows = [[c.strip() for c in row.split("|")[1:-1]] for row in text.splitlines()]
    ranks = {row[0]: row[1:] for row in rows if len(row) == 5}
    # The others are SOAP and SGD, of which each variant sees none of the variants.
    one, last = "1.00 (1.00 - 1.00)", "2.00 (2.00 - 2.00)"
    assert ranks["bold"] == [one, "SOAP, 2.00", "1.00 to 1.00", "1 of 1"]
    assert ranks["FROG"] == [one, "SOAP, 2.00", "1.00 to 1.00", "-"]
    assert ranks["timid"] == [last, "SOAP, 1.00", "-1.00 to -1.00", "0 of 1"]
    values = [row for row in rows if len(row) == 2 and row[0] != "---"]
    assert values[1:] == [
        [p, f"{v:.3f}"]
        for p, v in (
            ("FROG", 2),
            ("bold", 1),
            ("timid", 4),
            ("SOAP, searched", 3),
            ("SGD, searched", 5),
        )
    ]


def test_seconds_are_steps_at_a_pace_taken_alone(tmp_path, capsys):
    few = ["all", "--problems", "gan", "--lrs", "0.01", "--out", str(tmp_path)]
    assert bench.main([*few, "--peers", "SGD", "--seeds", "1", "--workers", "1"]) == 0
    (tmp_path / "pace.json").write_text('{"ms_per_step": {"lora": {"Lion": 7.0}}}')
    assert bench.main([*few, "--peers", "SGD", "--pace"]) == 0
    paces = json.loads((tmp_path / "pace.json").read_text())
    assert paces["environment"]["threads"] == 1
    assert paces["ms_per_step"]["lora"] == {"Lion": 7.0}
    ms = paces["ms_per_step"]["gan"]["SGD"]
    content = json.loads((tmp_path / "ranks.json").read_text())["problems"]["gan"]
    assert content["SGD"]["ms_per_step"] == pytest.approx(ms)
    (run,) = pace.at({"SGD": 2.0}, report.read(tmp_path / "gan" / "runs.jsonl")[:1])
    assert run.seconds == [step * 0.002 for step in run.steps]
    assert bench.main(["chars-gpt-small", "--pace"]) == 2
    assert "--pace is for all problems" in capsys.readouterr().err


def test_a_pace_leaves_the_first_steps_out():
    run = Run("SGD", 0.1, 0, steps=[10, 20, 30, 40], seconds=[9.0, 9.1, 9.3, 9.6])
    assert pace.of_run(run) == pytest.approx(20)
    assert math.isnan(pace.of_run(Run("SGD", 0.1, 0)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "2"], "--epochs is for one workload"),
        (["--targets", "0.5"], "--targets is for one workload"),
        (["--weight-decays", "2"], "--weight-decays is for one workload"),
        (["--peers", "LBFGS"], "no peer is called 'LBFGS'"),
        (["--report"], "holds no run"),
        (["--beside", "."], "--beside goes with --report"),
        (["--report", "--beside", "."], "holds no run"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, capsys):
    assert bench.main(["all", "--out", str(tmp_path), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_problems_without_their_data_are_left_out(tmp_path, capsys):
    arguments = ["all", "--problems", "vit", "--out", str(tmp_path)]
    assert bench.main(arguments) == 2
    assert "vit is left out: it needs images (--data)" in capsys.readouterr().out


def test_a_missing_package_is_told_of_once(tmp_path, capsys, monkeypatch):
    """Not for each of the problems."""
    monkeypatch.setattr(
        Peer, "missing", lambda peer: ["absent"] if peer.name == "SOAP" else []
    )
    monkeypatch.setattr(every, "run_all", lambda *_: None)
    bench.main(["all", "--peers", "SGD", "SOAP", "--out", str(tmp_path)])
    assert capsys.readouterr().out.count("SOAP is left out: it needs absent") == 1
