"""Optimizers side by side on a workload: grids, then seeds at each one's best.

    frog-triton bench train cifar10-small --data DIR

Every finished run is one line of ``runs.jsonl``. The same command goes on where it was
stopped; ``--report`` remakes table and picture from the lines alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from ... import cli
from ...cli import output
from ...cli.arguments import above_zero, output_folder, positive
from ...cli.errors import CommandError
from ..environment import environment
from . import every, report
from .choice import choose, offered
from .loop import SCHEDULES, Job, Run, best_setting
from .peers import PEERS, Peer
from .problems import PROBLEMS
from .runner import train_all
from .studies import STUDIES
from .tasks import Task
from .workload import Workload
from .workloads import WORKLOADS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    parser.add_argument(
        "workload",
        choices=["all", *sorted(WORKLOADS)],
        help="all: every small problem with every optimizer, side by side; "
        + "; ".join(f"{w.name}: {w.about}" for w in WORKLOADS.values()),
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="images: a folder (train/<class>/, test/<class>/), a torchvision root, a "
        "tar of images or an .npz; text: a file of characters, or tokens in a .bin; "
        "small problems need none",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="NAME",
        help=f"who takes part (default: all): {', '.join(PEERS)}, and what the "
        "workload adds",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="PATH",
        help="checkout of the public FROG repository, or the frog.py in it, to take "
        "part as well",
    )
    parser.add_argument(
        "--study",
        choices=sorted(STUDIES),
        help="variants of FROG in place of the workload's optimizers",
    )
    parser.add_argument(
        "--lrs",
        type=above_zero,
        nargs="+",
        metavar="LR",
        help="every optimizer's learning rates, in place of its own grid; with one "
        "there is no search",
    )
    parser.add_argument("--epochs", type=positive, help="passes over the data")
    parser.add_argument(
        "--grid-epochs", type=positive, help="the same for the search of settings"
    )
    parser.add_argument(
        "--seeds", type=positive, help="(default: 3, of all problems 5)"
    )
    parser.add_argument(
        "--weight-decays",
        type=positive,
        choices=(1, 2),
        default=1,
        help="how many each grid tries beside five learning rates (default: 1)",
    )
    parser.add_argument("--schedule", choices=sorted(SCHEDULES))
    parser.add_argument(
        "--targets",
        type=above_zero,
        nargs="+",
        metavar="VALUE",
        help="of the metric, from easy to hard; the second decides among settings",
    )
    parser.add_argument(
        "--problems",
        nargs="+",
        choices=list(PROBLEMS),
        metavar="NAME",
        help=f"of all, only these: {', '.join(PROBLEMS)}",
    )
    parser.add_argument(
        "--workers",
        type=positive,
        help="of all, how many runs side by side (default: one a core)",
    )
    parser.add_argument(
        "--beside",
        type=Path,
        metavar="DIR",
        help="of a study of all, with --report: rank each variant among the "
        "optimizers whose runs are in this folder",
    )
    parser.add_argument(
        "--pace",
        action="store_true",
        help="of all, when they have been run: take the milliseconds of a step, one "
        "optimizer after the other, for the seconds in all tables",
    )
    parser.add_argument("--device", help="(default: cuda where there is one)")
    parser.add_argument(
        "--cache",
        type=output_folder,
        default="runs/cache",
        help="for decoded images (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=output_folder,
        metavar="DIR",
        help="a folder for this workload alone (default: runs/bench/WORKLOAD)",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="train nothing: remake table and picture from runs.jsonl",
    )


def run(args: argparse.Namespace) -> int:
    """Run the comparison; returns the exit code: 0 done, 2 wrong arguments."""
    console = output.console()
    if args.workload == "all":
        return every.run(args, console)
    if args.pace or args.beside is not None:
        option = "--pace" if args.pace else "--beside"
        raise CommandError(f"{option} is for all problems: bench train all {option}")
    workload = _overridden(WORKLOADS[args.workload], args)
    out = args.out or Path("runs/bench") / workload.name
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--out: {out} cannot be made: {error}") from error
    lines = out / "runs.jsonl"
    try:
        known = report.read(lines)
        if args.report:
            if not known:
                raise FileNotFoundError(f"{lines} holds no run")
        else:
            peers = choose(offered(workload, args), args, console.print)
            task = _task(workload, args)
            known = _Bench(workload, task, peers, args, lines, known, console).run()
    except (FileNotFoundError, ValueError) as error:
        raise CommandError(str(error)) from error
    write(out, workload, known, console)
    return 0


def _overridden(workload: Workload, args: argparse.Namespace) -> Workload:
    given = {
        name: getattr(args, name)
        for name in ("epochs", "grid_epochs", "schedule", "targets")
        if getattr(args, name) is not None
    }
    return dataclasses.replace(workload, **given)


def _task(workload: Workload, args: argparse.Namespace) -> Task:
    if workload.reads and args.data is None:
        raise ValueError(f"--data is needed to train: {workload.reads}")
    device = torch.device(every.device(args))
    return workload.task(args.data or Path(), args.cache, device)


class _Bench:
    """Grid, choice and seeds of one command.

    Args:
        workload: with the command line's overrides.
        task: its data and network.
        peers: who takes part.
        args: the command line.
        lines: where runs are appended.
        known: runs already there.
        console: to print on.
    """

    def __init__(
        self,
        workload: Workload,
        task: Task,
        peers: Sequence[Peer],
        args: argparse.Namespace,
        lines: Path,
        known: Sequence[Run],
        console: Console,
    ) -> None:
        self.workload = workload
        self.task = task
        self.peers = peers
        self.args = args
        self.lines = lines
        self.known = list(known)
        self.console = console
        self.environment = environment()

    def run(self) -> list[Run]:
        """All runs of this command, those of the grid included."""
        grids = {peer.name: self._grid(peer) for peer in self.peers}
        self._print_plan(grids)
        tried = self._train(
            [job for grid in grids.values() if len(grid) > 1 for job in grid]
        )
        chosen = {}
        for peer in self.peers:
            mine = [run for run in tried if run.peer == peer.name]
            if mine:
                chosen[peer.name] = best_setting(mine, self.workload.deciding_target)
                self._print_grid(peer, mine, chosen[peer.name])
            else:
                chosen[peer.name] = (peer.lrs[0], peer.weight_decays[0])
        best = self._train(
            [
                self._job(
                    peer,
                    *chosen[peer.name],
                    seed,
                    self.workload.epochs,
                    self.workload.evaluations,
                )
                for seed in range(self.args.seeds or 3)
                for peer in self.peers
            ]
        )
        return [*tried, *best]

    def _print_plan(self, grids: dict[str, list[Job]]) -> None:
        self.console.print(
            f"{self.task.title}: {self.workload.about}. Grids of learning rate/weight "
            f"decay, {self.workload.grid_epochs} epochs with seed 0 each; then the "
            f"best of each for {self.workload.epochs} epochs with "
            f"{self.args.seeds or 3} seeds:"
        )
        for name, grid in grids.items():
            cells = "   ".join(f"{job.lr:g}/{job.weight_decay:g}" for job in grid)
            self.console.print(f"  {name:18} {cells}")

    def _grid(self, peer: Peer) -> list[Job]:
        decays = peer.weight_decays[: self.args.weight_decays]
        return [
            self._job(peer, lr, decay, 0, self.workload.grid_epochs, evaluations=1)
            for lr, decay in itertools.product(peer.lrs, decays)
        ]

    def _job(
        self,
        peer: Peer,
        lr: float,
        decay: float,
        seed: int,
        epochs: int,
        evaluations: int,
    ) -> Job:
        task = self.task.with_batch_size(peer.batch_size or self.task.batch_size)
        schedule = self.workload.schedule
        return Job(task, peer, lr, seed, epochs, decay, schedule, evaluations)

    def _train(self, jobs: Sequence[Job]) -> list[Run]:
        """The runs of these jobs; those that the file holds are not made again."""
        settings = [job.settings() for job in jobs]
        held = [run.settings for run in self.known]
        new = [
            job
            for job, setting in zip(jobs, settings, strict=True)
            if setting not in held
        ]
        train_all(new, self.console, self._keep)
        return [next(r for r in self.known if r.settings == s) for s in settings]

    def _keep(self, run: Run) -> None:
        run.environment = self.environment
        report.append(self.lines, run)
        self.known.append(run)

    def _print_grid(
        self, peer: Peer, runs: Sequence[Run], chosen: tuple[float, float]
    ) -> None:
        cells = []
        for run in runs:
            mark = "*" if (run.lr, run.weight_decay) == chosen else ""
            value = report.show(run.final, run.metric)
            cells.append(f"{run.lr:g}/{run.weight_decay:g}{mark}: {value}")
        edge = chosen[0] in (peer.lrs[0], peer.lrs[-1])
        note = "  (the best learning rate lies at the edge of the grid)" if edge else ""
        self.console.print(f"{peer.name:18} {'   '.join(cells)}{note}")


def write(out: Path, workload: Workload, runs: Sequence[Run], console: Console) -> None:
    """Write and print the table, and draw the curves, of the longest runs."""
    best = report.at_best(runs, workload.deciding_target)
    header, *rows = report.rows(best, workload.targets)
    columns = [f"{column} " for column in header]
    output.print_table(workload.name, columns, rows)
    table = report.markdown(report.detailed_rows(best, workload.targets))
    (out / "table.md").write_text(table + "\n")
    report.plot(out / "curves.png", workload.about, best)
    console.print(f"wrote table.md and curves.png to {out}, beside runs.jsonl")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: ``frog-triton bench train``."""
    return cli.main(["bench", "train", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
