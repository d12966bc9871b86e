"""The benches check what they time, record errors, and ask for what is tuned."""

import json

import pytest
import torch

import frog_triton
from frog_triton.autotune.shortlist import keys
from frog_triton.benchmarks import (
    bench_host,
    bench_kernels,
    bench_step,
    passes,
    profile_step,
    shapes,
    tune,
    warm,
)
from frog_triton.capture.capture import SAMPLINGS
from frog_triton.kernels.gpu import GPUS
from frog_triton.kernels.launch import recording

BF16 = torch.bfloat16
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize("bias", [True, False])
def test_the_step_is_checked_with_biases_and_without(bias):
    shape = shapes.LayerShape("a", 12, 20, 9, bias=bias)
    step = bench_step.Step([shape, shape], torch.float32, "cpu", "off")
    assert step.check() < 1e-5  # measured: 5e-7
    step = bench_step.Step([shape, shape], torch.float32, "cpu", "off")
    other = bench_step.Step([shape], torch.float32, "cpu", "off")
    step._twin = other._twin
    assert step.check() > bench_step.LIMIT


@no_gpu
def test_an_error_is_a_result_and_the_next_model_follows(monkeypatch, tmp_path, capsys):
    kept = []

    def check(self):
        kept.append(json.loads(path.read_text())["results"])
        if len(self.shapes) == 1:
            raise ValueError("no such layer")
        return 0.0

    path = tmp_path / "out.json"
    monkeypatch.setitem(shapes.MODELS, "bad", lambda n: shapes.tiny(n)[:1])
    monkeypatch.setattr(bench_step.Step, "check", check)
    words = ["--model", "tiny", "bad", "tiny", "--check", "--json", str(path)]
    words += ["--samples", "5", "--plot", str(tmp_path / "out.png")]
    assert bench_step.main(words) == 1
    assert [len(entries) for entries in kept] == [0, 1, 2]
    first, second, third = json.loads(path.read_text())["results"]
    assert second["error"]["type"] == "ValueError"
    assert second["error"]["message"] == "no such layer"
    assert first["FROG"]["launches"] == third["FROG"]["launches"] > 0
    captured = capsys.readouterr()
    assert "bad 5" in captured.err and captured.out.count("tiny: 3 layers") == 2
    assert (tmp_path / "out.png").is_file()


@no_gpu
def test_a_geometry_that_fails_leaves_the_others(monkeypatch, tmp_path):
    measured = []

    def measure(shape, *rest):
        measured.append(shape.name)
        if len(measured) == 1:
            raise RuntimeError("out of registers")
        return {"solve_error": 0.0}

    monkeypatch.setattr(bench_kernels, "measure", measure)
    path = tmp_path / "out.json"
    words = ["--model", "tiny", "--check", "--json", str(path)]
    assert bench_kernels.main(words) == 1
    first, second = json.loads(path.read_text())["results"]
    assert first["error"]["message"] == "out of registers"
    assert second["solve_error"] == 0.0 and len(measured) == 2


@no_gpu
@pytest.mark.parametrize("formulation", ["primal", "gram"])
def test_the_solve_of_the_kernels_bench_is_checked(formulation, tmp_path):
    path = tmp_path / "out.json"
    words = ["--model", "tiny", "--check", "--json", str(path), "--dtype", "float32"]
    assert bench_kernels.main([*words, "--formulation", formulation]) == 0
    for entry in json.loads(path.read_text())["results"]:
        assert entry["formulation"] == formulation
        assert entry["solve_error"] < 1e-4  # measured: 2e-6


@pytest.mark.parametrize("bench", [bench_step, bench_kernels])
def test_a_file_that_cannot_be_written_is_said_before_anything_is_run(
    bench, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    words = ["--model", "tiny", "--json", str(tmp_path / "file" / "out.json")]
    with pytest.raises(SystemExit) as stopped:
        bench.main(words)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and not captured.out
    assert f"there is no folder {tmp_path / 'file'}" in captured.err


@no_gpu
@pytest.mark.parametrize("name", ["tiny"])
def test_the_step_is_timed_beside_every_peer(monkeypatch, name):
    """With a clock that stands still."""

    def milliseconds(run, before, repeats):
        before()
        run()
        return [1.0, 3.0, 2.0]

    monkeypatch.setattr(bench_step, "milliseconds", milliseconds)
    step = bench_step.Step(shapes.MODELS[name](9), BF16, "cpu", "off")
    result = bench_step.counts(step.shapes, BF16, "h100")
    bench_step.add_times(result, step, 1)
    for peer in ("FROG", *bench_step.PASSES):
        assert result[peer]["median_us"] == 2000.0
    assert result["FROG"]["percent_of_floor"] == pytest.approx(
        100 * result["FROG"]["floor_us"] / 2000.0
    )


@no_gpu
def test_the_solve_is_timed_beside_cudnn(monkeypatch):
    def microseconds(run):
        run()
        return 2.0

    monkeypatch.setattr(bench_kernels, "microseconds", microseconds)
    for line in bench_kernels.geometries("tiny", BF16, "h100", "primal").layers:
        shape = line.layer
        found = bench_kernels.measure(shape, BF16, "primal", 1e12, 0.0, "cpu")
        timed = {name for name in bench_kernels.COLUMNS if name != "compiled_us"}
        assert timed <= set(found) and found["solve_us"] == 2.0
        operations = 2 * shape.samples * shape.dim * shape.rows
        assert found["forward_tflops"] == operations / 2e6


def test_the_step_has_the_defaults_of_frog():
    size = SAMPLINGS["positions"]
    parser = bench_step.argparse.ArgumentParser()
    bench_step.add_arguments(parser)
    assert parser.parse_args([]).samples == size


def asked(launches):
    return {part.config.key for part in launches.parts if part.config.key}


@no_gpu
@pytest.mark.parametrize("name", shapes.REAL)
def test_the_tuner_tunes_what_the_step_asks_for(name):
    """The bench's own step, on tensors without memory."""
    tuned = {a.key for a in keys(tune.buckets("step"))}
    wanted = shapes.MODELS[name](SAMPLINGS["positions"])
    step = bench_step.Step(wanted, BF16, "meta", "off")
    step.fill()
    with recording(run=False) as launches:
        step.frogs["FROG"].step()
    found = asked(launches)
    assert len(found) > 5 and found <= tuned


@no_gpu
@pytest.mark.parametrize("name", bench_kernels.REAL)
def test_the_tuner_tunes_what_the_kernels_bench_asks_for(name):
    tuned = {a.key for a in keys(tune.buckets("kernels"))}
    found = set()
    for line in bench_kernels.geometries(name, BF16, "h200", "auto").layers:
        batch, _ = bench_kernels.random_batch(line.layer, BF16, "meta")
        with recording(run=False) as launches:
            bench_kernels.solved(batch, line.formulation)
        found |= asked(launches)
    assert len(found) > 30 and found <= tuned


def test_what_a_step_launches_is_compiled_beforehand():
    buckets = shapes.grouped(shapes.gpt2_small(64), BF16)
    jobs = warm.jobs(buckets, "auto", GPUS["h100"])
    assert {job.capability for job in jobs} == {90}
    for job in jobs:
        assert job.config.key == job.key
    assert {bucket for job in jobs for bucket in job.buckets} == set(buckets)
    assert len({(job.buckets, job.key) for job in jobs}) == len(jobs)


@no_gpu
def test_warming_up_costs_no_result(monkeypatch, capsys):
    buckets = shapes.grouped(shapes.tiny(20), BF16)
    warm.warm(buckets)
    assert capsys.readouterr().out == ""  # there is nothing to compile for
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(warm, "detect", lambda device: GPUS["h100"])
    monkeypatch.setattr(
        warm, "compile_jobs", lambda jobs, timeout: [None for _ in jobs]
    )
    warm.warm(buckets)
    assert capsys.readouterr().out.startswith("0 of ")
    monkeypatch.setattr(warm, "compile_jobs", lambda jobs, timeout: 1 / 0)
    warm.warm(buckets)
    assert "nothing was compiled beforehand" in capsys.readouterr().out


@no_gpu
def test_the_host_bench_counts_and_times_every_part(tmp_path, capsys):
    path = tmp_path / "host.json"
    words = ["--model", "gpt2-small", "resnet18", "--repeats", "1", "--json", str(path)]
    assert bench_host.main(words) == 0
    printed = capsys.readouterr().out
    for entry in json.loads(path.read_text())["results"]:
        assert entry["times_us"].keys() > bench_host.SHOWN.keys()
        assert all(time["host"] > 0 for time in entry["times_us"].values())
        counts = entry["counts"]
        anew, played = counts["FROG anew"], counts["FROG"]
        assert anew["kernels"] > 0 == counts["AdamW"]["kernels"] == played["kernels"]
        assert 0 < counts["AdamW"]["launches"] < anew["launches"]
        assert entry["recorded_kernels"] == [anew["kernels"]]
        assert counts["hooks"]["operations"] > 0
        for part in counts.values():
            assert 0 <= part["launches"] <= part["operations"]
        assert f"{entry['layers']} layers" in printed


@pytest.mark.parametrize("name", ["gpt2-small", "resnet18"])
def test_narrow_models_are_solved_as_those_in_full(name):
    narrow = passes.workload(name, torch.device("cpu"))
    with torch.device("meta"):
        model, _, _ = passes.MODELS[name](False)
    assert len(list(model.parameters())) == len(list(narrow.model.parameters()))
    full = frog_triton.cost(model).layers
    small = frog_triton.cost(narrow.model, sample_size=narrow.sample_size).layers
    assert [c.formulation for c in full] == [c.formulation for c in small]


class TestTune:
    @no_gpu
    def test_what_did_not_fit_is_left_to_the_next_call(self, tmp_path, capsys):
        """With a timer that times nothing; candidates are really checked."""
        out, tables = tmp_path / "out.json", tmp_path / "tables"
        words = ["--rehearse", "--json", str(out), "--cache-dir", str(tables)]
        words += ["--bench", "step", "--top", "1", "--budget"]
        assert tune.main([*words, "1e-9"]) == 1
        assert "are left" in capsys.readouterr().out
        assert tune.main([*words, "300"]) == 0
        content = json.loads(out.read_text())
        wanted = {a.key for a in keys(tune.buckets("step", rehearse=True))}
        assert {key["key"] for key in content["keys"]} == wanted
        assert content["keys"] and all(key["chosen"] for key in content["keys"])
        assert "nothing was timed" in capsys.readouterr().out
        (table,) = tables.glob("*.json")
        kept = json.loads(table.read_text())
        assert set(kept["configs"]) == {key["key"] for key in content["keys"]}

    @no_gpu
    def test_without_a_gpu(self, capsys):
        assert tune.main([]) == 3
        assert "--rehearse" in capsys.readouterr().err


TRACE = [
    {"ph": "X", "cat": "kernel", "name": "b", "ts": 20.0, "dur": 5.0},
    {"ph": "X", "cat": "kernel", "name": "a", "ts": 10.0, "dur": 4.0},
    {"ph": "X", "cat": "gpu_memcpy", "name": "copy", "ts": 30.0, "dur": 1.0},
    {"ph": "X", "cat": "kernel", "name": "a", "ts": 31.0, "dur": 4.0},
    {"ph": "X", "cat": "cpu_op", "name": "aten::mul", "ts": 0.0, "dur": 50.0},
    {"ph": "i", "cat": "kernel", "name": "mark", "ts": 0.0},
]


class TestProfile:
    def test_times_gaps_and_launches(self):
        found = profile_step.summary(TRACE, profile_step.ON_GPU)
        assert found["launches"] == 4
        assert found["busy_us"] == 14.0 and found["span_us"] == 25.0
        assert found["gaps_us"] == 11.0
        assert found["kernels"][0] == {
            "name": "a", "launches": 2, "total_us": 8.0, "longest_us": 4.0,
        }  # fmt: skip
        assert found["longest_gaps"][0] == {"us": 6.0, "after": "a", "before": "b"}

    def test_an_empty_trace_is_an_error(self):
        with pytest.raises(RuntimeError, match="saw no kernel"):
            profile_step.summary(TRACE[-1:], profile_step.ON_GPU)

    @no_gpu
    def test_on_a_cpu(self, tmp_path, capsys):
        words = [
            "--model",
            "tiny",
            "--samples",
            "9",
            "--json",
            str(tmp_path / "p.json"),
        ]
        assert profile_step.main([*words, "--traces", str(tmp_path)]) == 0
        (entry,) = json.loads((tmp_path / "p.json").read_text())["results"]
        assert entry["launches"] > 0 and entry["host_us"] > 0
        assert list(tmp_path.glob("tiny*.gz"))
        assert "no time of a GPU" in capsys.readouterr().out
