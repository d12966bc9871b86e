"""Candidates for each key that a step asks for, pruned without running anything.

What cannot serve the GPU is dropped, what is predicted to be slow is left out, and what
spills or needs too much shared memory is dropped once it has been compiled offline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..kernels.config import Config
from ..kernels.gpu import GPU, shared_limit
from ..kernels.launch import Launch
from ..kernels.work import ITEMSIZES
from ..solve.launches import Bucket, step_launches
from .jobs import Failure, Job, compile_jobs, costliest, price
from .model import predict
from .offline import Resources
from .space import candidates, invalid


@dataclass(frozen=True)
class Candidate:
    """A configuration that was looked at closely.

    Attributes:
        config: the configuration.
        predicted_us: of its costliest launch.
        resources: that it compiles to, if it was compiled.
        median_us: of all its launches in a step, if it was timed.
        noise_us: spread of the middle half of those times.
        verdict: what became of it.
    """

    config: Config
    predicted_us: float
    resources: Resources | None = None
    median_us: float | None = None
    noise_us: float | None = None
    verdict: str = ""


@dataclass
class KeyReport:
    """What was done for one key.

    Attributes:
        key: the key.
        layer: name of a layer that asks for it.
        formulation: of its step.
        floor_us: of its costliest launch, with the default.
        pruned: how many candidates were dropped, by cause.
        failed: of those, the ones that did not compile; the verdict says why.
        candidates: the others, best first; the default among them, whatever is wrong
            with it, but what has a verdict is not launched.
        chosen: the winner, or None where nothing was timed.
    """

    key: str
    layer: str
    formulation: str
    floor_us: float
    pruned: Counter[str] = field(default_factory=Counter)
    failed: list[Candidate] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    chosen: Config | None = None


@dataclass
class Request:
    """A key, and steps that ask for it.

    Attributes:
        key: the key.
        buckets: whose steps do, the costliest first, as far as `ENTRIES` go.
        formulation: of the steps.
        launch: the costliest of those that have the key.
    """

    key: str
    buckets: tuple[Bucket, ...]
    formulation: str
    launch: Launch


ENTRIES = 2**24
"""Weights that a key is tuned on, at least one geometry's."""


def keys(buckets: Iterable[Bucket]) -> list[Request]:
    """What the steps of layers ask for, in every formulation that may be taken."""
    found: dict[str, dict[str, list[tuple[Launch, Bucket]]]] = {}
    for bucket in buckets:
        for formulation in ("primal", "gram"):
            if formulation == "gram" and not may_be_gram(bucket):
                continue
            by_key: dict[str, list[Launch]] = {}
            for launch in step_launches(bucket, formulation):
                if launch.config.key:
                    by_key.setdefault(launch.config.key, []).append(launch)
            for key, launches in by_key.items():
                ours = found.setdefault(key, {}).setdefault(formulation, [])
                ours.append((costliest(launches), bucket))
    return [_request(key, *next(iter(asked.items()))) for key, asked in found.items()]


def _request(
    key: str, formulation: str, asked: Sequence[tuple[Launch, Bucket]]
) -> Request:
    ordered = sorted(asked, key=lambda pair: price(pair[0]), reverse=True)
    taken: list[Bucket] = []
    size = 0
    for _, bucket in ordered:
        size += bucket.weights
        if not taken or size <= ENTRIES:
            taken.append(bucket)
    return Request(key, tuple(taken), formulation, ordered[0][0])


def may_be_gram(bucket: Bucket) -> bool:
    """Whether Gram's coordinates are no more than the weights of a row."""
    return bucket.shape.samples <= bucket.shape.row_length


def shortlist(request: Request, gpu: GPU, top: int) -> KeyReport:
    """Candidates that are valid, the `top` best by prediction; and the default.

    Args:
        request: the key.
        gpu: whose limits and rates.
        top: how many.
    """
    launch, default = request.launch, request.launch.config
    kernel, args = launch.kernel, launch.args
    report = KeyReport(
        request.key,
        request.buckets[0].shape.name,
        request.formulation,
        predict(launch, gpu, config=default).floor_us,
    )
    sizes = {name.lower(): args[name] for name in "NRD" if name in args}
    valid: list[Candidate] = []
    for config in candidates(kernel, default):
        why = invalid(
            kernel, config, sizes, _kind(args), gpu.capability, _itemsize(args)
        )
        if why is None or config == default:
            time_us = predict(launch, gpu, config=config).time_us
            valid.append(Candidate(config, time_us))
        else:
            report.pruned["shared memory" if why == "shared memory" else "invalid"] += 1
    ranked = sorted(valid, key=lambda c: (c.predicted_us, _distance(c.config, default)))
    kept = [c for c in ranked[:top] if c.config != default]
    report.candidates = [*kept, next(c for c in valid if c.config == default)]
    report.pruned["predicted slower"] += len(valid) - len(report.candidates)
    return report


def _distance(config: Config, default: Config) -> int:
    """How many values differ: of equal predictions, the one nearest to the default."""
    pairs = zip(config.values().values(), default.values().values(), strict=True)
    return sum(a != b for a, b in pairs)


def _kind(args: Mapping[str, Any]) -> str:
    if args.get("DEPTHWISE"):
        return "depthwise"
    return "alone" if args.get("PROJECT") is False else ""


def _itemsize(args: Mapping[str, Any]) -> int:
    return ITEMSIZES[str(args.get("X_DTYPE", "fp32"))]


def inspect(
    shortlists: Sequence[tuple[Request, KeyReport]],
    gpu: GPU,
    done: Callable[[], object] = lambda: None,
    timeout: float = float("inf"),
) -> None:
    """Compile shortlisted candidates offline; drop what fails, spills or does not fit.

    Args:
        shortlists: changed in place; the default is never dropped, but has a verdict
            if it cannot be launched.
        gpu: what to compile for.
        done: called after each candidate.
        timeout: seconds after which what is left stays uncompiled.
    """
    places = [
        (request, report, i)
        for request, report in shortlists
        for i in range(len(report.candidates))
    ]
    jobs = [
        Job(
            request.buckets,
            request.formulation,
            request.key,
            report.candidates[i].config,
            gpu.capability,
        )
        for request, report, i in places
    ]
    found = compile_jobs(jobs, done=done, timeout=timeout)
    for (request, report, i), usage in zip(places, found, strict=True):
        candidate = report.candidates[i]
        if isinstance(usage, Failure):
            verdict = f"{FAILED}: {usage.reason}"
            report.candidates[i] = replace(candidate, verdict=verdict)
        else:
            config = candidate.config
            time_us = predict(request.launch, gpu, usage, config).time_us
            report.candidates[i] = Candidate(config, time_us, usage)
    for request, report in shortlists:
        kept = []
        for candidate in report.candidates:
            why = _unusable(candidate, gpu)
            if candidate.config == request.launch.config:
                # That it spills makes it slow, not wrong.
                judged = candidate.verdict or (why if why != "spills" else "")
                kept.append(replace(candidate, verdict=judged))
            elif why:
                report.pruned[why] += 1
                if why == FAILED:
                    report.failed.append(candidate)
            else:
                kept.append(candidate)
        report.candidates = sorted(kept, key=lambda c: c.predicted_us)


FAILED = "does not compile"


def _unusable(candidate: Candidate, gpu: GPU) -> str:
    """Why a candidate cannot win; nothing if it can, or was not compiled."""
    if candidate.verdict:
        return FAILED
    usage = candidate.resources
    if usage is None:
        return ""
    if usage.shared > shared_limit(gpu.capability):
        return "shared memory"
    return "spills" if usage.spilled else ""
