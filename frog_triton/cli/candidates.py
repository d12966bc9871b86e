"""Candidates of a model's kernels: listed, timed and shown."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.progress import Progress

from ..autotune import tuning
from ..autotune.cache import Cache, shipped
from ..autotune.shortlist import Candidate, KeyReport, inspect, keys, shortlist
from ..kernels.gpu import GPU, GPUS, detect
from ..kernels.table import Table
from ..presets import SAMPLINGS
from ..solve.launches import Bucket, buckets
from . import models
from .describe import count
from .errors import CommandError
from .output import console, print_table, write_json


def model_buckets(args: argparse.Namespace) -> list[Bucket]:
    """The layers of the model, those of one geometry together."""
    loaded = models.load(args.model)
    if args.batch is not None and args.sampling == "examples":
        size = args.sample_size or SAMPLINGS["examples"]
        args.sample_size = min(size, args.batch)
    counted = count(args, loaded, args.gpu or "h200")
    if not counted.layers:
        raise CommandError(f"{loaded.name} has no layer that FROG preconditions", 1)
    dtypes = (getattr(torch, args.dtype), torch.float32, torch.float32)
    return buckets([line.layer for line in counted.layers], dtypes, args.cg_iters)


def list_(args: argparse.Namespace, deadline: float) -> int:
    """List candidates for a GPU, here or not.

    Args:
        args: the command line.
        deadline: of `time.monotonic`, after which nothing more is compiled.
    """
    found = model_buckets(args)
    here = detect(torch.device("cuda")) if torch.cuda.is_available() else None
    gpu = GPUS[args.gpu] if args.gpu else here or GPUS["h200"]
    shortlists = [(a, shortlist(a, gpu, args.top)) for a in keys(found)]
    # The budget goes where the time goes.
    shortlists.sort(key=lambda pair: -pair[1].candidates[-1].predicted_us)
    total = sum(len(report.candidates) for _, report in shortlists)
    with Progress(transient=True) as bar:
        task = bar.add_task(f"compiling {total} candidates", total=total)
        left = max(0.0, deadline - time.monotonic())
        inspect(shortlists, gpu, lambda: bar.advance(task), left)
    reports = [report for _, report in shortlists]
    show(reports, gpu)
    missed = sum(_missed(c) for report in reports for c in report.candidates)
    if missed:
        console().print(
            f"{missed} of {total} candidates were not compiled for lack of time "
            f"(--budget {args.budget:g}): a dash stands for what they would take."
        )
    console().print("Nothing was timed: predictions follow from datasheet rates.")
    write_json(args.json, to_json(reports, gpu))
    return 0


def _missed(candidate: Candidate) -> bool:
    return candidate.resources is None and not candidate.verdict


def tune(args: argparse.Namespace, deadline: float) -> int:
    """Time candidates on the GPU here, and keep the fastest.

    Args:
        args: the command line.
        deadline: of `time.monotonic`, after which no other key is begun.
    """
    if not torch.cuda.is_available():
        raise CommandError(
            "there is no GPU here to time kernels on; --dry-run --gpu NAME lists "
            "candidates with what they compile to",
            3,
        )
    found = model_buckets(args)
    device = torch.device("cuda")
    gpu = detect(device)
    assert gpu is not None
    machine, cache = tuning.machine_of(device), Cache(args.cache_dir)
    known: Table = shipped(machine).merged(cache.load(machine))
    tuner, table = tuning.tune(
        device,
        found,
        known,
        deadline - time.monotonic(),
        args.top,
        keep=lambda table: cache.store(machine, table),
    )
    show(tuner.reports, gpu)
    write_json(args.json, to_json(tuner.reports, gpu))
    path = cache.store(machine, table)
    if path is None:
        return 1
    console().print(f"{len(table.configs)} configurations in {path}")
    return 0


def show(reports: Sequence[KeyReport], gpu: GPU) -> None:
    """Print candidates and what was pruned."""
    rows = []
    for report in reports:
        for i, candidate in enumerate(report.candidates):
            usage = candidate.resources
            values = candidate.config.values()
            timed = candidate.median_us
            mark = "*" if candidate.config == report.chosen else ""
            rows.append(
                (
                    report.key if i == 0 else "",
                    " ".join(f"{name}={value}" for name, value in values.items()),
                    usage.registers if usage else "-",
                    usage.spilled if usage else "-",
                    usage.shared if usage else "-",
                    f"{candidate.predicted_us:.1f}",
                    candidate.verdict or (f"{timed:.1f}{mark}" if timed else "-"),
                )
            )
    columns = ("key ", "configuration ", "regs", "spills", "shared", "predicted us")
    print_table(f"candidates on {gpu.name}", (*columns, "timed us"), rows)
    pruned: Counter[str] = Counter()
    for report in reports:
        pruned += report.pruned
    causes = ", ".join(f"{count} {cause}" for cause, count in pruned.most_common())
    left = sum(len(report.candidates) for report in reports)
    console().print(f"pruned: {causes}; left: {left} for {len(reports)} keys")
    for report in reports:
        for candidate in report.failed:
            config = f"{candidate.config.values()}"
            console().print(f"{report.key} {config}: {candidate.verdict}")


def to_json(reports: Sequence[KeyReport], gpu: GPU) -> dict[str, Any]:
    """Reports as plain values."""
    return {
        "gpu": asdict(gpu),
        "keys": [
            {
                "key": report.key,
                "layer": report.layer,
                "formulation": report.formulation,
                "floor_us": report.floor_us,
                "pruned": dict(report.pruned),
                "chosen": report.chosen.values() if report.chosen else None,
                "candidates": [_plain(candidate) for candidate in report.candidates],
                "failed": [_plain(candidate) for candidate in report.failed],
            }
            for report in reports
        ],
    }


def _plain(candidate: Candidate) -> dict[str, Any]:
    return {**asdict(candidate), "config": candidate.config.values()}
