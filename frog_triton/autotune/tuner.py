"""Finds the fastest configurations for the layers of a model.

For each key that a step's launches ask for, a shortlist of candidates is timed on
tensors of their own, in turns with the default. A candidate wins only if its step is as
accurate as the default's and its median is ahead by more than the noise.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..kernels.config import Config
from ..kernels.gpu import GPU
from ..kernels.launch import Launches, Made, recording
from ..kernels.table import Table, using
from ..ops import torch_ops, triton_ops
from ..ops.backend import Backend
from ..solve.formulation import layer_key
from ..solve.formulation import predict as predict_formulations
from ..solve.launches import Bucket, Trial, trial_step
from .model import predict
from .shortlist import (
    Candidate,
    KeyReport,
    Request,
    inspect,
    keys,
    may_be_gram,
    shortlist,
)
from .space import TOP

NEAR = 2.0
"""Formulations whose predictions are within this factor are timed."""

ROUNDS = 20
CHUNK = 8
"""Keys that are compiled, then timed, together."""

HEAD_START_CYCLES = 200_000
"""About 0.1 ms of a GPU's clock: more than Python takes for a launch."""


Timer = Callable[[Sequence[Sequence[Made]]], list[list[float]]]
"""Times sets of launches in turns: microseconds of each set in each round."""


class Tuner:
    """Times what the model left over.

    Args:
        gpu: what is tuned for.
        device: to run on.
        timer: see `Timer`.
        table: what is known already; its keys are not tuned again.
        top: candidates to look at closely for each key.
        budget: seconds after which no further key is begun.
        progress: called with what is done, in words, and the share that is done.
        compile: whether to compile candidates offline first.
        keep: called with the table whenever it has grown.
    """

    def __init__(
        self,
        gpu: GPU,
        device: torch.device,
        timer: Timer,
        table: Table | None = None,
        top: int = TOP,
        budget: float = float("inf"),
        progress: Callable[[str, float], object] = lambda what, share: None,
        compile: bool = True,
        keep: Callable[[Table], object] = lambda table: None,
    ) -> None:
        self.gpu = gpu
        self.device = device
        self.timer = timer
        self.table = Table() if table is None else table
        self.top = top
        self.deadline = time.monotonic() + budget
        self.progress = progress
        self.compile = compile
        self.keep = keep
        self.reports: list[KeyReport] = []
        self._exact: dict[Bucket, list[Tensor]] = {}

    def tune(self, buckets: Sequence[Bucket]) -> Table:
        """Configurations and formulations for layers; the table grows by them."""
        wanted = [a for a in keys(buckets) if a.key not in self.table.configs]
        ordered = costliest_first(wanted, self.gpu)
        shortlists = [(a, shortlist(a, self.gpu, self.top)) for a in ordered]
        self.reports = [report for _, report in shortlists]
        # A few at a time, so that a budget that ends early has bought something.
        for first in range(0, len(shortlists), CHUNK):
            self._tune_some(shortlists[first : first + CHUNK], first / len(shortlists))
            self.keep(self.table)
        self._exact = {}
        for bucket in buckets:
            if time.monotonic() > self.deadline:
                break
            self._formulation(bucket)
        self.keep(self.table)
        return self.table

    def _tune_some(
        self, shortlists: Sequence[tuple[Request, KeyReport]], share: float
    ) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            return
        if self.compile:
            self.progress("compiling candidates", share)
            inspect(shortlists, self.gpu, timeout=left / 2)
        for request, report in shortlists:
            if time.monotonic() > self.deadline:
                break
            self.progress(request.key, share)
            self._time(request, report)

    def _time(self, request: Request, report: KeyReport) -> None:
        """Check and time one key's candidates; keep the winner."""
        default = request.launch.config
        groups: list[list[Made]] = []
        alive: list[Launches] = []  # tables hold addresses, not tensors
        places: list[int] = []
        limit = float("inf")
        # The default first: its error is the measure of the others'.
        order = sorted(
            range(len(report.candidates)),
            key=lambda i: report.candidates[i].config != default,
        )
        for i in order:
            candidate = report.candidates[i]
            table = self.table.merged(Table({request.key: candidate.config}))
            verdict = candidate.verdict  # what cannot be launched has one already
            if not verdict:
                try:
                    exact = self._reference(request.buckets)
                    trials = self._trials(request.buckets, request.formulation)
                    with using(table), recording() as launches:
                        error = _error(_results(trials, triton_ops), exact)
                except Exception as problem_:  # whatever a compiler or driver raises
                    verdict = f"failed: {problem_}"[:200]
                else:
                    if candidate.config == default:
                        limit = 2 * error + 1e-6
                    verdict = "" if error <= limit else f"wrong by {error:.1e}"
            if verdict:
                report.candidates[i] = replace(candidate, verdict=verdict)
                if candidate.config == default:
                    return  # there is nothing to compare the others with
                continue
            groups.append([a for a in launches if a.parts[0].config.key == request.key])
            alive.append(launches)
            places.append(i)
        times = self.timer(groups)
        del alive
        for i, found in zip(places, times, strict=True):
            report.candidates[i] = replace(
                report.candidates[i],
                median_us=statistics.median(found),
                noise_us=_spread(found),
            )
        timed = [report.candidates[i] for i in places]
        report.chosen = winner(timed, default).config
        self.table = self.table.merged(Table({request.key: report.chosen}))

    def _formulation(self, bucket: Bucket) -> None:
        """Time both formulations where their predictions are near."""
        key = layer_key(bucket)
        if key in self.table.formulations or not may_be_gram(bucket):
            return
        allow_tf32 = torch.backends.cudnn.allow_tf32
        predicted = predict_formulations(bucket, self.gpu, self.table, allow_tf32)
        if max(predicted.values()) > NEAR * min(predicted.values()):
            return
        names = sorted(predicted, key=lambda name: predicted[name])
        groups = []
        for name in names:
            with using(self.table), recording() as launches:
                _results(self._trials([bucket], name), triton_ops)
            groups.append(launches)
        times = self.timer(groups)
        medians = [statistics.median(t) for t in times]
        ahead = medians[0] - medians[1] > max(map(_spread, times))
        chosen = names[1] if ahead else names[0]
        self.table = self.table.merged(Table({}, {key: chosen}))

    def _reference(self, buckets: Sequence[Bucket]) -> list[Tensor]:
        """The step in float64; no others than those asked for last are kept."""
        self._exact = {b: self._exact[b] for b in buckets if b in self._exact}
        for bucket in buckets:
            if bucket not in self._exact:
                trials = self._trials([bucket], "primal", wide=True)
                self._exact[bucket] = _results(trials, torch_ops)
        return [tensor for bucket in buckets for tensor in self._exact[bucket]]

    def _trials(
        self, buckets: Sequence[Bucket], formulation: str, wide: bool = False
    ) -> list[Trial]:
        """A step of each geometry on random numbers, the same each time.

        Args:
            buckets: layers.
            formulation: of the steps.
            wide: whether it is in float64.
        """
        return [self._trial(bucket, formulation, wide) for bucket in buckets]

    def _trial(self, bucket: Bucket, formulation: str, wide: bool) -> Trial:
        generator = torch.Generator(self.device).manual_seed(0)

        def make(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            if not dtype.is_floating_point:
                return torch.zeros(size, dtype=dtype, device=self.device)
            value = torch.randn(size, generator=generator, device=self.device)
            value = value.to(dtype)
            return value.to(torch.float64) if wide else value

        trial = trial_step(bucket, formulation, make)
        for param in _tensors(trial):
            # From zero, so that a step is not lost in the rounding of 16 bits.
            param.zero_()
        return trial


def costliest_first(wanted: Sequence[Request], gpu: GPU) -> list[Request]:
    """Keys of the same layers together, so that a budget is spent where it tells.

    Args:
        wanted: keys.
        gpu: whose rates.
    """
    times = {
        a.key: predict(a.launch, gpu, config=a.launch.config).time_us for a in wanted
    }
    totals: dict[tuple[Bucket, ...], float] = {}
    for asked in wanted:
        totals[asked.buckets] = totals.get(asked.buckets, 0.0) + times[asked.key]
    return sorted(wanted, key=lambda a: (totals[a.buckets], times[a.key]), reverse=True)


def winner(timed: Sequence[Candidate], default: Config) -> Candidate:
    """The fastest, if it is ahead of the default by more than the noise of both."""
    ours = next(c for c in timed if c.config == default)
    best = min(timed, key=lambda c: c.median_us or 0.0)
    assert ours.median_us is not None and best.median_us is not None
    noise = max(ours.noise_us or 0.0, best.noise_us or 0.0)
    return best if ours.median_us - best.median_us > noise else ours


def _spread(times: Sequence[float]) -> float:
    """Width of the middle half."""
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4)
    return high - low


def _tensors(trial: Trial) -> list[Tensor]:
    """All that a step changes."""
    parts = [part for rows in trial.params for part in (rows.weight, rows.bias)]
    return [part for part in parts if part is not None]


def _results(trials: Sequence[Trial], backend: Backend) -> list[Tensor]:
    """Where a step from zero ends."""
    backend.side_by_side([partial(trial.step, backend) for trial in trials])
    return [tensor for trial in trials for tensor in _tensors(trial)]


def _error(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Relative to the exact results; the only number that leaves the device."""
    pairs = zip(actual, exact, strict=True)
    wrong = torch.stack([(a.double() - e).square().sum() for a, e in pairs]).sum()
    size = torch.stack([e.square().sum() for e in exact]).sum()
    return float((wrong / size).sqrt())


class CudaTimer:
    """Times launches on a GPU: interleaved rounds, the cache flushed before each.

    Args:
        device: of the launches.
        rounds: times each set is timed.
    """

    def __init__(self, device: torch.device, rounds: int = ROUNDS) -> None:
        self.rounds = rounds
        self.device = device
        # Larger than any L2.
        self._flush = torch.empty(1 << 26, dtype=torch.int32, device=device)

    def __call__(self, groups: Sequence[Sequence[Made]]) -> list[list[float]]:
        """Microseconds of each set in each round."""
        with torch.cuda.device(self.device):
            return self._rounds(groups)

    def _rounds(self, groups: Sequence[Sequence[Made]]) -> list[list[float]]:
        times: list[list[float]] = [[] for _ in groups]
        for round_ in range(self.rounds + 2):
            for found, launches in zip(times, groups, strict=True):
                self._flush.zero_()
                # The host needs a head start, or it is what is timed.
                torch.cuda._sleep(HEAD_START_CYCLES * (1 + len(launches)))
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for launch in launches:
                    launch.run()
                end.record()
                end.synchronize()
                if round_ >= 2:  # the first warm up
                    found.append(1e3 * start.elapsed_time(end))
        return times
