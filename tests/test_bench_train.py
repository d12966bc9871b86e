"""``bench train``: peers, runs, and the command on tiny data."""

import copy
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from frog_triton.benchmarks.train import bench, report
from frog_triton.benchmarks.train.data import Dataset, Text, text
from frog_triton.benchmarks.train.loop import SCHEDULES, Job, Run, train
from frog_triton.benchmarks.train.models import GPT, small_cnn
from frog_triton.benchmarks.train.peers import PEERS, Peer, frog_then_sgd, reference
from frog_triton.benchmarks.train.studies import STUDIES
from frog_triton.benchmarks.train.tasks import ImageTask, TextTask
from frog_triton.benchmarks.train.workloads import WORKLOADS

REFERENCE = """
import torch

class Frog(torch.optim.SGD):
    def __init__(self, params, model, lr, momentum, weight_decay):
        assert not any(getattr(m, "inplace", False) for m in model.modules())
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
"""


def _image_task(batch_size=8):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(24) % 3
    x = torch.randn(24, 3, 8, 8, generator=generator) + 2 * y.view(-1, 1, 1, 1)
    network = lambda c, k, size: small_cnn(c, k, size, width=4)  # noqa: E731
    return ImageTask(Dataset("toy", x, y, x, y, 3, flip=True), network, batch_size)


def _text_task():
    codes = torch.arange(400) % 5
    data = Text("toy", codes[:360], codes[360:], "abcde")
    network = lambda symbols, context: GPT(symbols, context, 1, 8, 2)  # noqa: E731
    return TextTask(data, network, batch_size=4, context=8)


def _peer(name, tmp_path):
    if name != "reference":
        for package in PEERS[name].needs:
            pytest.importorskip(package)
        return PEERS[name]
    (tmp_path / "frog.py").write_text(REFERENCE)
    return reference(tmp_path)


@pytest.mark.parametrize("name", [*PEERS, "reference"])
@pytest.mark.parametrize("make", [_image_task, _text_task])
def test_every_peer_moves_every_parameter(name, make, tmp_path):
    peer, task = _peer(name, tmp_path), make()
    torch.manual_seed(0)
    model = peer.prepare(task.model())
    before = copy.deepcopy(model)
    optimizer = peer.optimizer(model, peer.lrs[0])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for x, y in list(task.batches(torch.Generator().manual_seed(0)))[:3]:
        optimizer.zero_grad()
        task.loss(model, x, y).backward()
        optimizer.step()
    for (path, new), old in zip(
        model.named_parameters(), before.parameters(), strict=True
    ):
        assert torch.isfinite(new).all() and not torch.equal(new, old), path
    assert peer.state_bytes(optimizer) >= sum(
        p.numel() * p.element_size() for p in model.parameters() if p.ndim > 1
    )


def test_grids_are_of_one_size():
    for workload in WORKLOADS.values():
        sizes = {(len(p.lrs), len(p.weight_decays)) for p in workload.peers}
        assert sizes == {(5, 2)}


def test_reference_needs_a_checkout(tmp_path):
    with pytest.raises(ValueError, match=r"frog\.py is not a file"):
        reference(tmp_path)
    (tmp_path / "frog.py").write_text("")
    with pytest.raises(ValueError, match="no class Frog"):
        reference(tmp_path / "frog.py")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_sees_convolutions_as_matrices(layout):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(16, 2)
    ).to(memory_format=layout)
    matrix = nn.Parameter(model[0].weight.detach().clone().flatten(1))
    alone = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.01)
    muon = PEERS["Muon"].optimizer(model, 0.1, 0.01)
    for _ in range(3):
        muon.zero_grad()
        F.cross_entropy(model(torch.randn(6, 3, 4, 4)), torch.arange(6) % 2).backward()
        matrix.grad = model[0].weight.grad.flatten(1).clone()
        muon.step()
        alone.step()
    # Muon works in bfloat16: another order of columns rounds otherwise, by up to 2e-3
    # of a step of 0.1 in each of three steps; measured 1e-3.
    torch.testing.assert_close(model[0].weight.flatten(1), matrix, rtol=0, atol=5e-3)


def test_run_measures():
    task = _image_task()
    counted = []
    run = train(Job(task, PEERS["SGD"], 0.1, 0, 4, evaluations=1), counted.append)
    assert run.steps == [3, 6, 9, 12] and len(counted) == 12
    assert run.seconds == sorted(run.seconds) and run.seconds[0] > 0
    assert len(run.values) == len(run.train_loss) == 4
    assert run.train_loss[-1] < run.train_loss[0]
    assert run.forward_backward_ms > 0 and run.optimizer_ms > 0
    assert run.peak_bytes is None  # on a CPU
    again = train(Job(task, PEERS["SGD"], 0.1, 0, 4, evaluations=1))
    assert again.values == run.values and again.train_loss == run.train_loss


def test_run_on_text_learns_the_order():
    run = train(Job(_text_task(), PEERS["AdamW"], 1e-2, 0, 12))
    assert run.metric == "loss"
    assert run.values[0] > 1.2 and run.final < 0.5  # chance is log 5 = 1.61
    assert run.first(1.0) is not None and run.first(1e-9) is None


def test_diverged_run_ends_early():
    counted = []
    peer = Peer(
        "wild", lambda model, **o: torch.optim.SGD(model.parameters(), 1e30), ()
    )
    peer = Peer("wild", peer.build, (1.0,))
    run = train(Job(_image_task(), peer, 1e30, 0, 4, evaluations=1), counted.append)
    assert run.diverged and run.final == 0.0 and run.steps[-1] < 12
    assert sum(counted) == 12


def test_schedules():
    one_cycle = [SCHEDULES["one-cycle"](step, 100) for step in range(100)]
    assert max(one_cycle) == 1.0 and one_cycle.index(1.0) == 9
    assert one_cycle[0] == pytest.approx(0.1) and one_cycle[-1] == pytest.approx(1 / 90)
    drops = [SCHEDULES["step"](step, 8) for step in range(8)]
    assert drops == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def _runs(metric="accuracy", **settings):
    values = {"A": [[0.3, 0.7], [0.5, 0.8]], "B": [[0.1, 0.2], [0.1, 0.5]]}
    return [
        Run(
            *(peer, 0.1, seed, [10, 20], series, [1.0, 2.0]),
            batch_size=8,
            metric=metric,
            settings={"epochs": 2, **settings},
            state_bytes=2**20,
        )
        for peer, seeds in values.items()
        for seed, series in enumerate(seeds)
    ]


def test_table_of_accuracies():
    table = report.detailed_rows(_runs(), [0.5, 0.8])
    row = dict(zip(table[0], table[1], strict=True))
    assert row["steps to 50%"] == "15 (10 - 20)" and row["seconds to 50%"] == "1.5"
    assert row["examples to 50%"] == "120" and row["steps to 80%"] == "-"
    assert row["final accuracy"] == "75.00% (70.00% - 80.00%)"
    assert row["peak memory"] == "-" and row["state"] == "1.0 MiB"
    assert report.markdown(table).splitlines()[1].count("---") == len(table[0])


def test_table_of_losses():
    table = report.detailed_rows(_runs("loss", context=4), [0.4])
    rows = [dict(zip(table[0], row, strict=True)) for row in table[1:]]
    assert [row["steps to 0.4"] for row in rows] == ["-", "10 (10 - 10)"]
    assert rows[1]["characters to 0.4"] == "320"


@pytest.mark.parametrize(
    ("metric", "more"), [("accuracy", {}), ("loss", {"context": 4})]
)
def test_picture(metric, more, tmp_path):
    runs = _runs(metric, **more)
    runs[1].diverged = True
    report.plot(tmp_path / "curves.png", "title", runs)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_range_of_steps_is_open_where_a_run_missed():
    runs = [*_runs()[:2], Run("A", 0.1, 2, [10, 20], [0.1, 0.2], [1.0, 2.0])]
    table = report.detailed_rows(runs, [0.5])
    assert (
        dict(zip(table[0], table[1], strict=True))["steps to 50%"] == "20 (10 - missed)"
    )


def test_reported_are_the_longest_runs_at_the_setting_with_most_seeds():
    runs = _runs()[:2]
    other = Run("A", 0.2, 0, [10, 20], [0.9, 0.9], [1.0, 2.0], settings={"epochs": 2})
    short = Run("A", 0.3, 0, [10], [0.9], [1.0], settings={"epochs": 1})
    assert report.at_best([short, other, *runs], 0.5) == runs
    assert report.at_best([short, other, runs[0]], 0.5) == [other]


def test_lines_survive_a_torn_end(tmp_path):
    path = tmp_path / "runs.jsonl"
    first, second = _runs()[:2]
    report.append(path, first)
    with path.open("a") as file:
        file.write('{"peer": "A", "lr"')
    assert report.read(path) == [first]
    report.append(path, second)
    assert report.read(path) == [first, second]
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(ValueError, match=r"runs\.jsonl:1 is not a run"):
        report.read(path)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "toy.npz"
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.integers(0, 100, (60, 8, 8, 3)) + 70 * y[:, None, None, None]
    arrays = {"train_x": x.astype(np.uint8), "train_y": y}
    np.savez(path, **arrays, test_x=arrays["train_x"][:30], test_y=y[:30])
    return path


def _command(archive, out, *more):
    return bench.main(
        ["cifar10-small", "--data", str(archive), "--out", str(out), "--epochs", "2"]
        + ["--grid-epochs", "1", "--seeds", "2", "--targets", "0.4", "0.9", *more]
    )


def test_command_resumes_where_it_was_stopped(archive, tmp_path, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    few = ("--peers", "SGD", "AdamW")
    assert _command(archive, whole, *few) == 0
    printed = capsys.readouterr().out
    assert "0.01/0.0005   0.03/0.0005   0.1/0.0005   0.3/0.0005   1/0.0005" in printed
    lines = (whole / "runs.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 2 * 5 + 2 * 2  # a grid of five each, two seeds each
    assert all(json.loads(line)["environment"]["torch"] for line in lines)

    stopped.mkdir()
    torn = "".join(lines[:5]) + lines[5][:40]
    (stopped / "runs.jsonl").write_text(torn)
    assert _command(archive, stopped, *few) == 0
    assert (stopped / "runs.jsonl").read_text().startswith("".join(lines[:5]))
    resumed, uninterrupted = (report.read(d / "runs.jsonl") for d in (stopped, whole))
    assert [r.settings for r in resumed] == [r.settings for r in uninterrupted]
    assert [r.values for r in resumed] == [r.values for r in uninterrupted]

    for name in ("table.md", "curves.png"):
        (stopped / name).unlink()
    assert _command(archive, stopped, "--report") == 0
    table = (stopped / "table.md").read_text()
    assert "| SGD |" in table and "| AdamW |" in table and "steps to 90%" in table
    assert (stopped / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_command_with_two_weight_decays(archive, tmp_path):
    assert _command(archive, tmp_path, "--peers", "FROG", "--weight-decays", "2") == 0
    runs = report.read(tmp_path / "runs.jsonl")
    assert len({(run.lr, run.weight_decay) for run in runs}) == 10


@pytest.mark.parametrize("study", sorted(STUDIES))
def test_study_at_one_learning_rate(study, archive, tmp_path, capsys):
    assert _command(archive, tmp_path, "--study", study, "--lrs", "0.05") == 0
    runs = report.read(tmp_path / "runs.jsonl")
    assert {run.peer for run in runs} == {peer.name for peer in STUDIES[study]}
    assert len(runs) == 2 * len(STUDIES[study])  # two seeds, and no grid
    assert {run.lr for run in runs} == {0.05}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "LBFGS"], "no peer is called 'LBFGS'"),
        (["--reference", "/nowhere"], "pass the reference's frog.py"),
        (["--data", "/nowhere"], "--data takes"),
        (["--report"], "holds no run"),
    ],
)
def test_wrong_arguments(arguments, message, archive, tmp_path, capsys):
    assert _command(archive, tmp_path, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_missing_package_is_named(archive, tmp_path, capsys, monkeypatch):
    peer = Peer("absent", PEERS["SGD"].build, (0.1,) * 4, needs=("no_such_package",))
    small = WORKLOADS["cifar10-small"]
    monkeypatch.setitem(
        WORKLOADS, small.name, bench.dataclasses.replace(small, peers=(peer,))
    )
    assert _command(archive, tmp_path) == 2
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "absent is left out: it needs no_such_package" in printed


def test_gpt_is_causal():
    torch.manual_seed(0)
    model = GPT(5, 6, 2, 8, 2)
    x = torch.randint(0, 5, (1, 6))
    changed = x.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 5
    same = torch.isclose(model(x), model(changed)).all(-1)[0]
    assert same[:4].all() and not same[4:].any()
    assert math.isfinite(model(x).sum().item())


def test_arguments_need_no_extra():
    """The command line lists the command in a plain install, too."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['PIL', 'matplotlib']));"
        "from frog_triton.benchmarks.train import bench;"
        "import argparse; bench.add_arguments(argparse.ArgumentParser())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_handing_over_to_another_optimizer():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = frog_then_sgd(net, lr=0.1, weight_decay=0.0, sgd_lr=0.5)
    frog, sgd = optimizer._parts
    assert len(optimizer.param_groups) == 3  # schedules reach them all
    for turn in range(2):
        before = net[0].weight.detach().clone()
        optimizer.zero_grad()
        net(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        moved = net[0].weight - before
        expected = -0.5 * (net[0].weight.grad + 5e-4 * before)
        assert torch.allclose(moved, expected, atol=1e-6) == bool(turn)
        assert bool(sgd.state) == bool(turn)
        if turn == 0:
            optimizer.hand_over()
    assert frog.capture.closed


def test_settings_for_text_leave_what_a_study_varies():
    adapt = WORKLOADS["chars-gpt-small"].adapt
    for peer in (*STUDIES["damping"], *STUDIES["momentum"], *STUDIES["fallback"]):
        assert adapt(peer).options == peer.options and adapt(peer).name == peer.name
    muons = [p for p in STUDIES["orthogonal"] if p.base == "Muon"]
    assert [adapt(p).options["momentum"] for p in muons] == [0.9, 0.95]
    assert all(adapt(p).options["adamw_lr"] == 3e-3 for p in muons)
    assert adapt(PEERS["SGD"]) == PEERS["SGD"]


def test_large_workloads_are_what_they_say():
    """On no device: only how many weights they have."""
    counts = {
        "images-resnet50": (3, 1000, 224, 25.56e6),  # He et al.'s, as torchvision's
        "images-vit-s": (3, 1000, 224, 22.05e6),  # Touvron et al.'s DeiT-S
    }
    for name, (*sizes, expected) in counts.items():
        network = WORKLOADS[name].task.keywords["network"]
        with torch.device("meta"):
            found = sum(p.numel() for p in network(*sizes).parameters())
        assert found == pytest.approx(expected, rel=5e-3), name


def test_tokens_are_read_and_trained_on(tmp_path):
    tokens = np.arange(3000, dtype=np.uint16) % 7
    tokens.tofile(tmp_path / "tokens.bin")
    found = text(tmp_path / "tokens.bin")
    assert (len(found.train), len(found.test), found.symbols) == (2700, 300, 50_257)
    network = lambda symbols, context: GPT(symbols, context, 1, 8, 2)  # noqa: E731
    task = TextTask(found, network, 2, 16)
    assert task.evaluate(task.model()) == pytest.approx(math.log(50_257), rel=0.05)
    tokens[:10].tofile(tmp_path / "few.bin")
    with pytest.raises(ValueError, match="only 10 tokens"):
        text(tmp_path / "few.bin")
