"""`kinds` whose call is the product, and FROG for all kinds."""

from __future__ import annotations

from functools import partial
from unittest import mock

import oracles
import torch
import torch.nn.functional as F
from kinds import Kind, randn, rows_first, rows_second, transposed
from torch import nn

from frog_triton import FROG
from frog_triton.layers import _REGISTRY, ROWS_SECOND, LinearAdapter, Weight, register


class Right(nn.Module):
    """Multiplies from the right, a kind that nobody but its user knows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 5))
        self.bias = nn.Parameter(torch.empty(5))

    def forward(self, input):
        return input @ self.weight + self.bias


LR = 0.1
EVERYTHING = 64  # samples: all of a batch
CHOICES = {"lr": LR, "fallback": "sgd", "fallback_lr": 0.0}


def frog(net, **options):
    """FROG of all layers, the own kind's among them; the fallback changes nothing."""
    options = CHOICES | {"exclude_output_layer": False} | options
    with mock.patch.dict(_REGISTRY):
        register(Right, LinearAdapter(Weight(axes=ROWS_SECOND)))
        return FROG(net, **{"sample_size": EVERYTHING} | options)


class Equalized(nn.Linear):
    """Scales its weight at each call."""

    def forward(self, input):
        return F.linear(input, self.weight * 0.5, self.bias)


class Same(nn.Conv2d):
    """Pads as TensorFlow does, more at the ends."""

    def forward(self, input):
        return F.conv2d(_padded(self, input), self.weight, self.bias, self.stride)


class Standardised(nn.Conv2d):
    """Standardises the rows of its weight."""

    def forward(self, input):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.var((1, 2, 3), keepdim=True, unbiased=False).add(1e-6).sqrt()
        weight = (self.weight - mean) / std
        return F.conv2d(input, weight, self.bias, self.stride, self.padding)


def _padded(conv, x):
    pads = []
    sizes = zip(x.shape[2:], conv.kernel_size, conv.stride, strict=True)
    for size, kernel, stride in reversed([*sizes]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def linear_like(record, net, params, x, name="weight"):
    rows = x.reshape(-1, 1, x.shape[-1])
    y = net(x)
    flat = record.layer(name, rows, y.reshape(len(rows), -1))
    return flat.view(y.shape)


def conv_like(record, net, params, x, name="weight", pad=None):
    rows = oracles.patches(net, oracles.as_numpy(x if pad is None else pad(net, x)))
    return record.layer(name, torch.from_numpy(rows), net(x))


def transposed_conv(record, net, params, x):
    """Rows of X as the outputs that unit weights would have."""
    groups, kernel = net.groups, net.kernel_size
    channels = x.shape[1] // groups
    dim = channels * torch.Size(kernel).numel()
    units = torch.eye(dim, dtype=x.dtype).view(channels, *kernel, dim).movedim(-1, 1)
    rows = torch.convolution(
        x,
        torch.cat([units] * groups),
        None,
        net.stride,
        net.padding,
        net.dilation,
        True,
        net.output_padding,
        groups,
    )
    rows = rows.movedim(1, -1).reshape(-1, groups, dim)
    return record.layer("weight", rows, net(x))


def bilinear(record, net, params, first, second):
    rows = torch.einsum("...i,...j->...ij", first, second).flatten(-2)
    return record.linear("weight", rows, params["weight"].flatten(1), params["bias"])


def conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(5, 4)


norm = nn.utils.parametrizations.weight_norm
PLAIN = {"weight": ("bias", rows_first)}
SECOND = {"weight": ("bias", rows_second)}
BARE = {"weight": (None, rows_first)}


def _transposed(build, shape, groups=1, bias="bias"):
    matrices = {"weight": (bias, transposed(groups))}
    return Kind(build, randn(shape), transposed_conv, matrices)


def _linear(build, matrices=PLAIN, shape=(3, 4, 4), **options):
    return Kind(build, randn(shape), linear_like, matrices, **options)


CALLS = {
    "transformers-conv1d": _linear(conv1d_of_transformers, SECOND),
    "own-kind": _linear(Right, SECOND),
    "equalized": _linear(lambda: Equalized(4, 5), exact=False),
    "same-padding": Kind(
        lambda: Same(2, 3, 3, 2),
        randn((2, 2, 5, 4)),
        partial(conv_like, pad=_padded),
        PLAIN,
    ),
    "standardised": Kind(
        lambda: Standardised(2, 4, 3, padding=1),
        randn((2, 2, 4, 4)),
        conv_like,
        PLAIN,
        exact=False,
    ),
    "weight-norm": Kind(
        lambda: norm(nn.Linear(4, 5)),
        randn((3, 4, 4)),
        partial(linear_like, name="parametrizations.weight.original1"),
        {"parametrizations.weight.original1": ("bias", rows_first)},
        exact=False,
    ),
    "weight-norm-hook": Kind(
        lambda: nn.utils.weight_norm(nn.Conv2d(2, 3, 3)),
        randn((2, 2, 5, 4)),
        partial(conv_like, name="weight_v"),
        {"weight_v": ("bias", rows_first)},
        exact=False,
    ),
    "transposed-1d": _transposed(lambda: nn.ConvTranspose1d(3, 4, 3, 2), (2, 3, 4)),
    "transposed-1d-groups": _transposed(
        lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, 2), (2, 4, 3), groups=2
    ),
    "transposed-2d": _transposed(
        lambda: nn.ConvTranspose2d(3, 4, 2, 2, bias=False), (2, 3, 2, 2), bias=None
    ),
    "transposed-2d-groups": _transposed(
        lambda: nn.ConvTranspose2d(4, 4, 3, 1, 1, groups=2), (2, 4, 3, 2), groups=2
    ),
    "transposed-3d": _transposed(
        lambda: nn.ConvTranspose3d(2, 3, 2, (1, 2, 1)), (1, 2, 2, 2, 1)
    ),
    "bilinear": Kind(
        lambda: nn.Bilinear(3, 4, 5), randn((4, 2, 3), (4, 2, 4)), bilinear, PLAIN
    ),
}
