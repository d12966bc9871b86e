"""Layers with a forward of their own, and input shapes, for `test_recognize`."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from frog_triton.layers.conv import ConvAdapter, SameConvAdapter
from frog_triton.layers.linear import LinearAdapter

OWN, SAME = ConvAdapter, SameConvAdapter


def make(kind, forward, *args, **options):
    """A layer of a torch kind whose forward is another."""
    return type(f"Own{kind.__name__}", (kind,), {"forward": forward})(*args, **options)


def linear(self, x):
    return F.linear(x, self.weight, self.bias)


def cast_linear(self, x):
    return F.linear(x, self.weight.to(x.dtype), self.bias)


def convolution(x, weight, layer, padding):
    convolve = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    return convolve(
        x, weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups
    )


def conv(self, x):
    return convolution(x, self.weight, self, self.padding)


def padded(self, x):
    """As timm's ``pad_same``, in any number of dimensions."""
    pads = []
    for i, k, s, d in zip(
        x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True
    ):
        total = max((math.ceil(i / s) - 1) * s + (k - 1) * d + 1 - i, 0)
        pads = [total // 2, total - total // 2, *pads]
    return F.pad(x, pads)


def same(self, x):
    return convolution(padded(self, x), self.weight, self, 0)


def standardised(self):
    flat = self.weight.reshape(1, self.out_channels, -1)
    flat = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
    return flat.reshape_as(self.weight)


def standard(self, x):
    return convolution(x, standardised(self), self, self.padding)


def standard_same(self, x):
    return convolution(padded(self, x), standardised(self), self, 0)


def by_hand(self, x):
    """Standardised step by step, so that each step is rounded."""
    axes = tuple(range(1, self.weight.ndim))
    mean = self.weight.mean(axes, keepdim=True)
    std = self.weight.std(axes, keepdim=True)
    gain = torch.linspace(0.5, 2, len(self.weight), device=x.device).to(x.dtype)
    gain = gain.view(-1, *(1,) * len(axes))
    return convolution(x, gain * (self.weight - mean) / std, self, self.padding)


def equalized(self, x):
    scale = self.weight[0].numel() ** -0.5
    if self.weight.ndim == 2:
        return F.linear(x, self.weight * scale, self.bias)
    return convolution(x, self.weight * scale, self, self.padding)


def spectral(self, x):
    sigma = torch.linalg.matrix_norm(self.weight.float().flatten(1), 2)
    weight = (self.weight / sigma).to(self.weight.dtype)
    if self.weight.ndim == 2:
        return F.linear(x, weight, self.bias)
    return convolution(x, weight, self, self.padding)


def standard_linear(self, x):
    weight = self.weight - self.weight.mean(1, keepdim=True)
    return F.linear(x, weight / weight.std(1, keepdim=True), self.bias)


C1, C2, C3 = nn.Conv1d, nn.Conv2d, nn.Conv3d
RIGHT = {
    "linear": (lambda: make(nn.Linear, linear, 24, 80), (40, 24), LinearAdapter),
    "cast": (lambda: make(nn.Linear, cast_linear, 24, 9), (4, 7, 24), LinearAdapter),
    "scaled": (lambda: make(nn.Linear, equalized, 24, 9), (4, 7, 24), LinearAdapter),
    "spectral": (lambda: make(nn.Linear, spectral, 24, 9), (90, 24), LinearAdapter),
    "standard-linear": (
        lambda: make(nn.Linear, standard_linear, 24, 9, bias=False),
        (90, 24),
        LinearAdapter,
    ),
    "conv1d": (lambda: make(C1, conv, 4, 6, 5, padding=2), (3, 4, 17), OWN),
    "conv2d": (lambda: make(C2, conv, 4, 6, 3, 2, 1, 2, 2), (3, 4, 11, 9), OWN),
    "conv3d": (lambda: make(C3, conv, 2, 4, 3, padding=1), (2, 2, 5, 4, 3), OWN),
    "depthwise": (
        lambda: make(C2, conv, 96, 96, 3, padding=1, groups=96),
        (2, 96, 9, 9),
        OWN,
    ),
    "conv1d-same": (lambda: make(C1, same, 4, 6, 5, stride=3), (3, 4, 17), SAME),
    "conv2d-same": (lambda: make(C2, same, 4, 6, 3, stride=2), (3, 4, 12, 9), SAME),
    "conv2d-same-even": (lambda: make(C2, same, 4, 6, 4), (3, 4, 7, 9), SAME),
    "conv2d-same-oblong": (
        lambda: make(C2, same, 4, 6, (5, 2), (2, 1), 0, (1, 3), 2),
        (3, 4, 11, 13),
        SAME,
    ),
    "conv2d-same-before": (  # the own padding makes the same shape
        lambda: make(C2, same, 4, 6, 3, stride=2, padding=1),
        (3, 4, 8, 10),
        SAME,
    ),
    "conv3d-same": (lambda: make(C3, same, 2, 4, 3, 2), (2, 2, 5, 6, 7), SAME),
    "standard1d": (lambda: make(C1, standard, 4, 6, 5, padding=2), (3, 4, 31), OWN),
    "standard2d": (lambda: make(C2, standard, 4, 6, 3, 2, 1), (3, 4, 12, 9), OWN),
    "standard3d": (lambda: make(C3, standard, 2, 4, 3, 1, 1), (2, 2, 5, 4, 3), OWN),
    "standard-groups": (
        lambda: make(C2, standard, 8, 12, 3, groups=4),
        (3, 8, 9, 9),
        OWN,
    ),
    "standard-same": (
        lambda: make(C2, standard_same, 4, 6, 3, stride=2, bias=False),
        (3, 4, 12, 9),
        SAME,
    ),
    "standard-same-dilated": (
        lambda: make(C2, standard_same, 4, 6, 3, 2, dilation=2, groups=2),
        (3, 4, 13, 10),
        SAME,
    ),
    "by-hand": (lambda: make(C2, by_hand, 16, 8, 3, bias=False), (3, 16, 9, 9), OWN),
    "equalized": (lambda: make(C2, equalized, 4, 6, 3, padding=1), (3, 4, 9, 9), OWN),
    "spectral-conv": (lambda: make(C2, spectral, 4, 6, 3), (3, 4, 9, 9), OWN),
}


def with_dropout(self, x):
    return F.dropout(F.linear(x, self.weight) * 2, 0.1)


def rectified(self, x):
    return F.linear(x.relu(), self.weight, self.bias)


def normalized(self, x):
    return F.linear(F.layer_norm(x, x.shape[-1:]), self.weight, self.bias)


def cosine(self, x):
    return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


def mixed(self, x):
    """Rows of a product of the weight: not the rows' own constants."""
    return F.linear(x, self.weight.roll(1, 0) + self.weight, self.bias)


def by_column(self, x):
    return F.linear(x, self.weight / self.weight.norm(dim=0), self.bias)


def residual(self, x):
    return x + F.linear(x, self.weight, self.bias)


def noisy(self, x):
    y = F.linear(x, self.weight, self.bias)
    return y + 0.05 * torch.randn_like(y) * y.std()


def activated(self, x):
    return F.silu(F.linear(x, self.weight, self.bias))


def doubled(self, x):
    """The bias is doubled too."""
    return F.linear(x, self.weight, self.bias) * 2


def zero_padded(self, x):
    return convolution(x, self.weight, self, self.padding)


def demodulated(self, x):
    """A scale of each example, as StyleGAN's."""
    style = x.mean((2, 3), keepdim=True).exp()
    return convolution(x * style, self.weight, self, self.padding)


def rectified_conv(self, x):
    return convolution(x.relu(), self.weight, self, self.padding)


def standardised_input(self, x):
    return convolution(F.instance_norm(x), self.weight, self, self.padding)


def flipped(self, x):
    return convolution(x, self.weight.flip(-1), self, self.padding)


def masked(self, x):
    mask = torch.ones_like(self.weight)
    mask[..., 1:, :] = 0
    return convolution(x, self.weight * mask, self, self.padding)


# Least difference of these layers in tolerances, measured: over 1000 in float32, in
# 16-bit types 1.4 ("cosine-wide": the norms of inputs differ by 3%) and 5 of others.
WRONG = {
    "dropout": (lambda: make(nn.Linear, with_dropout, 24, 9), (90, 24)),
    "relu": (lambda: make(nn.Linear, rectified, 24, 9), (90, 24)),
    "normalized": (lambda: make(nn.Linear, normalized, 24, 9), (90, 24)),
    "cosine": (lambda: make(nn.Linear, cosine, 24, 9, bias=False), (90, 24)),
    "cosine-wide": (lambda: make(nn.Linear, cosine, 512, 9, bias=False), (90, 512)),
    "mixed": (lambda: make(nn.Linear, mixed, 24, 9), (90, 24)),
    "by-column": (lambda: make(nn.Linear, by_column, 24, 9), (90, 24)),
    "residual": (lambda: make(nn.Linear, residual, 24, 24), (90, 24)),
    "noise": (lambda: make(nn.Linear, noisy, 24, 9), (90, 24)),
    "activation": (lambda: make(nn.Linear, activated, 24, 9), (90, 24)),
    "bias": (lambda: make(nn.Linear, doubled, 24, 9), (90, 24)),
    "few": (lambda: make(nn.Linear, rectified, 24, 9), (4, 24)),
    "padding-mode": (  # differs in the outermost outputs alone
        lambda: make(C2, zero_padded, 3, 5, 3, 2, 1, padding_mode="reflect"),
        (2, 3, 40, 40),
    ),
    "style": (lambda: make(C2, demodulated, 3, 5, 3), (9, 3, 9, 9)),
    "relu-conv": (lambda: make(C2, rectified_conv, 3, 5, 3), (2, 3, 9, 9)),
    "instance-norm": (lambda: make(C2, standardised_input, 3, 5, 3), (9, 3, 9, 9)),
    "flipped": (lambda: make(C2, flipped, 3, 5, 3), (2, 3, 9, 9)),
    "masked": (lambda: make(C2, masked, 3, 5, 3), (2, 3, 9, 9)),
}
