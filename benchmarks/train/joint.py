"""Several optimizers as one, each for some of a model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class MatrixView:
    """A weight of any shape as a matrix that shares its memory, gradient included.

    Args:
        weight: of two or more dimensions, contiguous or with channels last.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.matrix = nn.Parameter(_flat(weight.detach()))

    def bring_grad(self) -> None:
        """Point the matrix's gradient at the weight's."""
        grad = self.weight.grad
        if grad is not None:
            if grad.stride() != self.weight.stride():
                grad = torch.empty_like(self.weight).copy_(grad)
            grad = _flat(grad)
        self.matrix.grad = grad


def _flat(weight: Tensor) -> Tensor:
    """Rows in memory's order: with channels last no other order is a view."""
    if not weight.is_contiguous():
        weight = weight.movedim(1, -1)
    return weight.view(weight.shape[0], -1)


class Joint(torch.optim.Optimizer):
    """Steps several optimizers; schedulers see the groups of them all.

    Args:
        model: whose gradients `zero_grad` drops.
        parts: the optimizers.
        views: matrices that stand for weights in them.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[torch.optim.Optimizer],
        views: Sequence[MatrixView] = (),
    ) -> None:
        self._model = model
        self._parts = parts
        self._views = views
        super().__init__(list(model.parameters()), {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step each part."""
        loss = None if closure is None else closure()
        for view in self._views:
            view.bring_grad()
        for part in self._parts:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the model."""
        self._model.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The parts' own."""
        return {str(i): part.state_dict() for i, part in enumerate(self._parts)}


class Handover(Joint):
    """One optimizer after another, all for the same parameters."""

    turn: int = 0

    def hand_over(self) -> None:
        """Let the next part step from now on; hooks of this one are removed."""
        getattr(self._parts[self.turn], "close", lambda: None)()
        self.turn += 1

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the part whose turn it is."""
        return self._parts[self.turn].step(closure)


def layers_and_rest(
    model: nn.Module, kinds: tuple[type[nn.Module], ...]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of modules of the given kinds, and all others."""
    layers = [
        param
        for module in model.modules()
        if isinstance(module, kinds)
        for param in module.parameters(recurse=False)
    ]
    chosen = {id(p) for p in layers}
    return layers, [p for p in model.parameters() if id(p) not in chosen]
