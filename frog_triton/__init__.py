"""FROG: Fisher row-wise preconditioning, a second-order optimizer for PyTorch."""

from importlib.metadata import version

from .optimizer import FROG
from .preconditioner import precondition

__all__ = ["FROG", "__version__", "precondition"]

__version__ = version("frog-triton")
