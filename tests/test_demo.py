"""The demo's command, on a small folder of images and with wrong arguments."""

import json

import numpy as np
import pytest

from frog_triton.benchmarks.train import loop, report
from frog_triton.benchmarks.train.loop import Run
from frog_triton.cli import main

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes that differ in brightness."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for label, level in (("dark", 40), ("light", 200)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level, level + 40, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return root


def test_folder_of_images(images, tmp_path, capsys):
    out = tmp_path / "out"
    code = main(
        ["demo", "--data", str(images), "--out", str(out), "--epochs", "2"]
        + ["--batch-size", "8", "--limit", "32", "--seeds", "2"]
        + ["--targets", "0.5", "0.9"]
    )
    assert code == 0
    printed = capsys.readouterr().out
    assert "32 training and 16 test images, 2 classes" in printed.replace("\n", "")
    results = json.loads((out / "results.json").read_text())
    assert {run["peer"] for run in results["best"]} == {"FROG", "SGD", "AdamW"}
    assert len(results["best"]) == 6 and len(results["tried"]) == 12
    assert results["environment"]["torch"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "| FROG |" in (out / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "must be at least 1"),
        (["--targets", "2"], "must lie in"),
        (["--seeds", "x"], "invalid"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_folder(tmp_path, capsys):
    assert main(["demo", "--data", str(tmp_path / "none")]) == 2
    assert "train/<class>/" in capsys.readouterr().out.replace("\n", " ")


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
