"""A layer of some kind under FROG, beside its model."""

from __future__ import annotations

import warnings

import numpy as np
import oracles
import torch
from kinds import Model, loss_of
from kinds_calls import LR, frog


def backward(kind, net, batch):
    loss_of(kind.call(net, *batch)).backward()


def step(opt):
    """A step, in which FROG has nothing to warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        opt.step()


class Run:
    """A layer under FROG, and its model.

    Args:
        kind: of the layer.
        dtype: of the layer.
        device: likewise.
        frozen: whether its weights are.
        options: of FROG.
    """

    def __init__(
        self, kind, dtype=torch.float64, device="cpu", frozen=False, **options
    ):
        self.kind, self.frozen = kind, frozen
        self.dtype, self.device = dtype, device
        self.net = kind.module(dtype).to(device)
        for name in kind.matrices if frozen else ():
            self.net.get_parameter(name).requires_grad_(False)
        self.opt = frog(self.net, **options)
        plain = options.get("orthogonalize", True)
        self.model = Model(kind, frozen=frozen, lr=LR, orthogonalize=plain)
        self.start = {n: p.copy() for n, p in self.model.params.items()}

    def step(self, *batches, run=backward):
        """One step from these batches, by both."""
        self.opt.zero_grad()
        for batch in batches:
            run(self.kind, self.net, [self._given(x) for x in batch])
        step(self.opt)
        self.model.step(*batches)

    def _given(self, x):
        """An input as the layer is called with it."""
        x = x.to(self.device)
        return x.to(self.dtype) if x.data.is_floating_point() else x

    def error(self):
        """The largest error of a parameter, beside how far it has come."""
        errors = [0.0]
        for name, param in self.net.named_parameters():
            way = self.model.params[name] - self.start[name]
            moved = oracles.as_numpy(param) - self.start[name]
            if self.frozen and name.endswith("in_proj_bias"):
                # A key's bias adds the same to all scores: its gradient is rounding.
                way, moved = (np.delete(x.reshape(3, -1), 1, 0) for x in (way, moved))
            if way.any():
                errors.append(oracles.relative_error(torch.from_numpy(moved), way))
            else:
                assert not moved.any(), name
        assert not self.opt.anomalies()
        return max(errors)
