"""Muon at its best on either device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...ops.orthogonal import newton_schulz


class HostMuon(torch.optim.Muon):
    """`torch.optim.Muon` with FROG's own orthogonalization.

    Torch's takes all products in bfloat16, for which most CPUs have no units: there it
    is ten times slower for nothing but that. It takes the same steps up to rounding.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, as `torch.optim.Muon` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, beta = group["lr"], group["momentum"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                momentum = state["momentum_buffer"].lerp_(param.grad, 1 - beta)
                step = (
                    param.grad.lerp(momentum, beta) if group["nesterov"] else momentum
                )
                param.mul_(1 - lr * group["weight_decay"])
                param.add_(newton_schulz(step), alpha=-lr)
        return loss
