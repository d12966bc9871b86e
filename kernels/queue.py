"""Launches that wait for each other, so that those of one kernel are made as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .bundle import MOST, Bundle, kind
from .launch import SIZES_ALONE, Launch, deferring, is_deferring, make

T = TypeVar("T")


def side_by_side(jobs: Iterable[Callable[[], T]]) -> list[T]:
    """Do jobs whose launches do not depend on each other's; return what they return.

    Launches of one kernel go together, whichever jobs make them, each job's in its
    order. They wait until all jobs are done, or until an operation of torch's would
    read or write what one of them does.

    Args:
        jobs: that share no memory that any of them writes.
    """
    jobs = list(jobs)
    if len(jobs) < 2 or is_deferring():
        return [job() for job in jobs]
    queue = _Queue()
    found = []
    with deferring(queue), _Ahead(queue):
        for job in jobs:
            queue.lanes.append([])
            found.append(job())
    queue.flush()
    return found


class _Queue:
    """Launches that wait.

    Attributes:
        lanes: those of each job.
        places: storages of their tensors.
    """

    def __init__(self) -> None:
        self.lanes: list[list[Launch]] = []
        self.places: set[int] = set()
        self._held: list[Any] = []

    def add(self, launch: Launch) -> None:
        """One more, of the last job."""
        self.lanes[-1].append(launch)
        self.hold(list(launch.tensors()))

    def hold(self, tensors: Any) -> None:
        """Tensors of a launch, or of a table that a launch reads."""
        self._held.append(tensors)
        self.places |= {place(t) for t in tree_leaves(tensors) if torch.is_tensor(t)}

    def flush(self) -> None:
        """Make them."""
        lanes, self.lanes = self.lanes, [[]]
        with deferring(None):
            for parts in merged(lanes):
                make(parts[0] if len(parts) == 1 else Bundle(parts))
        self.places.clear()
        self._held.clear()


def place(tensor: Tensor) -> int:
    """Which storage a tensor is in, be it one without memory."""
    found: int = tensor.untyped_storage()._cdata
    return found


def merged(lanes: Sequence[Sequence[Launch]]) -> Iterator[tuple[Launch, ...]]:
    """Launches that go together, in an order that keeps each lane's."""
    waiting = [[(kind(launch), launch) for launch in lane] for lane in lanes if lane]
    while waiting:
        # One that another lane is yet to come to waits for it.
        behind = {lane[0][0]: set[Any]() for lane in waiting}
        for lane in waiting:
            for head, later in behind.items():
                if lane[0][0] != head:
                    later.update(what for what, _ in lane[1:])
        chosen = next(
            (head for head, later in behind.items() if head not in later), None
        )
        chosen = chosen or max(waiting, key=len)[0][0]
        taken = [lane.pop(0)[1] for lane in waiting if lane[0][0] == chosen]
        waiting = [lane for lane in waiting if lane]
        # Long programs first, so that no few of them are left at the end.
        taken.sort(key=_length, reverse=True)
        most = int(MOST.value)
        for i in range(0, len(taken), most):
            yield tuple(taken[i : i + most])


def _length(launch: Launch) -> int:
    """Trips of a program, or programs where all have one."""
    loop = launch.kernel.loop
    return int(launch.args[loop] if loop else math.prod(launch.grid))


class _Ahead(TorchDispatchMode):
    """Makes launches that wait, before torch reads or writes what they do."""

    def __init__(self, queue: _Queue) -> None:
        super().__init__()
        self._queue = queue

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        queue, kwargs = self._queue, kwargs or {}
        if queue.places and not func.is_view and func._schema.name not in SIZES_ALONE:
            tensors = filter(torch.is_tensor, tree_leaves((args, kwargs)))
            if any(place(tensor) in queue.places for tensor in tensors):
                queue.flush()
        return func(*args, **kwargs)
