"""What a step asks of the ranks that train together, be it one or many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..capture.capture import SampleCapture
from ..linalg.numbers import Numbers
from ..model.plan import Layer
from ..step import LayerStep, Samples
from ..unhooked import Known
from ..update import Directions, Solved

if TYPE_CHECKING:
    import torch.distributed as dist


class World(Protocol):
    """The ranks that train one model together, as one of them sees them."""

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Of the ranks; None where there is one."""

    @property
    def alone(self) -> bool:
        """Whether this is the only rank, so that a step waits for nobody."""

    @property
    def leads(self) -> bool:
        """Whether this is the rank that speaks to the user."""

    def share(self, sample_size: int, seed: int) -> tuple[int, int]:
        """How many samples this rank draws, and its seed: ranks draw different ones.

        Args:
            sample_size: of all ranks together.
            seed: of all ranks.
        """

    def rows_here(self, layer: Layer) -> int:
        """How many rows of a layer this rank solves."""

    def counted(self, layer: Layer) -> slice:
        """Which of the rows held here this rank solves."""

    def changed(self) -> None:
        """Groups or layers have changed: the next `verify` is to look again."""

    def verify(
        self,
        settings: Callable[[], dict[str, Any]],
        groups: Iterable[Mapping[str, Any]],
        problem: str | None,
    ) -> None:
        """Check that all ranks are set up alike, unless they were already.

        Args:
            settings: gives those of the optimizer, by name.
            groups: parameter groups; gradients must be the same on all ranks that hold
                them.
            problem: what is wrong with gradients here.

        Raises:
            RuntimeError: ranks differ, the same on all of them.
        """

    def agree(
        self,
        layers: Sequence[Layer],
        capture: SampleCapture,
        known: Known,
        found_inf: Tensor | None,
    ) -> tuple[Known, Tensor | None]:
        """Tell the others what this rank knows and brings, and hear them.

        Args:
            layers: all that are preconditioned, the same on all ranks.
            capture: holds this rank's samples.
            known: here.
            found_inf: not 0 where a gradient is not finite here; None where none is
                known to be.

        Returns:
            Both, of all ranks.

        Raises:
            RuntimeError: a layer has a gradient on some ranks only; on all ranks.
        """

    def send_samples(self, layers: Sequence[Layer]) -> None:
        """Send each rank the samples of the rows that it solves.

        Args:
            layers: that have a gradient, the same on all ranks.
        """

    def samples(
        self, layer: Layer, bias: bool, dtype: torch.dtype, capture: SampleCapture
    ) -> Samples:
        """All ranks' samples for this rank's rows, or a zero if no rank has any.

        Args:
            layer: whose.
            bias: whether its bias takes part.
            dtype: of the momentum.
            capture: holds this rank's samples.
        """

    def own(
        self, steps: Sequence[LayerStep], numbers: Numbers, nesterov: bool
    ) -> Sequence[LayerStep]:
        """The part of the steps that falls to this rank, ready to be solved.

        Momentum that other ranks hold as well is updated here, whole: equal gradients
        keep it equal on all of them, and any rank's state is complete.

        Args:
            steps: of all rows that this rank holds, Y of those that it solves.
            numbers: of the group.
            nesterov: whether ``G + beta M`` is preconditioned.
        """

    def pieces(self, steps: Sequence[LayerStep]) -> Sequence[LayerStep]:
        """The rows of these steps that this rank solves."""

    def share_rows(self, steps: Sequence[LayerStep]) -> None:
        """Send updated rows to the ranks that hold them, too.

        Args:
            steps: of all rows that this rank holds.
        """

    def whole(
        self,
        steps: Sequence[LayerStep],
        solved: Iterable[Sequence[Solved]],
        numbers: Numbers,
    ) -> Iterable[Sequence[Directions]]:
        """Directions with all rows of their layers, whoever has solved them.

        Every rank must exhaust the result: it communicates on the way.

        Args:
            steps: of all rows that this rank holds.
            solved: those that it solves, a portion an item.
            numbers: of the group.
        """

    def describe(self, layer: Layer) -> str:
        """What this rank does for a layer, with the bytes it last sent."""

    def summary(self) -> str:
        """One line on the ranks, and on the bytes that this one last sent."""
