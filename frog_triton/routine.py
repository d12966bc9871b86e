"""A step's launches, recorded once and played again with other addresses and numbers.

What a step launches follows from shapes, dtypes, strides and options; from one step to
the next only gradients and samples lie elsewhere, and rates change. So the launches are
recorded, as a CUDA graph, and each later step of the same circumstances brings the new
addresses and numbers to the device in one copy and plays the recording.

Nothing recorded may read an address that can change but through a table of the board:
`_Watch` refuses operations of torch, and launches, on such memory, and `Board.place`
tables of tensors that are neither known to move nor to lie still. A step that was
refused is taken launch by launch, as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .kernels.board import Board, Refused, placing_on
from .kernels.launch import SIZES_ALONE, Made, is_awaited, showing

MOST_MEMORY = 1 / 16
"""Of a GPU's memory that one recording may hold for what its launches hand on."""


class Graph(Protocol):
    """Records what runs on a device, and plays it again."""

    def recording(self) -> Any:
        """A context whose work is recorded, not done."""

    def replay(self) -> None:
        """Do the recorded work, at the same addresses."""

    @property
    def held(self) -> int:
        """Bytes that it keeps for what the work hands on."""


class CudaGraph:
    """A CUDA graph.

    Args:
        device: whose work is recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()
        self.held = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """See `Graph`. Other threads may use the GPU meanwhile."""
        here = torch.cuda.current_stream(self._device)
        trunk = torch.cuda.Stream(self._device)
        trunk.wait_stream(here)
        before = torch.cuda.memory_reserved(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(trunk):
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                yield
            finally:
                self._graph.capture_end()
        here.wait_stream(trunk)
        self.held = torch.cuda.memory_reserved(self._device) - before

    def replay(self) -> None:
        """See `Graph`."""
        with torch.cuda.device(self._device):
            self._graph.replay()


class Routine:
    """Recorded launches, and where their addresses come from.

    Attributes:
        found: what the recorded function has returned: tensors that each `play` fills.
        launches: of Triton kernels in a `play`.
        operations: of torch in a `play`.
    """

    def __init__(self, graph: Graph, board: Board) -> None:
        self._graph = graph
        self._board = board
        self.found: Any = None
        self.launches = 0
        self.operations = 0

    @property
    def held(self) -> int:
        """Bytes that it keeps for what its launches hand on."""
        return self._graph.held

    def play(self, addresses: Sequence[int], numbers: Sequence[Sequence[float]]) -> Any:
        """Do it all, with other tensors and numbers; returns `found`.

        Args:
            addresses: of tensors of the same sizes, dtypes, strides and alignment as
                those that it was recorded with, in the same order.
            numbers: of each group.
        """
        self._board.write(addresses, numbers)
        self._graph.replay()
        return self.found


def record(
    graph: Graph,
    work: Callable[[Board], Any],
    moving: Sequence[Tensor],
    still: Iterable[Tensor],
    words: int,
    groups: int,
    device: torch.device,
) -> Routine:
    """Record what a function launches; nothing is done.

    Args:
        graph: a new one.
        work: makes launches, given the board; never waits for the device.
        moving: dense tensors that will be others the next time.
        still: all other tensors that `work` is given.
        words: of its tables together, at most.
        groups: that have numbers.
        device: of everything.

    Raises:
        Refused: it cannot be played again.
    """
    board = Board(moving, still, words, groups, device)
    routine, watch = Routine(graph, board), _Watch(board)
    with graph.recording(), showing(watch.look), placing_on(board), watch:
        routine.found = work(board)
    routine.launches, routine.operations = watch.launches, watch.operations
    return routine


class _Watch(TorchDispatchMode):
    """Refuses operations and launches on memory that may lie elsewhere the next time.

    Their tensors are not kept: the graph's memory serves one after the other.
    """

    def __init__(self, board: Board) -> None:
        super().__init__()
        self._board = board
        self.launches = 0
        self.operations = 0

    def look(self, launch: Made) -> None:
        """Raise Refused if a launch has got an address that may change."""
        self.launches += 1
        for tensor in launch.tensors():
            if not self._board.lies_still(tensor):
                raise Refused(f"{launch.name} of a tensor that may lie elsewhere")

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not func.is_view and func._schema.name not in SIZES_ALONE:
            for tensor in tree_leaves((args, kwargs)):
                if not isinstance(tensor, Tensor):
                    continue
                if not self._board.lies_still(tensor):
                    raise Refused(f"{func} of a tensor that may lie elsewhere")
                if is_awaited(tensor):
                    raise Refused(f"{func} of a tensor that a kernel is to write first")
        made = func(*args, **kwargs)
        if not func.is_view:
            self.operations += 1
            for tensor in tree_leaves(made):
                if isinstance(tensor, Tensor):
                    self._board.bear(tensor)
        return made
