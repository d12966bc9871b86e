"""The tuner: what it looks at, what it leaves out, what it chooses.

More than 400 lines: all stages of one search, on shared fakes of its timer.
"""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import PAPER
from layer_shapes import F32, LINEAR, geometry
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from frog_triton import FROG
from frog_triton.autotune import space, tuner
from frog_triton.autotune.jobs import (
    CRASHED,
    Failure,
    Job,
    compile_jobs,
)
from frog_triton.autotune.model import predict
from frog_triton.autotune.offline import Resources
from frog_triton.autotune.shortlist import (
    Candidate,
    KeyReport,
    inspect,
    keys,
    shortlist,
)
from frog_triton.autotune.tuner import Tuner, winner
from frog_triton.autotune.tuning import Tuning
from frog_triton.cli.candidates import to_json
from frog_triton.kernels.gpu import GPUS, detect
from frog_triton.kernels.gram import GramConfig
from frog_triton.kernels.launch import recording
from frog_triton.kernels.table import Table, using
from frog_triton.kernels.update import UPDATE
from frog_triton.solve.formulation import choose
from frog_triton.solve.launches import LayerShape, step_launches

H200 = GPUS["h200"]


def test_candidates_are_compiled_in_processes_of_their_own():
    asked = next(a for a in keys([geometry(LINEAR)]) if a.key.startswith("gram n"))
    good, big = GramConfig(), GramConfig(BLOCK_N=64, BLOCK_D=8)
    jobs = [Job(asked.buckets, "gram", asked.key, c, 90) for c in (good, big)]
    seen = []
    found = compile_jobs(jobs, workers=1, done=lambda: seen.append(1))
    assert found[0].registers > 0 and found[0].spilled == 0
    assert isinstance(found[1], Failure) and len(seen) == 2
    assert "K >= 16" in found[1].reason  # of tl.dot's sides
    assert compile_jobs(jobs, timeout=0.0) == [None, None]


def test_all_launches_of_a_key_are_compiled(monkeypatch):
    """One of them may spill, or need more shared memory, where the others do not."""
    asked = next(a for a in keys([geometry(LINEAR)]) if "forward" in a.key)
    job = Job(asked.buckets, "primal", asked.key, asked.launch.config, 90)
    seen = []

    def compile_launch(launch, capability):
        (part,) = launch.parts
        assert part.config.key == asked.key and capability == 90
        seen.append(launch)
        last = part.args["LAST"]
        return Resources(100 + 5 * last, 8 * last, 1024 * (2 - last), 1, 1)

    monkeypatch.setattr("frog_triton.autotune.jobs.compile_launch", compile_launch)
    registers = 100 + 5 * asked.launch.args["LAST"]
    found = job.compile()
    assert len(seen) == 4  # k
    assert found == Resources(registers, 8, 2048, 1, 1)


def test_a_crash_of_the_compiler_is_no_lack_of_time(monkeypatch):
    asked = next(a for a in keys([geometry(LINEAR)]) if a.key.startswith("gram n"))
    job = Job(asked.buckets, "gram", asked.key, GramConfig(), 90)
    dies = (
        "import os, sys; print('ready', flush=True); sys.stdin.readline(); os.abort()"
    )

    def start():
        command = [sys.executable, "-c", dies]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    monkeypatch.setattr("frog_triton.autotune.jobs._start", start)
    assert compile_jobs([job, job], workers=1) == [CRASHED, CRASHED]


def test_a_process_that_does_not_start_is_no_crash(monkeypatch, tmp_path):
    asked = next(a for a in keys([geometry(LINEAR)]) if a.key.startswith("gram n"))
    job = Job(asked.buckets, "gram", asked.key, GramConfig(), 90)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.warns(UserWarning, match="did not start"):
        assert compile_jobs([job, job], workers=2) == [None, None]


def test_what_is_under_way_when_time_is_over_is_ended(monkeypatch):
    asked = next(a for a in keys([geometry(LINEAR)]) if a.key.startswith("gram n"))
    job = Job(asked.buckets, "gram", asked.key, GramConfig(), 90)
    started = []

    def start(sleeps):
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", sleeps]
        options = {"text": True, "start_new_session": True}
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, **options))
        return started[-1]

    sleep = "import time; time.sleep(60)"
    for sleeps in (sleep, f"print('ready', flush=True); {sleep}"):
        monkeypatch.setattr("frog_triton.autotune.jobs._start", partial(start, sleeps))
        begun = time.monotonic()
        assert compile_jobs([job] * 3, workers=2, timeout=0.5) == [None] * 3
        assert time.monotonic() - begun < 10  # measured: 0.5
    assert len(started) == 4
    assert all(process.returncode == -signal.SIGKILL for process in started)


@pytest.fixture
def unrun(monkeypatch):
    """Candidates are recorded and not run, as if exact: for who is timed, and when."""
    monkeypatch.setattr(tuner, "recording", lambda: recording(run=False))
    monkeypatch.setattr(tuner, "_error", lambda actual, exact: 0.0)


@pytest.mark.usefixtures("unrun")
def test_what_does_not_compile_is_never_launched(monkeypatch):
    fine, broken = Resources(32, 0, 1024, 1, 1), Failure("no such instruction")
    launched = set()
    default_fails = set()

    def compiled(jobs, done, timeout):
        defaults = {a.launch.config for a in keys([geometry(SMALL, 2, F32)])}
        found = []
        for i, job in enumerate(jobs):
            is_default = job.config in defaults
            update = job.key.startswith("update")
            fails = update if is_default else i % 2 == 0
            if fails and is_default:
                default_fails.add(job.key)
            found.append(broken if fails else fine)
        return found

    def clock(groups):
        launched.update((a.config.key, a.config) for g in groups for a in g)
        return [[1.0] * 3 for _ in groups]

    monkeypatch.setattr("frog_triton.autotune.shortlist.compile_jobs", compiled)
    found, table = tune(clock, top=4, compile=True)
    dropped = 0
    for report in found.reports:
        for failed in report.failed:
            dropped += 1
            assert failed.verdict == "does not compile: no such instruction"
            assert (report.key, failed.config) not in launched
        assert report.pruned["does not compile"] == len(report.failed)
        if report.key in default_fails:
            assert "no such instruction" in "".join(
                c.verdict for c in report.candidates
            )
            assert report.chosen is None and report.key not in table.configs
            assert report.key not in {key for key, _ in launched}
        else:
            assert report.key in table.configs
    assert dropped and default_fails
    shown = to_json(found.reports, H200)
    assert "no such instruction" in json.dumps(shown)


def test_spills_are_dropped_but_not_the_default(monkeypatch):
    asked = keys([geometry(LINEAR)])[0]
    report = shortlist(asked, H200, top=3)
    spilling = Resources(255, 64, 1024, 1, 1)
    large = Resources(32, 0, 300 * 1024, 1, 1)
    fine = Resources(32, 0, 1024, 1, 1)

    def compiled(jobs, done, timeout):
        default = asked.launch.config
        others = iter([large, fine, spilling, spilling])
        return [spilling if j.config == default else next(others) for j in jobs]

    monkeypatch.setattr("frog_triton.autotune.shortlist.compile_jobs", compiled)
    inspect([(asked, report)], H200)
    assert report.pruned["spills"] + report.pruned["shared memory"] >= 1
    kept = {c.config: c.resources for c in report.candidates}
    assert kept.pop(asked.launch.config) == spilling
    assert all(usage == fine for usage in kept.values())


def candidate(config, median, noise):
    return Candidate(config, 1.0, None, median, noise)


@pytest.mark.parametrize(
    ("median", "noise", "wins"),
    [(9.0, 0.5, True), (9.6, 0.5, False), (11.0, 0.1, False), (9.0, 1.5, False)],
)
def test_a_tie_keeps_the_default(median, noise, wins):
    default, other = GramConfig(), GramConfig(BLOCK_N=32)
    timed = [candidate(other, median, noise), candidate(default, 10.0, 0.5)]
    assert winner(timed, default).config == (other if wins else default)


SMALL = LayerShape("small", 20, 24, 18)


def tune(timer, monkeypatch=None, shape=SMALL, **options):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = {"top": 2, "compile": False} | options
    found = Tuner(H200, device, timer, **options)
    return found, found.tune([geometry(shape, 2, F32)])


def by_tile(groups):
    """A clock for which larger tiles of the Gram kernel are faster."""
    return [
        [100.0 - sum(a.parts[0].config.values().get("BLOCK_N", 0) for a in g)] * 3
        for g in groups
    ]


def test_the_fastest_is_chosen_and_kept():
    found, table = tune(by_tile)
    assert {r.key for r in found.reports} == set(table.configs)
    for report in found.reports:
        timed = [c for c in report.candidates if c.median_us is not None]
        assert report.chosen in [c.config for c in timed]
        best = min(c.median_us for c in timed)
        chosen = next(c for c in timed if c.config == report.chosen)
        assert chosen.median_us == best
    again, same = tune(by_tile, table=table)
    assert again.reports == [] and same.configs == table.configs


def test_wrong_results_cannot_win(monkeypatch):
    honest = tuner._error
    errors = Counter()

    def error(actual, exact):
        errors["calls"] += 1
        # The default's step is looked at first, then each candidate's.
        return honest(actual, exact) + (errors["calls"] > 1)

    monkeypatch.setattr(tuner, "_error", error)
    monkeypatch.setattr(
        tuner, "keys", lambda g: [a for a in keys(g) if a.key.startswith("update")]
    )
    found, _ = tune(lambda groups: [[1.0] * 3 for _ in groups])
    report = found.reports[0]
    default = step_launches(geometry(SMALL, 2, F32), "gram")[-1].config
    assert report.chosen == default
    wrong = [c for c in report.candidates if c.config != default]
    assert wrong and all("wrong by" in c.verdict for c in wrong)


@pytest.mark.usefixtures("unrun")
def test_one_reference_serves_all_keys_of_the_same_layers(monkeypatch):
    """And no other layers' is alive; those whose keys take longest come first."""
    alive, made, order = {}, [], []
    honest, timed = Tuner._trial, Tuner._time

    def trial(self, bucket, formulation, wide):
        found = honest(self, bucket, formulation, wide)
        if wide:
            made.append(bucket)
            alive[bucket] = weakref.ref(found.params[0].weight)
        return found

    def time(self, asked, report):
        order.append(asked)
        timed(self, asked, report)
        there = {bucket for bucket, ref in alive.items() if ref() is not None}
        assert there == {*asked.buckets}

    monkeypatch.setattr(Tuner, "_trial", trial)
    monkeypatch.setattr(Tuner, "_time", time)
    some = ("gram n", "update", "primal_update")
    monkeypatch.setattr(
        tuner, "keys", lambda g: [a for a in keys(g) if a.key.startswith(some)]
    )
    monkeypatch.setattr(tuner, "NEAR", 0.0)
    shapes = [SMALL, LayerShape("larger", 70, 24, 18), LayerShape("other", 20, 40, 40)]
    buckets = [geometry(shape, 2, F32) for shape in shapes]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = Tuner(H200, device, by_tile, top=1, compile=False)
    found.tune(buckets)
    together = list(dict.fromkeys(a.buckets for a in order))
    assert len(order) > len(together) and len(made) >= len(buckets)
    assert len(made) <= sum(map(len, together))
    assert not any(ref() is not None for ref in alive.values())
    times = [predict(a.launch, H200, config=a.launch.config).time_us for a in order]
    totals = [
        sum(t for t, a in zip(times, order, strict=True) if a.buckets == b)
        for b in together
    ]
    assert totals == sorted(totals, reverse=True)


def test_layers_of_several_sizes_share_a_key():
    """Beyond the largest tile a size only makes more programs of the same."""
    shapes = [
        LayerShape("", rows, dim, 64, bias=False)
        for rows, dim in ((256, 1024), (512, 576), (512, 768))
    ]
    one, several = keys([geometry(shapes[0])]), keys([*map(geometry, shapes)])
    assert {a.key for a in one} == {a.key for a in several}
    assert all({b.shape for b in a.buckets} == {*shapes} for a in several)
    larger = keys([geometry(replace(shapes[0], rows=2**13))])
    assert {a.key for a in one} != {a.key for a in larger}  # they fill a GPU


class HostReads(TorchDispatchMode):
    """Counts what would leave a device."""

    def __init__(self):
        super().__init__()
        self.numbers = self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.numbers += "_local_scalar" in func.__name__
        device = (kwargs or {}).get("device")
        self.copies += "copy" in func.__name__ and device is not None
        return func(*args, **(kwargs or {}))


def test_results_are_compared_on_the_device():
    exact = [torch.randn(30, 40, dtype=torch.float64) for _ in range(3)]
    actual = [(e + 1e-3 * torch.randn_like(e)).float() for e in exact]
    with HostReads() as reads:
        found = tuner._error(actual, exact)
    assert (reads.numbers, reads.copies) == (1, 0)
    wrong = sum(float((a - e).norm() ** 2) for a, e in zip(actual, exact, strict=True))
    assert found**2 == pytest.approx(wrong / sum(float(e.norm() ** 2) for e in exact))
    actual[1][3, 4] = float("nan")
    assert not tuner._error(actual, exact) <= 1e9


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_wrong_bias_is_an_error_too(part):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = Tuner(H200, device, by_tile)
    bucket = geometry(SMALL, 2, F32)
    (trial,) = found._trials([bucket], "gram")
    exact = [t.clone() for t in found._reference([bucket])]
    results = tuner._results([trial], tuner.triton_ops)
    assert tuner._error(results, exact) < 1e-4  # measured 3e-7
    getattr(trial.params[1], part).mul_(1.1)
    assert tuner._error(results, exact) > 1e-3


@pytest.mark.usefixtures("unrun")
def test_a_default_that_is_wrong_leaves_its_key_untuned(monkeypatch):
    monkeypatch.setattr(tuner, "_error", lambda actual, exact: float("nan"))
    found, table = tune(by_tile)
    assert not table.configs and found.reports
    assert all(r.chosen is None for r in found.reports)


def test_a_budget_ends_tuning():
    found, table = tune(by_tile, budget=0.0)
    assert table == Table() and found.reports and not found.reports[0].chosen


@pytest.mark.parametrize(
    ("near", "gram_us", "chosen"),
    [
        (10.0, 5.0, ["gram"]),
        (10.0, 20.0, ["primal"]),
        (10.0, 9.0, ["gram"]),  # a tie: the prediction stands
        (1.0, 20.0, []),  # too far apart to be worth timing
    ],
)
def test_formulations_are_timed_where_they_are_near(monkeypatch, near, gram_us, chosen):
    def clock(groups):
        gram = [any("gram" in a.name for a in g) for g in groups]
        return [[gram_us if is_gram else 9.0] * 3 for is_gram in gram]

    monkeypatch.setattr(tuner, "NEAR", near)
    monkeypatch.setattr(tuner, "keys", lambda buckets: [])
    _, table = tune(clock)
    assert list(table.formulations.values()) == chosen
    for formulation in chosen:
        with using(table):
            found = choose(geometry(SMALL, 2, F32), H200)
        assert found == formulation


@pytest.mark.skipif(torch.cuda.is_available(), reason="would tune for minutes")
def test_modes_of_an_optimizer(tmp_path):
    with pytest.raises(ValueError, match="autotune must be one of"):
        FROG(nn.Linear(3, 2), autotune="sometimes", exclude_output_layer=False)
    net = nn.Linear(3, 2)
    options = {"exclude_output_layer": False, "autotune_dir": tmp_path}
    opt = FROG(net, autotune="now", **options)
    net(torch.randn(4, 3)).sum().backward()
    with pytest.warns(UserWarning, match="the model is on cpu: defaults"):
        opt.step()
    opt.step()
    assert not list(tmp_path.iterdir())


def test_a_table_that_is_there_is_used():
    tuning = Tuning("cached")
    net = nn.Linear(24, 20)
    options = PAPER | {"exclude_output_layer": False, "sample_size": 18}
    opt = FROG(net, backend="triton", **options)
    key = next(
        a.config.key
        for a in step_launches(geometry(LayerShape("", 20, 24, 18), 1, F32), "gram")
        if a.kernel is UPDATE
    )
    config = next(iter(space.candidates(UPDATE, UPDATE.config())))
    tuning.table = Table({key: config}, {})
    opt._tuning = tuning
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net.to(device)
    net(torch.randn(18, 24, device=device)).square().sum().backward()
    with recording() as made:
        opt.step()
    updates = [a.config for a in made if a.kernel is UPDATE]
    assert updates == [config]
    tuning.mode = "off"
    net(torch.randn(18, 24, device=device)).square().sum().backward()
    with recording() as made:
        opt.step()
    updates = [a.config for a in made if a.kernel is UPDATE]
    assert updates != [config]


@pytest.mark.skipif(torch.cuda.is_available(), reason="knows the GPU here")
def test_the_gpu_is_detected(monkeypatch):
    assert detect(torch.device("cpu")) is None

    class Properties:
        name, major, minor, multi_processor_count = "NVIDIA A100-SXM4-80GB", 8, 0, 108

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert detect(torch.device("cuda", 0)) == GPUS["a100"]
    Properties.name, Properties.minor = "NVIDIA Unknown", 6
    Properties.multi_processor_count = 54
    found = detect(torch.device("cuda", 1))
    assert found.capability == 86 and found.bandwidth == GPUS["a100"].bandwidth / 2


RANK = """
import sys, torch, torch.distributed as dist
from frog_triton.autotune.share import broadcast
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank,
                        world_size=2)
text = "choice of rank %d \\u00e9" % rank
print(broadcast(text, torch.device("cpu"), dist.group.WORLD))
dist.destroy_process_group()
"""


def test_rank_0_chooses_for_all(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            env=environment,
        )
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=120)[0].decode() for rank in ranks]
    assert printed == ["choice of rank 0 \u00e9\n"] * 2
    assert all(rank.returncode == 0 for rank in ranks)


def test_reports_are_plain_values():
    report = KeyReport("gram n64", "a", "gram", 1.0, Counter(invalid=3))
    report.candidates = [Candidate(GramConfig(), 2.0, Resources(32, 0, 0, 4, 0))]
    content = json.loads(json.dumps(to_json([report], H200)))
    assert content["keys"][0]["pruned"] == {"invalid": 3}
    assert content["keys"][0]["candidates"][0]["resources"]["registers"] == 32
