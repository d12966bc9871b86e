"""How kernels are launched, and how launches can be watched.

Everything that counts, compiles offline or tunes sees the very launches that a step
makes: `recording` collects them, with or without running them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .config import Config

if TYPE_CHECKING:
    from .kernel import Kernel

GRID_LIMITS = (2**31 - 1, 65535, 65535)
"""Programs along each axis at most, on every GPU (CUDA's guide)."""

SIZES_ALONE = frozenset(
    f"aten::{name}"
    for what in ("empty", "zeros", "ones", "full")
    for name in (f"new_{what}", f"{what}_like")
) | {"aten::new_empty_strided"}
"""Operations that read nothing of a tensor that they are given."""


@dataclass(frozen=True, eq=False)  # tensors have no equality to build on
class Launch:
    """One kernel launch.

    Attributes:
        kernel: what is launched.
        grid: programs along each axis.
        args: arguments by name, tensors and numbers.
        config: block sizes, warps and stages.
        leads: whether it does not merely go on with what another began for the same
            product.

    Raises:
        ValueError: no GPU can launch such a grid.
    """

    kernel: Kernel
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    config: Config
    leads: bool = True

    def __post_init__(self) -> None:
        if any(n > limit for n, limit in zip(self.grid, GRID_LIMITS, strict=False)):
            raise ValueError(
                f"{self.name}: CUDA has no grid of {self.grid} programs, the limits "
                f"are {GRID_LIMITS}. The first axis counts blocks of rows and weights, "
                "the second layers of one geometry times their groups, the third "
                "blocks of samples. Train these layers with backend='torch', or leave "
                "them to the fallback with exclude="
            )

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.name

    @property
    def parts(self) -> tuple[Launch, ...]:
        """What is launched, by geometry; a `Bundle` has several."""
        return (self,)

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that it is given."""
        for value in self.args.values():
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, torch.Tensor):
                    yield each

    def compile(self) -> Any:
        """What Triton makes of it for the active GPU, a ``CompiledKernel``."""
        options = self.config.options()
        return self.kernel.fn.warmup(grid=self.grid, **self.args, **options)

    def run(self) -> Any:
        """Launch; returns what Triton has compiled for it, but in the interpreter."""
        first = next(self.tensors())
        # Triton launches on the current device, which need not be the tensors'.
        on_device = torch.cuda.device(first.device) if first.is_cuda else nullcontext()
        with on_device:
            return self.kernel.fn[self.grid](**self.args, **self.config.options())


class Made(Protocol):
    """A launch, or several as one."""

    @property
    def name(self) -> str:
        """The kernel's name."""

    @property
    def kernel(self) -> Kernel:
        """What is launched."""

    @property
    def parts(self) -> tuple[Launch, ...]:
        """What is launched, by geometry."""

    @property
    def grid(self) -> tuple[int, ...]:
        """Programs along each axis."""

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that it is given."""

    def compile(self) -> Any:
        """What Triton makes of it for the active GPU, a ``CompiledKernel``."""

    def run(self) -> Any:
        """Launch; returns what Triton has compiled for it, but in the interpreter."""


class Launches(list[Made]):
    """Launches, and the tensors that their tables of addresses speak of.

    Attributes:
        tensors: held, so that a launch can be run again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Any] = []

    @property
    def parts(self) -> list[Launch]:
        """What is launched, by geometry."""
        return [part for made in self for part in made.parts]


@dataclass
class Recording:
    """Launches made while it was active.

    Attributes:
        run: whether the kernels run, too.
        launches: in order.
    """

    run: bool
    launches: Launches


_RECORDING: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextmanager
def recording(run: bool = True) -> Iterator[Launches]:
    """Collect the launches made in this context.

    Args:
        run: run them, too. Otherwise results are undefined, but no GPU is needed.
    """
    current = Recording(run, Launches())
    token = _RECORDING.set(current)
    try:
        with deferring(None):  # what waits around this context is no part of it
            yield current.launches
    finally:
        _RECORDING.reset(token)


def hold(rows: Sequence[Sequence[torch.Tensor]]) -> None:
    """Keep tensors that a table addresses alive until launches have read them.

    A recording of now keeps them as long as itself.
    """
    current = _RECORDING.get()
    if current is not None:
        current.launches.tensors.append(rows)
    queue = _QUEUE.get()
    if queue is not None:
        queue.hold(rows)


def storage_of(tensor: torch.Tensor) -> int:
    """Which storage a tensor is in, be it one without memory."""
    found: int = tensor.untyped_storage()._cdata
    return found


class Queue(Protocol):
    """Launches that wait.

    Attributes:
        places: storages of what they read and write.
    """

    places: set[int]

    def add(self, launch: Launch) -> None:
        """One more."""

    def hold(self, rows: Sequence[Sequence[torch.Tensor]]) -> None:
        """Tensors that a table of a launch addresses."""

    def flush(self) -> None:
        """Make them."""


_QUEUE: ContextVar[Queue | None] = ContextVar("queue", default=None)


@contextmanager
def deferring(queue: Queue | None) -> Iterator[None]:
    """Let launches of this context wait in a queue; None makes them at once."""
    token = _QUEUE.set(queue)
    try:
        yield
    finally:
        _QUEUE.reset(token)


def is_deferring() -> bool:
    """Whether launches wait now."""
    return _QUEUE.get() is not None


def settle() -> None:
    """Make launches that wait, before torch reads or writes what they do."""
    queue = _QUEUE.get()
    if queue is not None:
        queue.flush()


def is_awaited(tensor: torch.Tensor) -> bool:
    """Whether a launch that waits reads or writes a tensor, or what it is a view of."""
    queue = _QUEUE.get()
    return queue is not None and storage_of(tensor) in queue.places


_SHOWN: ContextVar[Callable[[Made], None] | None] = ContextVar("shown", default=None)


@contextmanager
def showing(look: Callable[[Made], None]) -> Iterator[None]:
    """Show each launch of this context before it is made; none of it is kept.

    Args:
        look: raises for one that must not be made.
    """
    token = _SHOWN.set(look)
    try:
        yield
    finally:
        _SHOWN.reset(token)


def is_recording() -> bool:
    """Whether launches are collected now."""
    return _RECORDING.get() is not None


def launch(made: Launch) -> None:
    """Launch, unless a recording only counts, now or when its queue does."""
    queue = _QUEUE.get()
    if queue is None:
        make(made)
    else:
        queue.add(made)


def make(made: Made) -> None:
    """Launch now, unless a recording only counts."""
    look = _SHOWN.get()
    if look is not None:
        look(made)
    current = _RECORDING.get()
    if current is not None:
        current.launches.append(made)
        if not current.run:
            return
    made.run()
