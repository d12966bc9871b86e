"""Watches a step's calls to find a model's output layers."""

from __future__ import annotations

from collections.abc import Hashable, Set
from typing import Any

import torch
from torch import nn

from ..layers import Seen
from ..model.outputs import OutputSearch
from ..model.plan import Layer, Plan
from . import hooks


class Outputs:
    """Which layers of a model are outputs, as far as its steps have shown.

    Each layer is decided once, in the first step in which it can be. Layers without a
    gradient so far are watched again when they have one.

    Args:
        model: that is trained.
        stilled: takes hooks that could not be removed.

    Attributes:
        decided: names of the layers that are decided.
    """

    def __init__(self, model: nn.Module, stilled: list[hooks.Installed]) -> None:
        self._model = model
        self._stilled = stilled
        self._plan = Plan()
        self._seeker: Seeker | None = None
        self.decided: set[str] = set()

    def seek(self, plan: Plan) -> None:
        """Watch the next step's calls, if they are to show or to confirm anything."""
        self.close()
        self._plan = plan
        if plan.search or plan.named:
            self._seeker = Seeker(self._model, plan)

    def close(self) -> None:
        """Watch no more."""
        if self._seeker is not None:
            self._stilled += self._seeker.close()
            self._seeker = None

    @property
    def seeking(self) -> bool:
        """Whether calls are watched."""
        return self._seeker is not None

    def forget(self) -> None:
        """Gradients so far are dropped: see `OutputSearch.forget`."""
        if self._seeker is not None:
            self._seeker.forget()

    def look(self, sampled: Set[str]) -> tuple[set[str], set[str]]:
        """Names of the layers that this step decides, and of those that are outputs.

        Args:
            sampled: names of the layers that have samples.
        """
        if self._seeker is None or not self._plan.search:
            return set(), set()
        decided, outputs = self._seeker.found(sampled)
        fresh = decided - self.decided
        return fresh, outputs & fresh

    def learn(self, decided: Set[str], outputs: Set[str], sampled: Set[str]) -> str:
        """End a step, with what was decided by all ranks.

        Returns:
            What the user is to be told, if anything was not as expected.
        """
        text = ""
        if not self._plan.search:
            if self._seeker is not None and (shown := self._seeker.contradicts()):
                text = f"FROG: the step shows {_listed(shown)} as output layers, but "
                text += "others are named so; see output_layers"
            self.close()
        elif decided:
            if outputs - {self._plan.guess}:
                text = f"FROG: output layers, as a step shows: {_listed(outputs)}"
            self.decided |= decided
            self.close()
        elif self._seeker is None and sampled - self.decided - self._plan.bare:
            self.seek(self._plan)  # some have their first gradient
        elif self._seeker is not None:
            self._seeker.clear()
        return text


def _listed(names: Set[str]) -> str:
    return ", ".join(sorted(names))


class Seeker:
    """Hooks on all modules with weights, until `close`.

    Args:
        model: whose output layers are sought.
        plan: its layers.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._search = OutputSearch()
        self._plan = plan
        self._installed: list[hooks.Installed] = []
        self._names: dict[Hashable, str] = {m: n for n, m in model.named_modules()}
        users = {m for layer in plan.layers.values() for m in layer.modules}
        for module in model.modules():
            own = module.parameters(recurse=False)
            if module in users or any(_is_matrix(p) for p in own):
                hook = hooks.Installed(self._saw, module, "seeking")
                self._installed.append(hook)

    def _saw(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if module.training:
            self._search.saw(module, (args, kwargs), output)

    def found(self, sampled: Set[str]) -> tuple[set[str], set[str]]:
        """Which layers this step tells of, and which of them are outputs, by name.

        A layer that made samples without being seen, inside of a compiled graph or a
        checkpoint, is one if it was guessed to be, and no other is seen to be one.

        Args:
            sampled: names of the layers that have samples.
        """
        plan = self._plan
        layers = [x for x in plan.layers.values() if x.name not in plan.bare]
        units, arrived = self._search.found() or set(), self._search.arrived
        shown = {x.name for x in layers if not arrived.isdisjoint(x.modules)}
        outputs = {
            x.name
            for x in layers
            if not units.isdisjoint(x.modules) and _makes_the_output(x)
        }
        decided = shown | {x.name for x in layers if x.name in sampled}
        guessed = {x.name for x in layers if x.name == plan.guess}
        if not outputs:
            outputs = guessed & (decided - shown)
        if all(layer.name in outputs for layer in layers):  # a lone layer is none
            outputs &= guessed
        return decided, outputs

    def contradicts(self) -> set[str]:
        """Names of modules that this step shows as outputs, if none is a named one."""
        units, named = self._search.found() or set(), self._plan.named
        if units & named or not self._search.arrived & named:
            return set()
        return {self._names[module] for module in units}

    def forget(self) -> None:
        """See `OutputSearch.forget`."""
        self._search.forget()

    def clear(self) -> None:
        """Drop what is known of calls so far."""
        self._search.clear()

    def close(self) -> list[hooks.Installed]:
        """Take the hooks off; returns those that stay on, without doing anything."""
        self._search.clear()
        stay = [hook for hook in self._installed if not hook.remove()]
        self._installed.clear()
        return stay


def _is_matrix(param: nn.Parameter) -> bool:
    return sum(size > 1 for size in param.shape) > 1


def _makes_the_output(layer: Layer) -> bool:
    """Whether what a layer's module returns is this layer's product."""
    use = layer.uses[-1]
    weights = use.adapter.weights(use.module)
    return use.weight.seen is not Seen.REPLAY and use.weight == weights[-1]
