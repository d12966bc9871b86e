"""FROG beside tuned SGD and AdamW on real images: ``python -m frog_triton demo``."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from . import report
from .arguments import fraction, positive
from .data import digits, images
from .loop import Job, Run, best_setting
from .peers import PEERS, Peer
from .tasks import ImageTask

SHOWN = tuple(PEERS[name] for name in ("FROG", "SGD", "AdamW"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to a parser."""
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of images: train/<class>/ and test/<class>/; or a torchvision "
        "root, a tar of images, an .npz (default: scikit-learn's handwritten digits)",
    )
    parser.add_argument(
        "--limit", type=positive, help="use only so many training images"
    )
    parser.add_argument("--epochs", type=positive, help="passes over the data")
    parser.add_argument("--batch-size", type=positive, help="examples a step")
    parser.add_argument("--seeds", type=positive, default=3, help="runs (default: 3)")
    parser.add_argument(
        "--tuning-seeds",
        type=positive,
        help="seeds for every learning rate of the grids (default: 1, for the digits "
        "all of --seeds)",
    )
    parser.add_argument(
        "--targets",
        type=fraction,
        nargs="+",
        metavar="ACC",
        help="test accuracies to time, the second decides the learning rate",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="(default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the comparison; returns the exit code."""
    from rich.console import Console
    from rich.table import Table

    from .runner import train_all

    console = Console()
    try:
        data = digits() if args.data is None else images(args.data, args.limit)
    except (FileNotFoundError, ValueError) as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        return 2
    small = args.data is None
    epochs = args.epochs or (12 if small else 5)
    batch_size = args.batch_size or (64 if small else 128)
    targets = args.targets or ([0.95, 0.97, 0.98] if small else [0.5, 0.6, 0.65])
    console.print(
        f"{data.name}: {len(data.train_y)} training and {len(data.test_y)} test "
        f"images, {data.classes} classes; {epochs} epochs, batch {batch_size}, "
        f"{args.seeds} seeds; every optimizer at the best of {len(SHOWN[0].lrs)} "
        "learning rates, same schedule"
    )
    target = targets[min(1, len(targets) - 1)]
    tuning = min(args.tuning_seeds or (args.seeds if small else 1), args.seeds)
    task = ImageTask(data, batch_size=batch_size)
    tried = train_all(
        [
            Job(task, peer, lr, seed, epochs)
            for peer in SHOWN
            for lr in peer.lrs
            for seed in range(tuning)
        ],
        console,
    )
    best: list[Run] = []
    jobs = []
    for peer in SHOWN:
        mine = [r for r in tried if r.peer == peer.name]
        lr, _ = best_setting(mine, target)
        console.print(_summary(peer, mine, target, lr), highlight=False)
        best += [r for r in mine if r.lr == lr]
        jobs += [
            Job(task, peer, lr, seed, epochs) for seed in range(tuning, args.seeds)
        ]
    best += train_all(jobs, console)
    best.sort(key=lambda r: ([p.name for p in SHOWN].index(r.peer), r.seed))

    table = report.rows(best, targets)
    rendered = Table(*table[0], title=f"{data.name}, median of {args.seeds} seeds")
    for row in table[1:]:
        rendered.add_row(*row)
    console.print(rendered)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {
        "data": data.name,
        "train": len(data.train_y),
        "test": len(data.test_y),
        "epochs": epochs,
        "batch_size": batch_size,
        "seeds": args.seeds,
        "tuning_seeds": tuning,
        "targets": list(targets),
    }
    report.write_json(args.out / "results.json", settings, tried, best)
    (args.out / "table.md").write_text(report.markdown(table) + "\n")
    report.plot(args.out / "curves.png", data.name, best)
    console.print(f"wrote results.json, table.md and curves.png to {args.out}")
    return 0


def _summary(peer: Peer, runs: Sequence[Run], target: float, chosen: float) -> str:
    """One line: steps to the target and final accuracy at each learning rate."""
    cells = []
    for lr in peer.lrs:
        mine = [r for r in runs if r.lr == lr]
        hit = report.median_first(mine, target)
        final = statistics.median(r.final for r in mine)
        steps = "-" if hit is None else str(hit[0])
        mark = "*" if lr == chosen else ""
        cells.append(f"{lr:g}{mark}: {steps} ({final:.1%})")
    return f"{peer.name:6} lr: steps to {target:.0%} (final)  " + "   ".join(cells)
