"""A small net with a convolution, and what the tests of its calls ask of it."""

import io

import torch
from torch import nn


def make():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)
    )
    return net.append(nn.Tanh()).append(nn.Linear(4, 2)).double()


def batch(seed, size=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 2, 4, generator=generator, dtype=torch.float64)


def by(opt, name):
    return opt.describe(file=io.StringIO()).updated_by(name)


def hooks(net):
    return sum(len(module._forward_hooks) for module in net.modules())
