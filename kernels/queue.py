"""Launches that wait for each other, so that those of one kernel are made as one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor

from .bundle import MOST, Bundle, kind
from .launch import Launch, deferring, is_deferring, make, storage_of

T = TypeVar("T")


def side_by_side(jobs: Iterable[Callable[[], T]]) -> list[T]:
    """Do jobs whose launches do not depend on each other's; return what they return.

    Launches of one kernel go together, whichever jobs make them, each job's in its
    order. They wait until all jobs are done, so a job must not let torch read or write
    what its launches do, unless it has them made before (`settle`). Views are free.
    Recordings and tests watch every operation.

    Args:
        jobs: that share no memory that any of them writes.
    """
    jobs = list(jobs)
    if len(jobs) < 2 or is_deferring():
        return [job() for job in jobs]
    queue = _Queue()
    found = []
    with deferring(queue):
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
        self._hold(list(launch.tensors()))

    def hold(self, rows: Sequence[Sequence[Tensor]]) -> None:
        """Tensors that a table of a launch addresses."""
        for row in rows:
            self._hold(row)

    def _hold(self, tensors: Sequence[Tensor]) -> None:
        self._held.append(tensors)
        self.places.update(map(storage_of, tensors))

    def flush(self) -> None:
        """Make them."""
        lanes, self.lanes = self.lanes, [[]]
        with deferring(None):
            for parts in merged(lanes):
                make(parts[0] if len(parts) == 1 else Bundle(parts))
        self.places.clear()
        self._held.clear()


def merged(lanes: Sequence[Sequence[Launch]]) -> Iterator[tuple[Launch, ...]]:
    """Launches that go together, in an order that keeps each lane's."""
    kinds: dict[Any, int] = {}
    waiting = [
        [(kinds.setdefault(kind(launch), len(kinds)), launch) for launch in lane]
        for lane in lanes
        if lane
    ]
    coming = Counter(what for lane in waiting for what, _ in lane)
    while waiting:
        # One that another lane is yet to come to waits for it.
        heads: Counter[int] = Counter()
        for lane in waiting:
            heads[lane[0][0]] += sum(what == lane[0][0] for what, _ in lane)
        due = [head for head, own in heads.items() if own == coming[head]]
        chosen = due[0] if due else max(waiting, key=len)[0][0]
        taken = [lane.pop(0)[1] for lane in waiting if lane[0][0] == chosen]
        waiting = [lane for lane in waiting if lane]
        coming[chosen] -= len(taken)
        # Long programs first, so that no few of them are left at the end.
        taken.sort(key=_length, reverse=True)
        most = int(MOST.value)
        for i in range(0, len(taken), most):
            yield tuple(taken[i : i + most])


def _length(launch: Launch) -> int:
    """Trips of a program, or programs where all have one."""
    loop = launch.kernel.loop
    return int(launch.args[loop] if loop else math.prod(launch.grid))
