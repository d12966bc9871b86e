"""Products with bare parameters, of which FROG is told where they are made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .taps import Tap


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, and FROG preconditions the weight.

    For weights that no module of a known kind holds: ``nn.Parameter`` attributes that a
    forward uses by itself. Until the first step in which a weight has samples the
    fallback updates it. The bias stays with the fallback. Inside of a graph that
    torch.compile makes, nothing is sampled.

    Args:
        input: ``(..., D)``.
        weight: ``(R, D)``, a parameter of a model that some `FROG` optimizes, or not.
        bias: ``(R,)``, or None.

    Returns:
        ``input weight^T + bias``, ``(..., R)``.

    Examples:
        >>> def forward(self, x):
        ...     return frog_triton.linear(x, self.projection)
    """
    output = F.linear(input, weight, bias)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return output
    for hook in list((weight._backward_hooks or {}).values()):
        if isinstance(hook, _Mark):
            hook.tell(input, output)
    return output


def mark(tap: Tap) -> RemovableHandle:
    """Let `linear` find a weight's tap, by a hook that does nothing else.

    A weight that is frozen may thaw, but torch lets only others have hooks.
    """
    weight, frozen = tap.weight, not tap.weight.requires_grad
    weight.requires_grad_()
    handle: RemovableHandle = weight.register_hook(_Mark(tap))
    weight.requires_grad_(not frozen)
    return handle


class _Mark:
    """On the parameter, and on no copy of it: those are made without hooks."""

    def __init__(self, tap: Tap) -> None:
        self._tap = tap

    def __call__(self, grad: Tensor) -> None:
        return None

    def tell(self, input: Tensor, output: Tensor) -> None:
        """Sample a product of the weight."""
        module = self._tap.module
        if module is not None and self._tap.applies(module):
            self._tap.see(module, input, output)
