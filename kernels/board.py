"""How words (addresses, numbers) of the host's come to the device.

A table is one copy. With a *page* all that a captured CUDA graph reads from the host is
one; a *board* is brought up to date, where anything has changed, in one as well.

Launches that a CUDA graph has captured read addresses from tables on the device. A
board holds all tables of such launches, and knows which of their addresses belong to
tensors that will lie elsewhere the next time (gradients, samples). All others must lie
still; what may do neither is refused, so that no launch ever reads an old address.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor


class Pages:
    """Memory of the host for CUDA graphs that a user captures.

    It is found ahead, by steps that are not captured: none may be while capturing.

    Attributes:
        spare: a page for the next graph, if one may be captured.
        used: those of graphs; they must live as long.
        words: that the last step has sent to the device.
    """

    def __init__(self) -> None:
        self.spare: Tensor | None = None
        self.used: list[Tensor] = []
        self.words = 0

    def prepare(self) -> None:
        """Have a page with room for a step like the last, unless one is captured."""
        if not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
            return
        room = self.words + self.words // 4 + 1024
        if self.spare is None or len(self.spare) < room:
            host = torch.device("cpu")  # whatever device is the default
            self.spare = torch.zeros(
                room, dtype=torch.int64, device=host, pin_memory=True
            )

    def take(self) -> Tensor:
        """The page for a graph that is being captured."""
        if self.spare is None:
            raise RuntimeError(
                "take a few steps with capturable=True before a CUDA graph is captured"
            )
        page, self.spare = self.spare, None
        self.used.append(page)
        return page


def room_of(words: Sequence[int]) -> int:
    """Words that they take, so that the next begin at a multiple of 16 bytes.

    Triton makes another kernel for a table that does not, and bundles take it for one
    of another kind.
    """
    return len(words) + len(words) % 2


class _Book:
    """Words of one step."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self._page: Tensor | None = None
        self._block: Tensor | None = None
        self._used = 0
        pages.words = 0

    def place(self, words: Sequence[int], device: torch.device) -> Tensor:
        """Where the words will be when the graph that is being captured runs.

        First of all it copies the page, on which the words are written after that copy
        was captured, and before it is made.
        """
        if self._page is None or self._block is None:
            self._page = self.pages.take()
            self._block = torch.empty_like(self._page, device=device)
            self._block.copy_(self._page, non_blocking=True)
        first, last = self._used, self._used + len(words)
        self._used = first + room_of(words)
        if self._used > len(self._page) or device != self._block.device:
            raise RuntimeError(
                "this step needs more words of the host than those before the capture: "
                "take a few steps like it first"
            )
        self._page.numpy()[first:last] = words
        return self._block[first:last]


_BOOK: ContextVar[_Book | None] = ContextVar("book", default=None)


@contextmanager
def paging(pages: Pages) -> Iterator[None]:
    """A step's words; those of a CUDA graph that captures it are one copy."""
    token = _BOOK.set(_Book(pages))
    try:
        yield
    finally:
        _BOOK.reset(token)


def uploaded(words: Sequence[int], device: torch.device) -> Tensor:
    """Words on a device, int64, without waiting for it."""
    book = _BOOK.get()
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if book is None:
            raise RuntimeError("words for a CUDA graph outside of `paging`")
        return book.place(words, device)
    if book is not None:
        book.pages.words += room_of(words)
    # Pinned memory of the caching allocator: it is not given away again before the
    # copy has been made.
    pinned = device.type == "cuda"
    host = torch.empty(len(words), dtype=torch.int64, device="cpu", pin_memory=pinned)
    host.numpy()[:] = words
    return host.to(device, non_blocking=True)


class Refused(Exception):  # noqa: N818
    """What was to be recorded would not be right the next time."""


def place_of(tensor: Tensor) -> int:
    """Where a tensor's storage begins in memory; equal for all views of it."""
    return tensor.untyped_storage().data_ptr()


class Board:
    """Addresses in tables on the device.

    Args:
        moving: dense tensors that will be others the next time, of the same sizes.
        still: tensors that will be the same; so are all that are born while the board
            is in use (`bear`).
        words: of all tables together, at most.
        numbers: how many sets of a group's numbers there will be.
        device: of everything.

    Attributes:
        numbers: of each group, a float64 view of the block ``(WIDTH,)``.
    """

    WIDTH = 8
    """Numbers of a group, and some to spare."""

    def __init__(
        self,
        moving: Sequence[Tensor],
        still: Iterable[Tensor],
        words: int,
        numbers: int,
        device: torch.device,
    ) -> None:
        self._block = torch.zeros(words, dtype=torch.int64, device=device)
        self._words = np.zeros(words, dtype=np.int64)
        self._sent: np.ndarray | None = None
        self._used = numbers * self.WIDTH
        head = self._block[: self._used].view(torch.float64)
        self.numbers = list(head.view(numbers, self.WIDTH).unbind())
        self._numbers = self._words[: self._used].view(np.float64)
        found = [(t.data_ptr(), i) for i, t in enumerate(moving) if t.numel()]
        found.sort()
        self._begins = [begin for begin, _ in found]
        self._which = [i for _, i in found]
        self._ends = [moving[i].data_ptr() + moving[i].nbytes for _, i in found]
        if any(e > b for e, b in zip(self._ends, self._begins[1:], strict=False)):
            raise Refused("gradients or samples that share memory")
        moving_places = {place_of(moving[i]) for _, i in found}
        self._still = {place_of(t) for t in still} - moving_places
        self._still.add(place_of(self._block))
        self._moves: list[tuple[int, int, int]] = []  # word, tensor, offset in bytes
        self._patches: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def bear(self, tensor: Tensor) -> None:
        """A tensor was made while recording: it lies where it lies for good."""
        self._still.add(place_of(tensor))

    def lies_still(self, tensor: Tensor) -> bool:
        """Whether a tensor will be at the same place the next time."""
        return not tensor.numel() or place_of(tensor) in self._still

    def place(self, words: Sequence[int], tensors: Sequence[Tensor | None]) -> Tensor:
        """A table of addresses on the device.

        Args:
            words: the addresses now, and words that stay.
            tensors: that they are of; None for words that are no addresses.

        Raises:
            Refused: a tensor neither moves nor lies still, or the board is full.
        """
        first, last = self._used, self._used + len(words)
        self._used = first + room_of(words)
        if self._used > len(self._words):
            raise Refused("more tables than were expected")
        for i, (word, tensor) in enumerate(zip(words, tensors, strict=True)):
            if tensor is None:
                self._words[first + i] = word
            if tensor is None or not tensor.numel():
                continue
            at = bisect_right(self._begins, word) - 1
            if at >= 0 and word < self._ends[at]:
                self._moves.append(
                    (first + i, self._which[at], word - self._begins[at])
                )
            elif place_of(tensor) not in self._still:
                raise Refused("a tensor that is neither here nor there")
            self._words[first + i] = word
        return self._block[first:last]

    def write(
        self, addresses: Sequence[int], numbers: Sequence[Sequence[float]]
    ) -> bool:
        """Bring the tables up to date, in one copy if anything has changed.

        Args:
            addresses: of the tensors that move, in their order.
            numbers: of each group, in theirs.

        Returns:
            Whether anything was copied.
        """
        if self._patches is None:
            moves = np.array(self._moves, dtype=np.int64).reshape(-1, 3)
            self._patches = (moves[:, 0], moves[:, 1], moves[:, 2])
        words, which, offsets = self._patches
        self._words[words] = np.asarray(addresses, dtype=np.int64)[which] + offsets
        for i, group in enumerate(numbers):
            begin = i * self.WIDTH
            self._numbers[begin : begin + len(group)] = group
        now = self._words[: self._used]
        if self._sent is not None and np.array_equal(self._sent, now):
            return False
        host = torch.empty(
            self._used,
            dtype=torch.int64,
            device="cpu",
            pin_memory=self._block.is_cuda,  # as above
        )
        host.numpy()[:] = now
        self._block[: self._used].copy_(host, non_blocking=True)
        self._sent = now.copy()
        return True


_BOARD: ContextVar[Board | None] = ContextVar("board", default=None)


@contextmanager
def placing_on(board: Board) -> Iterator[None]:
    """Tables made in this context are the board's."""
    token = _BOARD.set(board)
    try:
        yield
    finally:
        _BOARD.reset(token)


def board_in_use() -> Board | None:
    """The board that tables are to be placed on, if any."""
    return _BOARD.get()
