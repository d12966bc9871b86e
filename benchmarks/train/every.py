"""``bench train all``: its command line, and what it writes."""

from __future__ import annotations

import argparse
import os
from functools import cache
from pathlib import Path

import torch
from rich.console import Console

from ...cli import output
from ...cli.errors import CommandError
from . import beside, evidence, pace
from .choice import choose, variants
from .problems import PROBLEMS
from .suite import Campaign, Ledger, Place, processes, run_all
from .workload import Workload

LEFT_TO_PROBLEMS = {
    "epochs": None,
    "grid_epochs": None,
    "schedule": None,
    "targets": None,
    "reference": None,
    "weight_decays": 1,
}
"""Options of a single workload, and what they are where they are not given."""


def device(args: argparse.Namespace) -> str:
    """Where to train."""
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace, console: Console) -> int:
    """Run the suite; returns the exit code.

    Raises:
        CommandError: wrong arguments.
    """
    for name, unset in LEFT_TO_PROBLEMS.items():
        if getattr(args, name) != unset:
            option = f"--{name.replace('_', '-')}"
            raise CommandError(f"{option} is for one workload, not for all of them")
    if args.beside is not None and not args.report:
        raise CommandError("--beside goes with --report: it trains nothing")
    place = Place(args.data or Path(), args.cache, device(args))
    out = args.out or Path("runs/bench/all")
    ledger = Ledger(out, place)
    try:
        if not args.report:
            campaigns = []
            tell = cache(console.print)  # what all problems have in common once
            for workload in _problems(args, console):
                for peer in choose(variants(workload, args.study), args, tell):
                    campaigns.append(
                        Campaign(workload, peer, args.study, args.seeds or 5, place)
                    )
            if args.pace:
                pace.measure(campaigns, out, console)
            else:
                workers = args.workers or os.cpu_count() or 1
                run_all(campaigns, ledger, processes(workers), workers, console)
        everything = list(PROBLEMS.values())
        if args.beside is not None:
            chosen_on = [PROBLEMS[name] for name in args.problems or PROBLEMS]
            header, *rows = beside.write(out, args.beside, chosen_on, everything)
        else:
            header, *rows = evidence.write(out, everything)
    except (FileNotFoundError, ValueError) as error:
        raise CommandError(str(error)) from error
    output.print_table("all problems", [f"{column} " for column in header], rows)
    wrote = beside.FILE if args.beside else "ranks.md, ranks.json and summary.png"
    console.print(f"wrote {wrote} to {out}")
    return 0


def _problems(args: argparse.Namespace, console: Console) -> list[Workload]:
    """Those asked for whose data and packages are there."""
    found = []
    for name in args.problems or PROBLEMS:
        workload = PROBLEMS[name]
        missing = workload.missing()
        if workload.reads and args.data is None:
            console.print(f"{name} is left out: it needs {workload.reads} (--data)")
        elif missing:
            console.print(f"{name} is left out: it needs {', '.join(missing)}")
        else:
            found.append(workload)
    return found
