"""Watches the first step's calls to find a model's output layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from . import hooks
from .layers import Seen
from .outputs import OutputSearch
from .routing import Layer, Plan


class Seeker:
    """Hooks on all modules with weights, until `close`.

    Args:
        model: whose output layers are sought.
        plan: its layers.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._search = OutputSearch()
        self._plan = plan
        self._seen: set[nn.Module] = set()
        self._handles: list[RemovableHandle] = []
        users = {m for layer in plan.layers.values() for m in layer.modules}
        for module in model.modules():
            own = module.parameters(recurse=False)
            if module in users or any(p.ndim > 1 for p in own):
                self._handles.append(hooks.install(self._saw, module, "seeking"))

    def _saw(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if module.training:
            self._seen.add(module)
            self._search.saw(module, (args, kwargs), output)

    def found(self, sampled: Iterable[str]) -> set[str] | None:
        """Names of the output layers, or None if the step shows nothing.

        A guess that made samples without being seen, inside of a compiled graph or a
        checkpoint, stands.

        Args:
            sampled: names of the layers that have samples.
        """
        layers, guess = self._plan.layers, self._plan.guess
        units = self._search.found()
        if units is None:
            return None
        unseen = guess is None or self._seen.isdisjoint(layers[guess].modules)
        if guess is not None and guess in sampled and unseen:
            return {guess}
        found = {
            layer.name
            for layer in layers.values()
            if not units.isdisjoint(layer.modules) and _makes_the_output(layer)
        }
        if layers.keys() - found:
            return found
        return set() if guess is None else {guess}  # of a lone layer's model none

    def close(self) -> None:
        """Remove the hooks."""
        self._search.forget()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _makes_the_output(layer: Layer) -> bool:
    """Whether what a layer's module returns is this layer's product."""
    use = layer.uses[-1]
    weights = use.adapter.weights(use.module)
    return use.weight.seen is not Seen.REPLAY and use.weight == weights[-1]
