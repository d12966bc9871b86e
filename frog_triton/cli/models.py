"""Models by name, or by a factory in a file.

The names are there at once; torch is imported with the first model.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CommandError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..model.table import RoutingTable


@dataclass(frozen=True)
class Loaded:
    """A model without memory, and an input for it.

    Attributes:
        name: for reports.
        model: on the meta device.
        inputs: an example or more, or None where the factory gave none.
    """

    name: str
    model: nn.Module
    inputs: Tensor | None


Built = tuple["nn.Module", "Tensor"]


def _resnet(depth: int, classes: int, pixels: int) -> Built:
    import torch

    from ..benchmarks.models import resnet

    model = resnet(depth, classes, small_images=pixels < 64)
    return model, torch.zeros(1, 3, pixels, pixels)


def _gpt2_small() -> Built:
    import torch

    from ..benchmarks.train.models import GPT

    model = GPT(50257, context=1024, depth=12, width=768, heads=12)
    return model, torch.zeros(1, 1024, dtype=torch.int64)


BUILT_IN: dict[str, Callable[[], Built]] = {
    "resnet18": lambda: _resnet(18, 10, 32),
    "resnet50": lambda: _resnet(50, 1000, 224),
    "gpt2-small": _gpt2_small,
}
"""Factories: ResNet-18 for CIFAR, ResNet-50 for 224 pixels."""


def load(name: str) -> Loaded:
    """A built-in model, or what ``FILE.py:factory`` returns, on the meta device.

    A factory takes no arguments and returns a module, or a module and an input.

    Raises:
        CommandError: no such model, file or factory, or the factory fails.
    """
    import torch

    if name in BUILT_IN:
        with torch.device("meta"):
            return Loaded(name, *BUILT_IN[name]())
    return Loaded(name, *_from_file(name))


def _from_file(name: str) -> tuple[nn.Module, Tensor | None]:
    file, colon, factory = name.rpartition(":")
    names = ", ".join(BUILT_IN)
    if not colon or not file.endswith(".py"):
        raise CommandError(
            f"no model is called {name!r}; there are {names}, or FILE.py:factory"
        )
    path = Path(file)
    if not path.is_file():
        raise CommandError(f"{path} is not a file; pass FILE.py:factory, or {names}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # as for `python FILE.py`
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CommandError(f"{path} cannot be run: {error!r}", 1) from error
    build = getattr(module, factory, None)
    if not callable(build):
        raise CommandError(f"{path} has no function called {factory!r}")
    import torch
    from torch import nn

    try:
        with torch.device("meta"):
            made: Any = build()
    except Exception as error:
        raise CommandError(f"{name} fails: {error!r}", 1) from error
    model, inputs = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise CommandError(
            f"{name} returned {type(model).__name__}; a factory returns a module, or "
            "a module and an input tensor"
        )
    return model.to("meta"), None if inputs is None else inputs.to("meta")


def routing(model: nn.Module) -> RoutingTable:
    """Who would update each parameter, and why, with FROG's defaults."""
    from ..model.routing import route
    from ..model.table import Route, RoutingTable

    plan = route(model, dict.fromkeys(model.parameters(), 0))
    layered = plan.preconditioned()
    reasons = dict(plan.reasons)
    for name, why in plan.pending.items():
        reasons |= dict.fromkeys(plan.layers[name].params, why)
    table = RoutingTable()
    for param, name in plan.names.items():
        updated_by = "frog" if param in layered else "adamw"
        frozen = "" if param.requires_grad else "; frozen"
        reason = reasons[param] + frozen
        table.append(Route(name, tuple(param.shape), updated_by, reason))
    return table
