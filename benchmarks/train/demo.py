"""Optimizers learn a photograph, each for the same seconds: a race in a minute.

    frog-triton demo
    frog-triton demo --seeds 3
    frog-triton demo --steps 100
    frog-triton demo --data my_photo.jpg --tune

A multilayer perceptron learns which colour is where; held-out pixels say how well. The
optimizers train in turns, each at the best of four learning rates (found by --tune),
which falls to zero over the race, however many steps that holds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cli.arguments import above_zero, output_folder, positive
from ...cli.errors import CommandError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .field import FieldTask
    from .loop import Run
    from .race import Distance, Entry, Racer

LRS = {"FROG": 0.12, "Muon": 0.06, "SOAP": 0.02, "AdamW": 0.01}
"""Learning rates that ``--tune`` found: benchmarks/results/cpu/demo."""

GRIDS = {
    "FROG": (0.03, 0.06, 0.12, 0.24),
    "Muon": (0.03, 0.06, 0.12, 0.24),
    "SOAP": (0.01, 0.02, 0.04, 0.08),
    "AdamW": (0.005, 0.01, 0.02, 0.04),
}
"""What it tries."""

_BARS = " ▁▂▃▄▅▆▇█"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to a parser."""
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="a photograph of your own (default: one that scikit-learn ships)",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds",
        type=above_zero,
        default=8.0,
        help="of training for each optimizer (default: %(default)g)",
    )
    length.add_argument(
        "--steps", type=positive, help="for each optimizer, in place of seconds"
    )
    parser.add_argument("--seeds", type=positive, default=1, help="races (default: 1)")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="first race each optimizer's grid of learning rates, which takes four "
        "times as long, and use its best",
    )
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument(
        "--out",
        type=output_folder,
        default=Path("runs/demo"),
        help="folder for picture, table and JSON (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Race; returns the exit code.

    Raises:
        CommandError: there is no such photograph or device.
    """
    import torch

    from ...cli.output import console as standard_output
    from .field import FieldTask, photo, shipped
    from .race import Distance, race

    console = standard_output()
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
        seen = shipped() if args.data is None else photo(args.data)
    except (FileNotFoundError, RuntimeError, ValueError, AssertionError) as error:
        raise CommandError(str(error)) from error
    task = FieldTask.of(seen, device)
    distance = Distance(args.steps, "steps") if args.steps else Distance(args.seconds)
    entries = _entries(console)
    console.print(_told(task, entries, distance))
    tried: list[Run] = []
    if args.tune:
        entries, tried = _tuned(task, entries, distance, console)
    finished: list[Racer] = []
    for seed in range(args.seeds):
        title = f"race {seed + 1} of {args.seeds}" if args.seeds > 1 else "race"
        with _Live(console, f"{title}, {distance} each") as live:
            finished += race(task, entries, seed, distance, on_lap=live)
    _report(task, finished, tried, args.out, console)
    return 0


def _entries(console: Console) -> list[Entry]:
    from ...cli.needs import remedy
    from .peers import PEERS
    from .race import Entry

    entries = []
    for name, lr in LRS.items():
        missing = PEERS[name].missing()
        if missing:
            console.print(f"left out: {remedy(name, missing, 'peers')}")
        else:
            entries.append(Entry(PEERS[name], lr))
    return entries


def _told(task: FieldTask, entries: Sequence[Entry], distance: Distance) -> str:
    height, width, _ = task.photo.colours.shape
    model = task.model()
    count = sum(p.numel() for p in model.parameters())
    credit = f" ({task.photo.credit})" if task.photo.credit else ""
    return (
        f"{task.photo.name}{credit}, {width} x {height}: a network of {count:,} "
        f"weights learns {len(task.order):,} pixels, an eighth of them held out. "
        f"{len(entries)} optimizers, {distance} of training each, in turns."
    )


def _tuned(
    task: FieldTask,
    entries: Sequence[Entry],
    distance: Distance,
    console: Console,
) -> tuple[list[Entry], list[Run]]:
    """Each optimizer at the best of its grid, by where a race with seed 0 ends."""
    from .race import Entry, race

    chosen, tried = [], []
    for entry in entries:
        name = entry.peer.name
        grid = [Entry(entry.peer, lr) for lr in GRIDS[name]]
        with _Live(console, f"grid of {name}, {distance} each") as live:
            runs = [r.finish() for r in race(task, grid, 0, distance, on_lap=live)]
        best = max(runs, key=lambda run: run.final)
        chosen.append(Entry(entry.peer, best.lr))
        tried += runs
    return chosen, tried


class _Live:
    """A table that fills while optimizers train; called after each turn.

    Args:
        console: to print on.
        title: of the table.
    """

    def __init__(self, console: Console, title: str) -> None:
        from rich.live import Live

        self._title = title
        self._live = Live(console=console, refresh_per_second=8)

    def __enter__(self) -> Callable[[Sequence[Racer]], None]:
        self._live.start()
        return lambda racers: self._live.update(self._table(racers))

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def _table(self, racers: Sequence[Racer]) -> Table:
        from rich.table import Table

        table = Table(title=self._title, title_justify="left")
        table.add_column("optimizer")
        for name in ("lr", "seconds", "steps", "dB"):
            table.add_column(name, justify="right")
        table.add_column("so far", no_wrap=True)
        lows = [r.run.values[0] for r in racers if r.run.values]
        highs = [max(r.run.values) for r in racers if r.run.values]
        for racer in racers:
            run = racer.run
            value = f"{run.values[-1]:.2f}" if run.values else ""
            table.add_row(
                run.peer,
                f"{run.lr:g}",
                f"{racer.elapsed:.1f}",
                str(racer.steps),
                "diverged" if run.diverged else value,
                _sparks(run.values, min(lows), max(highs)),
            )
        return table


def _sparks(values: Sequence[float], low: float, high: float) -> str:
    """Values as bars of a character each."""
    span = max(high - low, 1e-9)
    most = len(_BARS) - 1
    levels = [(value - low) / span for value in values if value == value]
    return "".join(_BARS[max(1, min(most, round(most * part)))] for part in levels)


def _report(
    task: FieldTask,
    finished: Sequence[Racer],
    tried: Sequence[Run],
    out: Path,
    console: Console,
) -> None:
    """Print the verdict; write picture, table and JSON."""
    import torch

    from . import report, verdict
    from .demo_picture import draw

    runs = [racer.finish() for racer in finished]
    found = verdict.leads(runs)
    rows = _rows(runs, found)
    printed = _printed(rows)
    console.print(printed)
    told = verdict.sentence(found)
    console.print(told)
    out.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "photo": task.photo.name,
        "shape": list(task.photo.colours.shape),
        "distance": str(finished[0].distance),
        "seeds": len({run.seed for run in runs}),
        "threads": torch.get_num_threads(),
        "verdict": told,
        "leads": [asdict(lead) for lead in found],
    }
    report.write_json(out / "results.json", settings, tried, runs)
    (out / "table.md").write_text(report.markdown(rows) + "\n")
    draw(out / "curves.png", task, finished[: len(rows) - 1], runs)
    console.print(f"wrote curves.png, table.md and results.json to {out}")


def _rows(runs: Sequence[Run], found: Sequence[Any]) -> list[list[str]]:
    """A header, and a row for each optimizer, as text."""
    from . import report

    leads = {lead.peer: str(lead) for lead in found}
    table = [
        [
            *("optimizer", "lr", "steps", "ms / step"),
            *("PSNR, dB", "FROG was sooner: seconds, steps"),
        ]
    ]
    for peer, mine in report.by_peer(runs).items():
        steps = statistics.median(run.steps[-1] for run in mine)
        pace = statistics.median(run.seconds[-1] / run.steps[-1] for run in mine)
        finals = [run.final for run in mine]
        value = f"{statistics.median(finals):.2f}"
        if len(mine) > 1:
            value += f" ({min(finals):.2f} - {max(finals):.2f})"
        table.append(
            [
                *(peer, f"{mine[0].lr:g}", f"{steps:.0f}", f"{1000 * pace:.0f}"),
                *(value, leads.get(peer, "")),
            ]
        )
    return table


def _printed(rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table

    table = Table(title="after the race", title_justify="left")
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows[1:]:
        table.add_row(*row)
    return table
