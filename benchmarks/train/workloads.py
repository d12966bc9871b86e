"""The comparisons that ``bench train`` offers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models import resnet
from .data import images, text
from .models import GPT, small_cnn
from .peers import PEERS, Peer
from .tasks import ImageTask, Task, TextTask


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

    @property
    def deciding_target(self) -> float:
        """The second target."""
        return self.targets[min(1, len(self.targets) - 1)]


def _resnet18(channels: int, classes: int, size: int) -> nn.Module:
    return resnet(18, classes)


def _gpt(
    symbols: int, context: int, *, depth: int, width: int, heads: int
) -> nn.Module:
    return GPT(symbols, context, depth, width, heads)


def _resnet_task(source: Path, cache: Path, device: torch.device) -> Task:
    return ImageTask(images(source, cache=cache).to(device), _resnet18, 512)


def _small_task(source: Path, cache: Path, device: torch.device, *, width: int) -> Task:
    data = images(source, 10_000, cache, test_limit=5_000)
    return ImageTask(data.to(device), partial(small_cnn, width=width), 128)


def _gpt_task(
    source: Path,
    cache: Path,
    device: torch.device,
    *,
    depth: int,
    width: int,
    heads: int,
    batch_size: int,
    context: int,
) -> Task:
    network = partial(_gpt, depth=depth, width=width, heads=heads)
    return TextTask(text(source).to(device), network, batch_size, context)


def _variants(peers: Sequence[Peer]) -> tuple[Peer, ...]:
    """And the recipe's: FROG with 64 and 24 examples, SGD also at batch 128."""
    paper, sgd = PEERS["FROG paper"], PEERS["SGD"]
    own = (
        paper.with_options("FROG, 64 examples", sample_size=64),
        paper.with_options("FROG, 24 examples", sample_size=24),
        replace(sgd, name="SGD, batch 128", batch_size=128),
    )
    return own + tuple(peer for peer in peers if peer.name != paper.name)


_TEXT_LRS = {
    "AdamW": (3e-4, 1e-3, 3e-3, 1e-2),
    "SOAP": (3e-4, 1e-3, 3e-3, 1e-2),
}
_TEXT_OPTIONS: dict[str, dict[str, Any]] = {
    "Muon": {"adamw_lr": 3e-3},
    "SINGD": {"loss_average": "batch+sequence"},
}


def _for_text(peer: Peer) -> Peer:
    """With what peers need for transformers; what it varies it keeps."""
    usual = PEERS[peer.base].options if peer.base in PEERS else {}
    varied = {k: v for k, v in peer.options.items() if usual.get(k, ...) != v}
    return replace(
        peer,
        lrs=_TEXT_LRS.get(peer.base, peer.lrs),
        options={**usual, **_TEXT_OPTIONS.get(peer.base, {}), **varied},
    )


_ALL = tuple(PEERS.values())
_SMALL = Workload(
    "cifar10-small",
    "10,000 images of CIFAR-10, five convolutions; two CPU cores finish it",
    partial(_small_task, width=32),
    (0.50, 0.55, 0.60, 0.65),
    epochs=5,
    grid_epochs=2,
)
_RESNET = Workload(
    "cifar10-resnet18",
    "CIFAR-10, ResNet-18, batch 512, learning rate divided by ten twice",
    _resnet_task,
    (0.88, 0.90, 0.92, 0.94),
    epochs=160,
    grid_epochs=20,
    evaluations=2,
    schedule="step",
    peers=_variants(_ALL),
)
_GPT = Workload(
    "chars-gpt",
    "characters of a text, GPT of 6 blocks, width 384, context 256",
    partial(_gpt_task, depth=6, width=384, heads=6, batch_size=64, context=256),
    (2.0, 1.8, 1.6, 1.5),
    epochs=20,
    grid_epochs=5,
    adapt=_for_text,
)

WORKLOADS = {
    workload.name: workload
    for workload in (
        _SMALL,
        replace(
            _SMALL,
            name="cifar10-tiny",
            about="the same, with half as many channels",
            task=partial(_small_task, width=16),
        ),
        _RESNET,
        replace(
            _RESNET,
            name="cifar10-resnet18-short",
            about="the same over a short budget, one-cycle learning rate",
            epochs=24,
            grid_epochs=8,
            schedule="one-cycle",
        ),
        _GPT,
        replace(
            _GPT,
            name="chars-gpt-small",
            about="characters of a text, GPT of 2 blocks, width 64, for a CPU",
            task=partial(
                _gpt_task, depth=2, width=64, heads=4, batch_size=32, context=64
            ),
            targets=(2.4, 2.2, 2.0, 1.8),
            epochs=2,
            grid_epochs=1,
        ),
    )
}
"""All workloads by name."""
