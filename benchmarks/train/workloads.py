"""The comparisons that ``bench train`` offers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..models import resnet
from .data import images, text
from .models import GPT, ViT, small_cnn
from .peers import PEERS, Peer
from .problems import PROBLEMS
from .tasks import ImageTask, Task, TextTask
from .workload import Workload, for_sequences


def _resnet18(channels: int, classes: int, size: int) -> nn.Module:
    return resnet(18, classes)


def _resnet50(channels: int, classes: int, size: int) -> nn.Module:
    return resnet(50, classes, small_images=size < 64)


def _vit_small(channels: int, classes: int, size: int) -> nn.Module:
    return ViT(channels, classes, size, patch=16, depth=12, width=384, heads=6)


def _images_task(
    source: Path,
    cache: Path,
    device: torch.device,
    *,
    network: Callable[[int, int, int], nn.Module],
) -> Task:
    return ImageTask(images(source, cache=cache).to(device), network, 256)


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


_ALL = tuple(PEERS.values())
_SMALL = Workload(
    "cifar10-small",
    "10,000 images of CIFAR-10, five convolutions; two CPU cores finish it",
    partial(_small_task, width=32),
    (0.50, 0.55, 0.60, 0.65),
    epochs=5,
    grid_epochs=2,
    reads="images",
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
    reads="images",
)
_GPT = Workload(
    "chars-gpt",
    "characters of a text, GPT of 6 blocks, width 384, context 256",
    partial(_gpt_task, depth=6, width=384, heads=6, batch_size=64, context=256),
    (2.0, 1.8, 1.6, 1.5),
    epochs=20,
    grid_epochs=5,
    adapt=for_sequences,
    reads="text",
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
        Workload(
            "images-resnet50",
            "images of a folder, all of one size, ResNet-50, batch 256",
            partial(_images_task, network=_resnet50),
            (0.50, 0.70, 0.80),
            epochs=18,
            grid_epochs=6,
            evaluations=1,
            reads="images",
        ),
        Workload(
            "images-vit-s",
            "images of a folder, of a multiple of 16 pixels, ViT-S/16, batch 256",
            partial(_images_task, network=_vit_small),
            (0.30, 0.50, 0.60),
            epochs=30,
            grid_epochs=10,
            evaluations=1,
            reads="images",
        ),
        _GPT,
        replace(
            _GPT,
            name="text-gpt2",
            about="a text's characters, or tokens in uint16 in a .bin, GPT-2 small "
            "with context 1,024, batch 16",
            task=partial(
                _gpt_task, depth=12, width=768, heads=12, batch_size=16, context=1024
            ),
            targets=(6.0, 5.0, 4.0),
            epochs=1,
            grid_epochs=1,
            evaluations=20,
        ),
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
        *PROBLEMS.values(),
    )
}
"""All workloads by name."""
