"""From samples and momentum to directions: formulas only, on any backend.

Each formulation's ``solve`` returns a `Solution`, which can write its directions out or
step along them.
"""

from __future__ import annotations

from collections.abc import Callable

from . import gram, primal
from .batch import Batch, Solution, prepared

__all__ = ["FORMULATIONS", "Batch", "Solution", "prepared"]

FORMULATIONS: dict[str, Callable[..., Solution]] = {
    "primal": primal.solve,
    "gram": gram.solve,
}
