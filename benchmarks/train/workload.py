"""What a comparison is: a task with targets, budget and peers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .peers import PEERS, Peer
from .tasks import Task


@dataclass(frozen=True)
class Workload:
    """A task with the targets, the budget and the peers it is usually run with.

    Attributes:
        name: on the command line.
        about: one line of help.
        task: makes the task from the data's path, the cache's and the device.
        targets: of the metric, from easy to hard; the second decides among settings.
        epochs: of the runs that are reported.
        grid_epochs: of the runs that search for settings.
        evaluations: how often an epoch the metric is taken in the reported runs.
        schedule: one of `loop.SCHEDULES`.
        peers: who takes part, unless the command line says otherwise.
        adapt: gives a peer, or a study's variant of one, the settings usual here.
        reads: what `task` needs a path to: ``"images"``, ``"text"``, or "" for none.
        needs: packages that must be installed.
    """

    name: str
    about: str
    task: Callable[[Path, Path, torch.device], Task]
    targets: tuple[float, ...]
    epochs: int
    grid_epochs: int
    evaluations: int = 3
    schedule: str = "one-cycle"
    peers: tuple[Peer, ...] = tuple(PEERS.values())
    adapt: Callable[[Peer], Peer] = lambda peer: peer
    reads: str = ""
    needs: tuple[str, ...] = ()

    @property
    def deciding_target(self) -> float:
        """The second target."""
        return self.targets[min(1, len(self.targets) - 1)]

    def missing(self) -> list[str]:
        """Packages that it needs and that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


_TEXT_LRS = {
    "SOAP": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
_TEXT_OPTIONS: dict[str, dict[str, Any]] = {
    "Muon": {"adamw_lr": 3e-3},
    "SINGD": {"loss_average": "batch+sequence"},
}


def for_sequences(peer: Peer) -> Peer:
    """A peer with what it needs for transformers; what it varies it keeps."""
    usual = PEERS[peer.base].options if peer.base in PEERS else {}
    varied = {k: v for k, v in peer.options.items() if usual.get(k, ...) != v}
    return replace(
        peer,
        lrs=_TEXT_LRS.get(peer.base, peer.lrs),
        options={**usual, **_TEXT_OPTIONS.get(peer.base, {}), **varied},
    )
