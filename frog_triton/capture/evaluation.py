"""Keeps torch's fused inference of transformer layers, which any hook would turn off.

`torch.nn.TransformerEncoderLayer` runs as one fused operation in evaluation, but only
if no module in it has a hook. So while the model runs without gradients in evaluation
mode, FROG's hooks inside of such layers are taken off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import hooks

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
Taken = list[tuple[Any, dict[int, Any]]]
"""Dictionaries of hooks, each with what was taken out of it."""


class FusedInference:
    """Takes hooks off for as long as the model runs, and puts them on again.

    Args:
        model: around the layers; one that is such a layer itself has hooks in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            module
            for module in model.modules()
            if isinstance(module, nn.TransformerEncoderLayer) and module is not model
        ]
        self._taken: list[Taken] = []
        self._handles = []
        if self._layers:
            self._handles = hooks.surround(self._before, self._after, model)

    def close(self) -> None:
        """Take off nothing more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        fused = not module.training and not torch.is_grad_enabled()
        self._taken.append(self._take() if fused else [])

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not self._taken:
            return
        for table, ours in self._taken.pop():
            for key, hook in reversed(ours.items()):
                table[key] = hook
                table.move_to_end(key, last=False)

    def _take(self) -> Taken:
        taken = []
        for layer in self._layers:
            for module in layer.modules():
                for table in (getattr(module, name) for name in _HOOKS):
                    ours = {k: hook for k, hook in table.items() if hooks.is_ours(hook)}
                    for key in ours:
                        del table[key]
                    taken.append((table, ours))
        return taken
