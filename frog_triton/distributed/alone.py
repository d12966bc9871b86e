"""A world of one rank, which solves all rows from its own samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..capture.capture import SampleCapture
from ..linalg.numbers import Numbers
from ..model.plan import Layer
from ..step import LayerStep, Samples, no_samples
from ..unhooked import Known
from ..update import Solved


class Alone:
    """One rank: there is nobody to ask or to tell. See `World` for all methods."""

    group = None
    alone = True
    leads = True

    def share(self, sample_size: int, seed: int) -> tuple[int, int]:
        """All samples, from the user's seed."""
        return sample_size, seed

    def rows_here(self, layer: Layer) -> int:
        """All rows."""
        return layer.geometry.rows

    def counted(self, layer: Layer) -> slice:
        """All rows."""
        return slice(None)

    def changed(self) -> None:
        """Nothing is compared."""

    def verify(
        self,
        settings: Callable[[], dict[str, Any]],
        groups: Iterable[Mapping[str, Any]],
        problem: str | None,
    ) -> None:
        """Nothing to compare with."""

    def agree(
        self,
        layers: Sequence[Layer],
        capture: SampleCapture,
        known: Known,
        found_inf: Tensor | None,
    ) -> tuple[Known, Tensor | None]:
        """What is known here is all there is to know."""
        return known, found_inf

    def send_samples(self, layers: Sequence[Layer]) -> None:
        """They stay where they are."""

    def samples(
        self, layer: Layer, bias: bool, dtype: torch.dtype, capture: SampleCapture
    ) -> Samples:
        """Those taken here."""
        return capture.samples(layer, bias) or no_samples(layer, bias, dtype)

    def own(
        self, steps: Sequence[LayerStep], numbers: Numbers, nesterov: bool
    ) -> Sequence[LayerStep]:
        """All of them; a solve advances the momentum itself."""
        return steps

    def pieces(self, steps: Sequence[LayerStep]) -> Sequence[LayerStep]:
        """All of them, whole."""
        return steps

    def share_rows(self, steps: Sequence[LayerStep]) -> None:
        """Nobody else holds them."""

    def whole(
        self,
        steps: Sequence[LayerStep],
        solved: Iterable[Sequence[Solved]],
        numbers: Numbers,
    ) -> Iterable[Sequence[Solved]]:
        """They are whole as they were solved."""
        return solved

    def describe(self, layer: Layer) -> str:
        """Nothing to say."""
        return ""

    def summary(self) -> str:
        """Nothing to say."""
        return ""
