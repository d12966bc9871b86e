"""FROG: Fisher row-wise preconditioning, a second-order optimizer for PyTorch."""

from importlib.metadata import version

from .cost import cost
from .optimizer import FROG
from .preconditioner import precondition

__all__ = ["FROG", "__version__", "cost", "precondition"]

__version__ = version("frog-triton")
