"""Find the fastest kernel configurations for a model, and keep them.

    frog-triton autotune resnet18 --dtype bfloat16
    frog-triton autotune my_model.py:build --budget 120
    frog-triton autotune gpt2-small --dry-run --gpu h100

Configurations go to the user's cache folder (--cache-dir for another), where
FROG(model) finds them. With --dry-run nothing is timed and no GPU is needed: candidates
are listed with what they really compile to, and a predicted time.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ..autotune.cache import Cache, shipped
from ..autotune.shortlist import Candidate, KeyReport, inspect, keys, shortlist
from ..autotune.tuning import machine_of, tune
from ..capture.capture import SAMPLINGS
from ..kernels.gpu import GPU, GPUS, detect
from ..kernels.table import Table
from ..solve.launches import Bucket, buckets
from . import models
from .describe import add_model, count
from .errors import CommandError
from .output import add_outputs, console, print_table, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_model(parser)
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="examples in a batch, where that is fewer than the sample size",
    )
    parser.add_argument(
        "--budget", type=float, default=300.0, metavar="SECONDS", help="(default: 300)"
    )
    parser.add_argument(
        "--top", type=int, default=4, metavar="N", help="candidates a key (default: 4)"
    )
    parser.add_argument("--dry-run", action="store_true", help="list, time nothing")
    parser.add_argument(
        "--gpu", choices=GPUS, help="of --dry-run (default: the one here, or h200)"
    )
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="(default: the user's cache)"
    )
    add_outputs(parser)


def run(args: argparse.Namespace) -> int:
    """Tune, or list."""
    if args.top < 1 or not args.budget > 0:
        raise CommandError("--top and --budget must be positive")
    if args.batch is not None and args.batch < 1:
        raise CommandError(f"--batch must be positive, got {args.batch}")
    if args.gpu and not args.dry_run:
        raise CommandError("--gpu goes with --dry-run: only the GPU here can be timed")
    if not args.dry_run and not torch.cuda.is_available():
        raise CommandError(
            "there is no GPU here to time kernels on; --dry-run --gpu NAME lists "
            "candidates with what they compile to",
            3,
        )
    found = model_buckets(args)
    if args.dry_run:
        return _dry_run(args, found)
    return _tune(args, found)


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


def _dry_run(args: argparse.Namespace, found: Sequence[Bucket]) -> int:
    here = detect(torch.device("cuda")) if torch.cuda.is_available() else None
    gpu = GPUS[args.gpu] if args.gpu else here or GPUS["h200"]
    shortlists = [(a, shortlist(a, gpu, args.top)) for a in keys(found)]
    # The budget goes where the time goes.
    shortlists.sort(key=lambda pair: -pair[1].candidates[-1].predicted_us)
    total = sum(len(report.candidates) for _, report in shortlists)
    with Progress(transient=True) as bar:
        task = bar.add_task(f"compiling {total} candidates", total=total)
        inspect(shortlists, gpu, lambda: bar.advance(task), args.budget)
    reports = [report for _, report in shortlists]
    show(reports, gpu)
    console().print("Nothing was timed: predictions follow from datasheet rates.")
    write_json(args.json, to_json(reports, gpu))
    return 0


def _tune(args: argparse.Namespace, found: Sequence[Bucket]) -> int:
    device = torch.device("cuda")
    gpu = detect(device)
    assert gpu is not None
    machine, cache = machine_of(device), Cache(args.cache_dir)
    known: Table = shipped(machine).merged(cache.load(machine))
    tuner, table = tune(
        device,
        found,
        known,
        args.budget,
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
            console().print(f"{report.key} {config}: {candidate.verdict}", markup=False)


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
