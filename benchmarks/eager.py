"""The solve as a user would write it in torch: the rival of the kernels.

`F.conv2d`, a multiplication and the weight gradient, in the dtype and layout of the
samples, so cuDNN picks its fastest kernels; CG's vectors in the dtype of the momentum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.conv import ConvSpec


def eager_solve(
    x: Tensor, y: Tensor, m: Tensor, spec: ConvSpec, damping: float, iters: int
) -> Tensor:
    """``z / sqrt(<z, m>)`` of a convolution without bias, edge rules left out.

    Args:
        x: activations ``(n, C_in, H, W)``.
        y: output gradients ``(n, C_out, H_out, W_out)``.
        m: momentum ``(C_out, C_in / groups, kh, kw)``, float32 or float64.
        spec: the convolution.
        damping: tau.
        iters: k.
    """
    settings = (spec.stride, spec.padding, spec.dilation, spec.groups)
    backward = torch.ops.aten.convolution_backward
    like = m.to(x.dtype)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((1, 2, 3), keepdim=True)

    squares = x.to(m.dtype).square().unflatten(1, (spec.groups, -1)).sum(2)
    ones = squares.new_ones(spec.groups, 1, *spec.kernel)
    norms = F.conv2d(squares, ones, None, *settings)
    norms = norms.repeat_interleave(m.shape[0] // spec.groups, 1)
    scaled = y.to(m.dtype) / y.abs().amax((0, 2, 3), keepdim=True)
    weights = scaled.square()
    trace = (weights * norms).sum((0, 2, 3), keepdim=True)
    weights = (weights * (m[0].numel() / trace)).to(x.dtype)

    z, r, p = torch.zeros_like(m), m, m
    rho = dot(r, r)
    for iteration in range(iters):
        xp = F.conv2d(x, p.to(x.dtype), None, *settings)
        t = xp * weights
        pap = (t.to(m.dtype) * xp).sum((0, 2, 3)).view(-1, 1, 1, 1) + damping * dot(
            p, p
        )
        alpha = rho / pap
        z = z + alpha * p
        if iteration + 1 == iters:
            break
        _, ap, _ = backward(
            t,
            x,
            like,
            None,
            spec.stride,
            spec.padding,
            spec.dilation,
            False,
            [0, 0],
            spec.groups,
            (False, True, False),
        )
        r = r - alpha * (ap.to(m.dtype) + damping * p)
        before, rho = rho, dot(r, r)
        p = r + rho / before * p
    return z / dot(z, m).sqrt()
