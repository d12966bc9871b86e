"""FROG beside tuned SGD and AdamW on real images: ``python -m frog_triton demo``."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from . import report
from .data import Dataset, digits, folder
from .loop import Run, best_lr, train
from .peers import PEERS, Peer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to a parser."""
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of images: train/<class>/ and test/<class>/ "
        "(default: scikit-learn's handwritten digits)",
    )
    parser.add_argument(
        "--limit", type=_positive, help="use only so many training images"
    )
    parser.add_argument("--epochs", type=_positive, help="passes over the data")
    parser.add_argument("--batch-size", type=_positive, help="examples a step")
    parser.add_argument("--seeds", type=_positive, default=3, help="runs (default: 3)")
    parser.add_argument(
        "--tuning-seeds",
        type=_positive,
        help="seeds for every learning rate of the grids (default: 1, for the digits "
        "all of --seeds)",
    )
    parser.add_argument(
        "--targets",
        type=_fraction,
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

    console = Console()
    try:
        data = digits() if args.data is None else folder(args.data, args.limit)
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
        f"{args.seeds} seeds; every optimizer at the best of {len(PEERS[0].lrs)} "
        "learning rates, same schedule"
    )
    target = targets[min(1, len(targets) - 1)]
    tuning = min(args.tuning_seeds or (args.seeds if small else 1), args.seeds)
    jobs = [(p, lr, seed) for p in PEERS for lr in p.lrs for seed in range(tuning)]
    tried = _train_all(data, jobs, epochs, batch_size, console)
    best: list[Run] = []
    jobs = []
    for peer in PEERS:
        mine = [r for r in tried if r.peer == peer.name]
        lr = best_lr(mine, target)
        console.print(_summary(peer, mine, target, lr), highlight=False)
        best += [r for r in mine if r.lr == lr]
        jobs += [(peer, lr, seed) for seed in range(tuning, args.seeds)]
    best += _train_all(data, jobs, epochs, batch_size, console)
    best.sort(key=lambda r: ([p.name for p in PEERS].index(r.peer), r.seed))

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


def _train_all(
    data: Dataset,
    jobs: Sequence[tuple[Peer, float, int]],
    epochs: int,
    batch_size: int,
    console: object,
) -> list[Run]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    if not jobs:
        return []
    per_epoch = max(1, len(data.train_y) // batch_size)
    eval_every = max(2, per_epoch // 6)
    runs = []
    with Progress(
        TextColumn("{task.description:28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,  # type: ignore[arg-type]
    ) as progress:
        task = progress.add_task("", total=len(jobs) * epochs * per_epoch)
        for peer, lr, seed in jobs:
            progress.update(task, description=f"{peer.name}, lr {lr:g}, seed {seed}")
            runs.append(
                train(
                    data,
                    peer,
                    lr,
                    seed,
                    epochs=epochs,
                    batch_size=batch_size,
                    eval_every=eval_every,
                    on_step=lambda: progress.advance(task),
                )
            )
    return runs


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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in (0, 1], got {text}")
    return value
