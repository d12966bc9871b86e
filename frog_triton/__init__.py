"""FROG: Fisher row-wise preconditioning, a second-order optimizer for PyTorch."""

from importlib.metadata import version

from . import layers as layers  # frog_triton.layers.register
from .capture.functional import linear
from .cost import cost
from .optimizer import FROG
from .preconditioner import precondition
from .presets import PAPER

__all__ = [
    "FROG",
    "PAPER",
    "__version__",
    "cost",
    "linear",
    "precondition",
]

__version__ = version("frog-triton")


def __dir__() -> list[str]:
    """The public names alone: modules inside are no part of the interface."""
    return sorted([*__all__, "layers"])
