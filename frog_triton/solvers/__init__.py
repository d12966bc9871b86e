"""Conjugate gradients for all rows of a layer, in two formulations.

They know formulas only: the backend is passed in as ``ops``. Each ``solve`` returns a
`Solution`, which can write its directions out or step along them.
"""

from __future__ import annotations

from collections.abc import Callable

from . import cg, gram
from .base import Batch, Solution, prepared

__all__ = ["FORMULATIONS", "Batch", "Solution", "prepared"]

FORMULATIONS: dict[str, Callable[..., Solution]] = {
    "primal": cg.solve,
    "gram": gram.solve,
}
