"""The demo: its command, the race behind it, and how its verdict is reached."""

import json
import math
import sys

import numpy as np
import pytest
import torch

from frog_triton.benchmarks.train import demo, loop, race, report, timing, verdict
from frog_triton.benchmarks.train.field import Field, FieldTask, Photo, photo, shipped
from frog_triton.benchmarks.train.loop import Run
from frog_triton.benchmarks.train.peers import PEERS
from frog_triton.cli import main

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

NAMES = [name for name in demo.LRS if not PEERS[name].missing()]


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """An image of smooth colours."""
    rows, columns = np.mgrid[0:36, 0:48] / 48
    colours = np.stack([rows, columns, (rows + columns) / 2], -1)
    path = tmp_path_factory.mktemp("images") / "slope.png"
    Image.fromarray((255 * colours).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def task():
    colours = torch.rand(32, 40, 3, generator=torch.Generator().manual_seed(1))
    return FieldTask.of(Photo("noise", colours)).with_batch_size(64)


@pytest.mark.parametrize(
    ("length", "told"),
    [(["--seconds", "0.2"], "0.2 seconds"), (["--steps", "2"], "2 steps")],
)
def test_photograph_of_ones_own(length, told, picture, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--data", str(picture), "--out", str(out), *length]
    assert main(["demo", *words, "--seeds", "2"]) == 0
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "slope, 48 x 36" in printed and f"race 2 of 2, {told} each" in printed
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["verdict"] in " ".join(printed.split())
    assert [run["peer"] for run in results["best"]] == NAMES * 2
    assert [lead["peer"] for lead in results["settings"]["leads"]] == NAMES[1:]
    assert all(math.isfinite(run["values"][-1]) for run in results["best"])
    assert results["environment"]["torch"] and results["tried"] == []
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "table.md").read_text().splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in table[2:]] == NAMES


def test_search_of_rates_chooses_where_a_race_ends_best(task, tmp_path, monkeypatch):
    """Each optimizer's own grid is raced, and the best end decides."""
    monkeypatch.setattr(demo, "LRS", {"AdamW": 5.0})
    monkeypatch.setattr("frog_triton.benchmarks.train.field.shipped", lambda: None)
    monkeypatch.setattr(FieldTask, "of", lambda photo, device: task)
    monkeypatch.setitem(demo.LRS, "FROG", 5.0)
    out = tmp_path / "out"
    assert main(["demo", "--tune", "--seconds", "0.05", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    for name in demo.LRS:
        tried = [run for run in results["tried"] if run["peer"] == name]
        assert [run["lr"] for run in tried] == list(demo.GRIDS[name])
        best = max(tried, key=lambda run: run["values"][-1])
        (chosen,) = [run["lr"] for run in results["best"] if run["peer"] == name]
        assert chosen == best["lr"]


def test_what_is_not_installed_is_left_out_with_a_remedy(
    picture, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    monkeypatch.setattr(type(PEERS["SOAP"]), "missing", lambda peer: list(peer.needs))
    words = ["--data", str(picture), "--out", str(tmp_path), "--seconds", "0.05"]
    assert main(["demo", *words]) == 0
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "frog-triton[peers]" in printed and "3 optimizers" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "must be above 0"),
        (["--seconds", "inf"], "must be above 0 and finite"),
        (["--seeds", "x"], "invalid"),
        (["--seeds", "0"], "must be at least 1"),
        (["--seconds", "2", "--steps", "5"], "not allowed with"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not a file"), (b"words", "cannot be read as an image")],
)
def test_what_is_no_photograph(content, message, tmp_path, capsys):
    path = tmp_path / "it.png"
    if content is not None:
        path.write_bytes(content)
    assert main(["demo", "--data", str(path), "--out", str(tmp_path / "out")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_unknown_device(capsys):
    assert main(["demo", "--device", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().err


def test_photographs_become_small_and_keep_their_shape(tmp_path):
    path = tmp_path / "large.png"
    Image.new("RGB", (600, 900), (255, 0, 51)).save(path)
    seen = photo(path)
    assert seen.colours.shape == (192, 128, 3)  # 128 * 192 pixels
    assert seen.colours[5, 7].tolist() == pytest.approx([1.0, 0.0, 0.2])
    Image.new("RGB", (31, 900)).save(path)
    with pytest.raises(ValueError, match="32 x 32"):
        photo(path)


def test_photograph_that_scikit_learn_ships():
    pytest.importorskip("sklearn")
    assert shipped().colours.shape == (128, 192, 3)


def test_held_out_pixels_are_never_learned_and_places_are_those_of_colours(task):
    generator = torch.Generator().manual_seed(0)
    height, width, _ = task.photo.colours.shape
    held_out = task.order[: height * width // 8]
    forbidden = {tuple(p.tolist()) for p in task.places[held_out]}
    for _ in range(20):
        for places, colours in task.batches(generator):
            assert not forbidden & {tuple(p.tolist()) for p in places}
            rows = (places[:, 1] * height).long()
            columns = (places[:, 0] * height).long()
            assert torch.equal(colours, task.photo.colours[rows, columns])


def test_metric_and_picture_follow_from_the_errors(task):
    model = task.model()
    seen = task.picture(model).double().numpy().reshape(-1, 3)
    clamped = np.asarray(task.photo.colours.double()).reshape(-1, 3)
    with torch.no_grad():
        raw = model(task.places).double().numpy()
    assert np.abs(seen - raw.clip(0, 1)).max() < 1e-6  # one rounding: 6e-8
    held_out = task.order[: len(task.order) // 8].numpy()
    error = np.mean((raw[held_out] - clamped[held_out]) ** 2)
    # Rounding of a mean in float32: measured 2e-6 dB.
    assert task.evaluate(model) == pytest.approx(-10 * np.log10(error), abs=1e-4)
    assert model.training


def test_network_starts_with_he_s_variances():
    torch.manual_seed(0)
    model = Field(depth=3, width=512, features=64)
    first, second = model.hidden[0], model.hidden[2]
    # Standard deviations of 65,536 and more weights: within 0.6 %.
    assert first.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.02)
    assert second.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    assert not first.bias.any()


class Ticks:
    """A clock that each look moves on: by one, or as an optimizer is told to take."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        for timer in ("perf_counter", "process_time"):
            monkeypatch.setattr(timing.time, timer, lambda: self.now)

    def spend(self, monkeypatch, peer, seconds):
        """Let each step of a peer take so many seconds."""

        def adjust(optimizer, done):
            self.now += seconds

        return race.Entry(
            type(peer)(**{**vars(peer), "adjust": adjust}),
            1e-3,
        )


def test_each_trains_for_the_same_seconds_and_cheap_steps_are_more(task, monkeypatch):
    ticks = Ticks(monkeypatch)
    entries = [
        ticks.spend(monkeypatch, PEERS["AdamW"], 0.5),
        ticks.spend(monkeypatch, PEERS["SGD"], 1.0),
    ]
    turns = []
    racers = race.race(
        task,
        entries,
        seed=0,
        distance=race.Distance(12.0),
        laps=4,
        on_lap=lambda found: turns.append([r.steps for r in found]),
    )
    cheap, dear = (racer.finish() for racer in racers)
    assert cheap.steps == [6, 12, 18, 24] and dear.steps == [3, 6, 9, 12]
    assert cheap.seconds == dear.seconds == [3.0, 6.0, 9.0, 12.0]
    assert turns[:3] == [[6, 0], [6, 3], [12, 3]]
    for racer in racers:  # down to zero, whatever the number of steps
        assert racer.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    assert cheap.settings["distance"] == "12 seconds"


def test_each_takes_the_same_steps_in_a_race_over_steps(task, monkeypatch):
    ticks = Ticks(monkeypatch)
    entries = [
        ticks.spend(monkeypatch, PEERS["AdamW"], 0.5),
        ticks.spend(monkeypatch, PEERS["SGD"], 1.0),
    ]
    racers = race.race(task, entries, 0, race.Distance(10, "steps"), laps=5)
    cheap, dear = (racer.finish() for racer in racers)
    assert cheap.steps == dear.steps == [2, 4, 6, 8, 10]
    assert 2 * cheap.seconds[-1] == dear.seconds[-1] == 10.0
    for racer in racers:
        assert racer.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_a_step_longer_than_a_lap_leaves_no_hole(task, monkeypatch):
    ticks = Ticks(monkeypatch)
    entries = [ticks.spend(monkeypatch, PEERS["SGD"], 5.0)]
    (racer,) = race.race(task, entries, seed=0, distance=race.Distance(12.0), laps=6)
    assert racer.run.steps == [1, 1, 2, 2, 2, 3]
    assert len(racer.run.values) == len(racer.run.train_loss) == 6


def test_a_race_repeats_itself(task, monkeypatch):
    """Same seed, same numbers of steps: same values, whoever else takes part."""
    ends = []
    for names in (["FROG", "AdamW"], ["AdamW", "SGD", "FROG"]):
        ticks = Ticks(monkeypatch)
        entries = [ticks.spend(monkeypatch, PEERS[n], 1.0) for n in names]
        racers = race.race(task, entries, seed=3, distance=race.Distance(8.0), laps=2)
        ends.append({r.run.peer: r.run.values for r in racers})
    assert ends[0]["FROG"] == ends[1]["FROG"]
    assert ends[0]["AdamW"] == ends[1]["AdamW"]


def test_what_diverges_stops_and_says_so(task, monkeypatch):
    ticks = Ticks(monkeypatch)
    entry = ticks.spend(monkeypatch, PEERS["SGD"], 1.0)
    (racer,) = race.race(
        task, [race.Entry(entry.peer, 1e9)], 0, race.Distance(40.0), laps=4
    )
    run = racer.finish()
    assert run.diverged and run.final == 0.0 and len(run.steps) < 4


def made(peer, values, seed=0, pace=1.0, diverged=False):
    """A run with a value after every tenth step."""
    steps = [10 * (i + 1) for i in range(len(values))]
    return Run(
        peer,
        0.1,
        seed,
        steps,
        values,
        [pace * s for s in steps],
        metric="PSNR",
        diverged=diverged,
    )


def test_lead_is_to_the_worse_of_both_ends():
    runs = [
        made("FROG", [10.0, 20.0, 30.0], pace=2.0),
        made("slow", [5.0, 10.0, 19.0]),  # 19 dB: FROG after 20 steps, 40 s
        made("fast", [30.0, 35.0, 40.0]),  # 30 dB: FROG after 30 steps, 60 s
    ]
    slow, fast = verdict.leads(runs)
    assert (slow.seconds, slow.steps, slow.ours, slow.others) == (0.75, 1.5, 40, 30)
    assert (fast.seconds, fast.steps) == (10 / 60, 10 / 30)
    assert str(slow) == "0.8x, 1.5x"
    told = verdict.sentence([slow, fast])
    assert told == (
        "slow got as far as FROG 1.3 times sooner; fast got as far as FROG 6.0 times "
        "sooner."
    )


def test_verdict_names_who_was_left_behind():
    ahead = verdict.Lead("AdamW", 2.0, 3.0, 3.5, 7.0)
    level = verdict.Lead("SOAP", 1.0, 1.1, 7.0, 7.0)
    assert verdict.sentence([ahead]) == (
        "FROG got as far as AdamW 2.0 times sooner (3.5 s, not 7.0)."
    )
    also = verdict.Lead("Muon", 1.06, 0.9, 6.6, 7.0)
    told = verdict.sentence([ahead, level, also])
    assert told.endswith(
        "not 7.0) and as Muon 1.1 times sooner (6.6 s, not 7.0); SOAP was level."
    )


def test_lead_is_the_median_of_seeds():
    runs = []
    for seed, values in enumerate(([9.0, 30.0], [30.0, 31.0], [30.0, 32.0])):
        runs += [made("FROG", values, seed), made("other", [1.0, 20.0], seed)]
    (lead,) = verdict.leads(runs)
    assert lead.steps == 2.0 and lead.ours == 10.0


@pytest.mark.parametrize(
    ("ours", "others", "cell", "told"),
    [
        (False, True, "it diverged", "other diverged."),
        (True, False, "0.0x, 0.0x", "other got as far as FROG sooner."),
    ],
)
def test_who_diverges_has_lost(ours, others, cell, told):
    runs = [
        made("FROG", [1.0, 2.0], diverged=ours),
        made("other", [1.0, 2.0], diverged=others),
    ]
    (lead,) = verdict.leads(runs)
    assert str(lead) == cell and verdict.sentence([lead]) == told


def test_first_time_to_a_target():
    run = Run("FROG", 0.1, 0, [2, 4, 6], [0.1, 0.8, 0.7], [1.0, 2.0, 3.0])
    assert run.first(0.75) == (4, 2.0)
    assert run.first(0.9) is None
    missed = Run("FROG", 0.1, 1, [2, 4, 6], [0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    assert report.median_first([run, missed, missed], 0.75) is None
    assert report.median_first([run, run, missed], 0.75) == (4, 2.0)


def test_best_learning_rate_is_soonest_then_highest():
    soon = Run("FROG", 0.1, 0, [2, 4], [0.9, 0.9], [1.0, 2.0])
    late = Run("FROG", 0.2, 0, [2, 4], [0.1, 0.99], [1.0, 2.0])
    assert loop.best_setting([soon, late], 0.9) == (0.1, 0.0)
    assert loop.best_setting([soon, late], 0.999) == (0.2, 0.0)
