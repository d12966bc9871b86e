"""Ranks that train one model together: who solves which rows, from whose samples.

All ranks solve the same systems. Each draws its share of the samples from its own part
of the batch; the rank that solves a row is sent all of X, and of Y the row's column. A
rank holds some rows of a layer (all of them, or its shard), and solves those that are
its own; where other ranks hold the same rows, the updated rows go to them. A step makes
three kinds of collectives, each over all layers at once: what each rank brings
(integers), the samples, and the updated rows. To orthogonalize, which takes whole
layers, directions go to all ranks instead of updated rows; each rank orthogonalizes
them all and updates the rows that it holds.

A world of one rank has the same methods, so that a step need not ask. Sharded tensors
take half a second to import, so all modules of this package but `world` and `alone` are
imported where a process group exists, and only there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn

from ..model.plan import Layer, Plan
from .alone import Alone
from .world import World

if TYPE_CHECKING:
    from .division import Group

__all__ = ["World", "check_parallelism", "check_placements", "find_world"]


def check_parallelism(
    model: nn.Module, layers: Iterable[Layer], names: Mapping[nn.Parameter, str]
) -> None:
    """See `division.check_parallelism`; nothing to check without a process group."""
    if _is_initialized():
        from . import division

        division.check_parallelism(model, layers, names)


def check_placements(
    layers: Iterable[Layer], names: Mapping[nn.Parameter, str], process_group: Group
) -> None:
    """See `division.check_placements`; nothing to check without a process group."""
    if _is_initialized():
        from . import division

        division.check_placements(layers, names, process_group)


def find_world(
    plan: Plan, process_group: Group, capturable: bool, sample_steps: int = 1
) -> World:
    """The ranks that train the plan's layers.

    Args:
        plan: all that is preconditioned.
        process_group: the user's; see `FROG`.
        capturable: whether nothing may wait for the device.
        sample_steps: see `FROG`.

    Raises:
        ValueError: several ranks are to be capturable, or to keep samples.
    """
    if not _is_initialized():
        return Alone()
    from .division import find_division
    from .ranks import Ranks

    division = find_division(plan.layers.values(), plan.names, process_group)
    if division is None:
        return Alone()
    if capturable:
        raise ValueError(
            "capturable=True goes with one rank only: several agree on how "
            "many samples each brings, on the host; leave capturable out"
        )
    if sample_steps > 1:
        raise ValueError(
            f"sample_steps={sample_steps} goes with one rank only: no rank has all "
            "samples of a layer, or the same rows in every step; leave sample_steps "
            "out, or pass process_group=False to train on each rank alone"
        )
    return Ranks(division)


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
