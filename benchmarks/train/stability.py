"""Which optimizers survive: small trainings at one, three and ten times the usual rate.

    frog-triton bench stability
    frog-triton bench stability --case overfit-mlp gan --peers FROG AdamW --seeds 3

A run survives if its losses and parameters stay finite and its result is good. A cell
of the table says whether it did, the largest training loss after the loss had first
been low, and the result (accuracy or loss). A high spike alone is no death.
"""

from __future__ import annotations

import argparse
import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ... import FROG, PAPER
from ...cli import output
from ...cli.arguments import above_zero, output_file, output_folder, positive
from ...cli.errors import CommandError
from ..records import Results, write_text
from . import report, survival_picture
from .loop import SCHEDULES
from .peers import PEERS, Peer
from .runner import progress_bar
from .survival_cases import CASES, Case, Networks

_FROG_LR = inspect.signature(FROG).parameters["lr"].default


def _frog(name: str, **options: Any) -> Peer:
    """FROG as one gets it, its own weight decay included."""

    def build(
        model: nn.Module, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        return FROG(model, lr, **options)

    return Peer(name, build, (_FROG_LR,))


def _usual(name: str, lr: float) -> Peer:
    """A peer at its usual rate, without the options it has in the other benches."""
    return replace(PEERS[name], lrs=(lr,), options={})


_LISTED = (
    _frog("FROG"),
    _frog("FROG plain", orthogonalize=False),
    _frog("FROG paper", **PAPER),
    _usual("SGD", 0.1),
    _usual("AdamW", 1e-3),
    _usual("Muon", 0.02),
    _usual("SOAP", 3e-3),
)
OFFERED = {peer.name: peer for peer in _LISTED}
"""The optimizers by name, each with its usual learning rate alone."""

Entry = Mapping[str, Any]
"""What a trial is called and what came of it."""


@dataclass(frozen=True)
class Trial:
    """A run to be made.

    Attributes:
        case: what is trained.
        schedule: one of the case's.
        rate: factor on the peer's usual learning rate.
        peer: the optimizer.
        seed: of the weights and the batches.
    """

    case: Case
    schedule: str
    rate: float
    peer: Peer
    seed: int

    @property
    def lr(self) -> float:
        """The peak learning rate."""
        return self.rate * self.peer.lrs[0]

    def names(self) -> dict[str, Any]:
        """All that the outcome depends on, as JSON can hold it."""
        return {
            "case": self.case.name,
            "schedule": self.schedule,
            "rate": self.rate,
            "peer": self.peer.name,
            "lr": self.lr,
            "seed": self.seed,
            "metric": self.case.metric,
            "bar": self.case.bar,
        }


def survive(
    trial: Trial, on_step: Callable[[int], None] = lambda count: None
) -> dict[str, Any]:
    """Make a run and judge it.

    Args:
        trial: what to run.
        on_step: called with the number of steps done; a run that ends early reports
            those that it leaves out.

    Returns:
        Whether it ``survived``; whether all was ``finite``; the first step at which the
        loss was below the case's mark (``reached``); the largest loss from there on
        (``spike``); the result (``end``); ``seconds``; and what the optimizer warned
        of (``warnings``). None for what there is not.
    """
    case = trial.case
    torch.manual_seed(trial.seed)
    networks = case.networks()
    losses: list[float] = []
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        for loss in _train(trial, networks):
            losses.append(loss)
            on_step(1)
    seconds = time.perf_counter() - start
    on_step(case.steps - len(losses))
    end = case.end(networks, losses)
    finite = all(map(math.isfinite, (losses[-1], end))) and all(
        bool(param.isfinite().all())
        for network in networks
        for param in network.parameters()
    )
    reached = next((i for i, loss in enumerate(losses) if loss < case.mark), None)
    return {
        "survived": finite and case.good(end),
        "finite": finite,
        "reached": reached,
        "spike": max(losses[reached:]) if finite and reached is not None else None,
        "end": end if finite else None,
        "seconds": seconds,
        "warnings": sorted({str(warning.message) for warning in warned}),
    }


def _train(trial: Trial, networks: Networks) -> Iterator[float]:
    """The loss of each step, of several networks the largest; infinity is the last."""
    case = trial.case
    optimizers = [trial.peer.optimizer(network, trial.lr) for network in networks]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: SCHEDULES[trial.schedule](step, case.steps)
        )
        for optimizer in optimizers
    ]
    for batch in case.batches(torch.Generator().manual_seed(trial.seed)):
        worst = -math.inf
        for optimizer, loss in zip(
            optimizers, case.losses(networks, batch), strict=True
        ):
            worst = max(worst, loss.item()) if loss.isfinite() else math.inf
            if worst == math.inf:
                break
            optimizer.zero_grad()
            loss.backward()
            try:
                optimizer.step()
            # SOAP's, of gradients that are infinite.
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                worst = math.inf
                break
        yield worst
        if worst == math.inf:
            return
        for schedule in schedules:
            schedule.step()


def rows(entries: Sequence[Entry]) -> list[list[str]]:
    """A header, a row for each case, schedule and rate, and one for each rate alone.

    Args:
        entries: what trials are called and what came of them.
    """
    peers = list(dict.fromkeys(e["peer"] for e in entries))
    table = [["case", "schedule", "rate", *peers]]

    def add(
        names: Callable[[Entry], tuple[str, str]], cell: Callable[[list[Entry]], str]
    ) -> None:
        groups: dict[tuple[str, ...], dict[str, list[Entry]]] = {}
        for e in entries:
            row = (*names(e), f"{e['rate']:g}x")
            groups.setdefault(row, {p: [] for p in peers})[e["peer"]].append(e)
        table.extend([*row, *map(cell, own.values())] for row, own in groups.items())

    add(lambda e: (e["case"], e["schedule"]), _cell)
    add(lambda e: ("survived", ""), _summary)
    return table


def _cell(entries: Sequence[Entry]) -> str:
    """Verdict, worst spike and worst result over the seeds of one trial."""
    if any("error" in e for e in entries):
        return "error"
    survivors = sum(e["survived"] for e in entries)
    verdict = f"{survivors}/{len(entries)}"
    if survivors in (0, len(entries)):
        verdict = "ok" if survivors else "died"
    if not all(e["finite"] for e in entries):
        return f"{verdict} inf"
    metric = entries[0]["metric"]
    worst = (min if metric == "accuracy" else max)(e["end"] for e in entries)
    result = f"{worst:.0%}" if metric == "accuracy" else f"{worst:.2g}"
    return f"{verdict} {_spike(entries)}, {result}"


def _summary(entries: Sequence[Entry]) -> str:
    """How many survived, and the worst spike of all."""
    survivors = sum(e.get("survived", False) for e in entries)
    return f"{survivors}/{len(entries)}, {_spike(entries)}"


def _spike(entries: Sequence[Entry]) -> str:
    """The worst of them; errors say nothing."""
    if not all(e.get("finite", True) for e in entries):
        return "inf"
    spikes = [e["spike"] for e in entries if e.get("spike") is not None]
    return f"{max(spikes):.2g}" if spikes else "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    parser.add_argument(
        "--case",
        nargs="+",
        choices=CASES,
        default=list(CASES),
        help="(default: all) "
        + "; ".join(f"{c.name}: {c.about}" for c in CASES.values()),
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="NAME",
        default=list(OFFERED),
        help=f"who takes part (default: all): {', '.join(OFFERED)}",
    )
    parser.add_argument(
        "--rates",
        type=above_zero,
        nargs="+",
        metavar="FACTOR",
        default=[1.0, 3.0, 10.0],
        help="on each optimizer's usual learning rate, "
        + ", ".join(f"{p.name} {p.lrs[0]:g}" for p in OFFERED.values())
        + " (default: 1 3 10)",
    )
    parser.add_argument("--seeds", type=positive, default=1, help="(default: 1)")
    output.add_outputs(parser, plot=True)
    parser.add_argument(
        "--markdown", type=output_file, metavar="FILE", help="write the table there"
    )
    parser.add_argument(
        "--out",
        type=output_folder,
        metavar="DIR",
        help="write results and table there, as stability.json and stability.md",
    )


def run(args: argparse.Namespace) -> int:
    """Make all runs; returns the exit code: 0 done, 1 something failed, 2 wrong."""
    console = output.console()
    json_path, markdown_path = args.json, args.markdown
    if args.out is not None:
        json_path = json_path or args.out / "stability.json"
        markdown_path = markdown_path or args.out / "stability.md"
    peers = _peers(args.peers, console)
    trials = [
        Trial(CASES[name], schedule, rate, peer, seed)
        for name in dict.fromkeys(args.case)
        for schedule in CASES[name].schedules
        for rate in dict.fromkeys(args.rates)
        for peer in peers
        for seed in range(args.seeds)
    ]
    results = Results(json_path)
    _run_all(trials, results, console)
    table = rows(results.entries)
    left = [f"{column} " for column in table[0]]
    output.print_table("verdict, worst spike, result", left, table[1:])
    try:
        if markdown_path is not None:
            write_text(markdown_path, report.markdown(table) + "\n")
        if args.plot is not None:
            survival_picture.draw(args.plot, results.entries)
    except OSError as error:
        raise CommandError(f"cannot write: {error}", 1) from error
    return results.exit_code


def _peers(names: Sequence[str], console: Console) -> list[Peer]:
    """Those asked for and installed."""
    unknown = [name for name in names if name not in OFFERED]
    if unknown:
        raise CommandError(
            f"no peer is called {unknown[0]!r}; there are: {', '.join(OFFERED)}"
        )
    peers = []
    for name in dict.fromkeys(names):
        missing = OFFERED[name].missing()
        if missing:
            console.print(
                f"{name} is left out: it needs {', '.join(missing)} "
                "(pip install 'frog-triton[peers]')"
            )
        else:
            peers.append(OFFERED[name])
    if not peers:
        raise CommandError("no optimizer is left to be run")
    return peers


def _run_all(trials: Sequence[Trial], results: Results, console: Console) -> None:
    """One after another, with a bar that counts steps."""
    with progress_bar(console, 44) as progress:
        bar = progress.add_task("", total=sum(trial.case.steps for trial in trials))
        for number, trial in enumerate(trials, 1):
            title = f"{trial.case.name}, {trial.peer.name}, lr {trial.lr:g}"
            progress.update(bar, description=f"{number}/{len(trials)} {title}")
            step = partial(progress.advance, bar)
            results.add(trial.names(), partial(survive, trial, step))
