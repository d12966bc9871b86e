"""How kernels are launched, and how launches can be watched.

Everything that counts, compiles offline or tunes sees the very launches that a step
makes: `recording` collects them, with or without running them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .config import Config

if TYPE_CHECKING:
    from .kernel import Kernel

GRID_LIMITS = (2**31 - 1, 65535, 65535)
"""Programs along each axis at most, on every GPU (CUDA's guide)."""


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

    def compile(self) -> Any:
        """What Triton makes of it for the active GPU, a ``CompiledKernel``."""
        options = self.config.options()
        return self.kernel.fn.warmup(grid=self.grid, **self.args, **options)

    def run(self) -> Any:
        """Launch; returns what Triton has compiled for it, but in the interpreter."""
        first = next(a for a in self.args.values() if isinstance(a, torch.Tensor))
        # Triton launches on the current device, which need not be the tensors'.
        on_device = torch.cuda.device(first.device) if first.is_cuda else nullcontext()
        with on_device:
            return self.kernel.fn[self.grid](**self.args, **self.config.options())


class Launches(list[Launch]):
    """Launches, and the tensors that their tables of addresses speak of.

    Attributes:
        tensors: held, so that a launch can be run again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Any] = []


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
        yield current.launches
    finally:
        _RECORDING.reset(token)


def hold(tensors: Any) -> None:
    """Keep tensors that a table addresses alive as long as a recording of now."""
    current = _RECORDING.get()
    if current is not None:
        current.launches.tensors.append(tensors)


_SHOWN: ContextVar[Callable[[Launch], None] | None] = ContextVar("shown", default=None)


@contextmanager
def showing(look: Callable[[Launch], None]) -> Iterator[None]:
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
    """Launch, unless a recording only counts."""
    look = _SHOWN.get()
    if look is not None:
        look(made)
    current = _RECORDING.get()
    if current is not None:
        current.launches.append(made)
        if not current.run:
            return
    made.run()
