"""Algorithm 1 in float64, straightforward: the model of the optimizer for tests."""

from __future__ import annotations

import numpy as np
import oracles


class Algorithm1:
    """Momentum, oracle solve and decoupled decay for one layer.

    Args:
        module: the layer; its parameters at this moment are the start.
        options: the optimizer's, by its names and with its defaults.
    """

    def __init__(self, module, **options):
        self.module = module
        self.options = dict(
            lr=2e-2,
            momentum=0.9,
            nesterov=True,
            orthogonalize=True,
            weight_decay=1e-2,
            damping=1.0,
            cg_iters=4,
        )
        self.options |= options
        self.weight = oracles.as_numpy(module.weight)
        self.bias = None if module.bias is None else oracles.as_numpy(module.bias)
        self.m = np.zeros_like(self.weight)
        self.mb = None if self.bias is None else np.zeros_like(self.bias)

    def step(self, x, y, grad, grad_bias=None):
        o = self.options
        grad = oracles.as_numpy(grad)
        self.m = o["momentum"] * self.m + grad
        m, mb = self.m, self.mb
        if mb is not None:
            grad_bias = oracles.as_numpy(grad_bias)
            self.mb = mb = o["momentum"] * mb + grad_bias
        if o["nesterov"]:
            m = grad + o["momentum"] * m
            mb = None if mb is None else grad_bias + o["momentum"] * mb
        x, y = oracles.as_numpy(x), oracles.as_numpy(y)
        systems = oracles.row_systems(self.module, x, y, m, mb, o["damping"])
        rows = oracles.solve_rows(systems, o["cg_iters"])
        if o["orthogonalize"]:
            rows = oracles.orthogonalized(rows, getattr(self.module, "groups", 1))
        decay = 1 - o["lr"] * o["weight_decay"]
        z = rows if mb is None else rows[:, :-1]
        self.weight = decay * self.weight - o["lr"] * z.reshape(m.shape)
        if mb is not None:
            self.bias = decay * self.bias - o["lr"] * rows[:, -1]
