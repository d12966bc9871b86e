"""FROG: Fisher row-wise preconditioning, a second-order optimizer for PyTorch.

Public names are found when they are first asked for: importing the package, as its
command line does, does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import layers as layers  # frog_triton.layers.register
    from .capture.functional import linear
    from .costs import cost
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

__version__ = "0.2.0"

_HOMES = {
    "FROG": ".optimizer",
    "PAPER": ".presets",
    "cost": ".costs",
    "linear": ".capture.functional",
    "precondition": ".preconditioner",
}
"""Where the public names are defined. No module may be called like one of them."""


if not TYPE_CHECKING:  # it would be a type for every name

    def __getattr__(name: str) -> Any:
        if name == "layers":
            return import_module(".layers", __name__)
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(_HOMES[name], __name__), name)
        return found


def __dir__() -> list[str]:
    """The public names alone: modules inside are no part of the interface."""
    return sorted([*__all__, "layers"])
