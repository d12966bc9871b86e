"""The report on a GPU: stages, their time, what is kept; mostly with stand-ins."""

import importlib
import json
import os
import signal
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from frog_triton.benchmarks import gpu_report, limits, profile_step, smoke
from frog_triton.benchmarks.records import Results
from frog_triton.benchmarks.stages import Stage, Wanted, stages

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def stand_in(name, code, limit=60, **rest):
    """A stage that runs a line of Python."""
    return Stage(name, ("-c", code), limit, ("-c", code), **rest)


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Runs the report on stand-ins; gives the exit code."""

    def run(planned, *words):
        monkeypatch.setattr(gpu_report, "stages", lambda out, wanted: planned)
        return gpu_report.main(["--rehearse", "--results", str(tmp_path), *words])

    return run


def records(tmp_path):
    paths = tmp_path.glob("rehearsal/*/*.stage.json")
    found = [json.loads(path.read_text()) for path in paths]
    return {record["stage"]: record for record in found}


class TestGoingOn:
    def test_what_ended_well_is_not_repeated(self, call, tmp_path, monkeypatch):
        planned = [
            stand_in("one", "print('ran one')"),
            stand_in("two", "raise SystemExit('two failed')"),
        ]
        assert call(planned) == 1
        (out,) = tmp_path.glob("rehearsal/*")
        text = (out / "REPORT.md").read_text()
        assert "Nothing here was timed on a GPU" in text
        assert "two failed" in text and "ran one" in text
        assert f"- torch: {torch.__version__}" in text and "- driver: " in text
        first = records(tmp_path)
        assert call(planned) == 1
        second = records(tmp_path)
        assert first["one"] == second["one"] and first["one"]["status"] == "passed"
        assert second["two"]["ended"] > first["two"]["ended"]
        assert second["two"]["status"] == "failed"
        # Another commit has a folder of its own.
        found = {**gpu_report.environment(), "commit": "f" * 40}
        monkeypatch.setattr(gpu_report, "environment", lambda: found)
        assert call(planned, "--only", "one") == 0
        assert len(list(tmp_path.glob("rehearsal/*"))) == 2

    def test_a_stage_is_repeated_after_one_whose_results_it_uses(self, call, tmp_path):
        def planned(code):
            return [stand_in("a", code), stand_in("b", "", after=("a",))]

        assert call(planned("raise SystemExit(1)")) == 1
        first = records(tmp_path)["b"]
        assert call(planned("")) == 0
        second = records(tmp_path)["b"]
        assert second["ended"] > first["ended"]
        assert call(planned("")) == 0
        assert records(tmp_path)["b"] == second

    def test_what_had_no_time_is_skipped_and_run_by_the_next_call(self, call, tmp_path):
        planned = [stand_in("one", ""), stand_in("two", "raise SystemExit(4)")]
        assert call(planned, "--seconds", "3") == 1
        for record in records(tmp_path).values():
            assert record["status"] == "skipped" and record["exit_code"] is None
            assert record["reason"] == "no time was left"
        assert not list(tmp_path.glob("rehearsal/*/*.log"))
        assert call(planned) == 1
        found = records(tmp_path)
        assert found["one"]["status"] == "passed"
        assert call(planned, "--seconds", "3") == 1
        assert records(tmp_path) == found  # what was found out stays

    def test_what_cannot_be_run_here_is_no_failure(self, call, tmp_path):
        planned = [stand_in("one", "", missing="there is no such tool")]
        assert call(planned) == 0
        assert records(tmp_path)["one"]["reason"] == "there is no such tool"

    def test_an_interrupted_call_keeps_what_it_has(self, call, tmp_path):
        code = f"import os, signal; os.kill({os.getpid()}, signal.SIGINT); input()"
        code = code.replace("input()", "import time; print('half', flush=True); "
                            "time.sleep(60)")  # fmt: skip
        begun = time.monotonic()
        planned = [stand_in("one", ""), stand_in("two", code), stand_in("three", "")]
        archive = tmp_path / "a.tar.gz"
        assert call(planned, "--archive", str(archive)) == gpu_report.INTERRUPTED
        assert time.monotonic() - begun < 30
        found = records(tmp_path)
        assert found["two"]["status"] == "stopped" and "three" not in found
        with tarfile.open(archive) as tar:
            names = {Path(name).name for name in tar.getnames()}
        assert {"two.stage.json", "two.log", "one.stage.json", "REPORT.md"} <= names


class TestArchive:
    def test_it_is_renewed_after_each_stage(self, call, tmp_path):
        archive = tmp_path / "all.tar.gz"
        look = (
            "import tarfile, os; folder = os.environ['OUT']; "
            f"names = tarfile.open({str(archive)!r}).getnames(); "
            "assert any(n.endswith('one.log') for n in names), names; "
            "assert not any(n.endswith('two.log') for n in names), names"
        ).replace("folder = os.environ['OUT']; ", "")
        planned = [stand_in("one", "print('x' * 100)"), stand_in("two", look)]
        assert call(planned, "--archive", str(archive)) == 0
        (out,) = tmp_path.glob("rehearsal/*")
        (out / "tables").mkdir()
        (out / "tables" / "gpu.json").write_text("{}")
        assert call(planned, "--archive", str(archive)) == 0
        with tarfile.open(archive) as tar:
            names = tar.getnames()
        prefix = f"rehearsal/{out.name}"
        for name in ("REPORT.md", "two.log", "tables/gpu.json", "environment.json"):
            assert f"{prefix}/{name}" in names
        assert list(tmp_path.glob("*.tmp")) == []

    def test_an_archive_in_the_results_holds_no_archive(self, tmp_path):
        out = tmp_path / "gpu" / "commit"
        out.mkdir(parents=True)
        (out / "a").write_text("a")
        for _ in range(2):
            gpu_report.pack(out, out / "all.tar.gz")
        with tarfile.open(out / "all.tar.gz") as tar:
            assert tar.getnames() == ["gpu/commit/a"]


class TestLimits:
    def run(self, tmp_path, code, seconds=2.0, grace=5.0):
        log = tmp_path / "log"
        command = [sys.executable, "-c", code]
        ended = limits.run_within(command, log, seconds, {"WORD": "given"}, grace)
        return ended, log.read_text()

    def test_what_is_printed_is_kept_in_order(self, tmp_path):
        code = (
            "import os, sys; print('out'); print('err', file=sys.stderr); "
            "print(os.environ['WORD']); sys.exit(3)"
        )
        ended, text = self.run(tmp_path, code, 60)
        assert text.split() == ["out", "err", "given"]
        assert ended.exit_code == 3 and not ended.stopped

    def test_it_is_interrupted_first(self, tmp_path):
        code = (
            "import time; print('begun')\n"
            "try: time.sleep(60)\n"
            "except KeyboardInterrupt: print('tidied up')"
        )
        ended, text = self.run(tmp_path, code)
        assert ended.stopped and ended.exit_code == 0
        assert "begun\ntidied up" in text and "stopped after 2 s" in text

    def test_what_will_not_end_is_killed_with_all_it_started(self, tmp_path):
        child = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)"
        code = (
            "import signal, subprocess, sys, time; signal.signal(2, signal.SIG_IGN)\n"
            f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
            "print(child.pid); time.sleep(60)"
        )
        begun = time.monotonic()
        ended, text = self.run(tmp_path, code, grace=0.5)
        assert ended.stopped and ended.exit_code == -signal.SIGKILL
        assert time.monotonic() - begun < 20
        assert not running(int(text.split()[0]))


def running(pid):
    for _ in range(50):  # whoever adopts it takes a moment to bury it
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "three"], "no stage 'three'; there are: smoke, tests, bench-host"),
        (["--seconds", "0"], "--seconds: must be above 0"),
        (["--seconds", "nan"], "--seconds: must be above 0"),
        (["--archive", "FOLDER/none/a.tar.gz"], "there is no folder"),
        (["--archive", "FOLDER"], "is a folder"),
        (["--data", "FOLDER/none"], "--data: there is no"),
        (["--reference", "FOLDER/none"], "--reference: there is no"),
        (["--only", "training"], "no stage 'training'"),
    ],
)
def test_bad_input_is_answered_and_nothing_is_written(tmp_path, capsys, words, message):
    words = [word.replace("FOLDER", str(tmp_path)) for word in words]
    results = tmp_path / "results"
    try:
        code = gpu_report.main(["--rehearse", "--results", str(results), *words])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ["--rehearse", "--results", str(tmp_path / "file")]
    assert gpu_report.main(words) == 2
    assert "cannot be written" in capsys.readouterr().err


@no_gpu
def test_without_a_gpu_it_rehearses_only(capsys):
    assert gpu_report.main([]) == 3
    assert "--rehearse" in capsys.readouterr().err


EVERYTHING = Wanted(True, Path("frog.py"), Path("data.npz"))


def test_stages_come_in_order_of_worth(tmp_path):
    names = [stage.name for stage in stages(tmp_path, Wanted())]
    assert names == [
        *("smoke", "tests", "bench-host", "bench-step", "bench-kernels"),
        *("autotune", "bench-step-tuned", "bench-kernels-tuned"),
    ]
    names = [stage.name for stage in stages(tmp_path, EVERYTHING)]
    assert names[5:8] == ["profile", "sanitizer", "autotune"]
    assert names[-2:] == ["reference", "training"]


def test_tests_run_side_by_side_where_that_is_possible(tmp_path, monkeypatch):
    def command():
        return stages(tmp_path, Wanted())[1].command

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert command()[command().index("-n") + 1] == "12"
    assert command()[-2:] == ("-m", "gpu")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "xdist" else found(n)
    )
    assert "-n" not in command()


@no_gpu
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smoke", 1),  # no case was run
        ("bench-host", 0),
        ("bench-step", 0),
        ("bench-kernels", 0),
        ("profile", 0),
        ("autotune", 3),  # there is no GPU
        ("bench-step-tuned", 0),
        ("bench-kernels-tuned", 0),
    ],
)
def test_the_real_commands_are_understood(tmp_path, monkeypatch, name, expected):
    """By the very modules, which without a GPU have little to do."""
    monkeypatch.setattr(smoke, "run_cases", lambda *_, **__: iter(()))
    monkeypatch.setattr(Results, "add", lambda *_: {"error": "not run"})
    monkeypatch.setattr(profile_step, "profiled", lambda *_: {})
    (stage,) = (s for s in stages(tmp_path, EVERYTHING) if s.name == name)
    module = importlib.import_module(stage.command[1])
    words = [word.replace("{seconds}", "50") for word in stage.command[2:]]
    assert module.main(words) == expected


@no_gpu
def test_a_rehearsal_of_the_benches(tmp_path):
    words = ["--rehearse", "--results", str(tmp_path), "--only"]
    assert gpu_report.main([*words, "bench-step", "bench-kernels-tuned"]) == 0
    (out,) = tmp_path.glob("rehearsal/*")
    (entry,) = json.loads((out / "bench-step.json").read_text())["results"]
    assert entry["relative_error"] < 1e-5 and entry["autotune"] == "off"
    entries = json.loads((out / "bench-kernels-tuned.json").read_text())["results"]
    assert all(e["solve_error"] < 0.1 and e["autotune"] == "cached" for e in entries)
    assert "bench-step.png" in (out / "REPORT.md").read_text()


@no_gpu
def test_a_rehearsal_of_the_training(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)  # decoded images go to runs/
    generator = np.random.default_rng(0)
    arrays = {
        f"{split}_{name}": generator.integers(0, 10, shape).astype(dtype)
        for split, n in (("train", 256), ("test", 32))
        for name, shape, dtype in (("x", (n, 32, 32, 3), "uint8"), ("y", n, "int64"))
    }
    np.savez(tmp_path / "data.npz", **arrays)
    words = ["--rehearse", "--results", str(tmp_path / "out"), "--only", "training"]
    assert gpu_report.main([*words, "--data", "data.npz"]) == 0
    (out,) = tmp_path.glob("out/rehearsal/*")
    assert (out / "training" / "table.md").is_file()
