"""A layer between two others, and whether its samples are right."""

import numpy as np
import oracles
import torch
import torch.nn.functional as F
from attention_net import EVERYTHING
from torch import nn

from frog_triton import FROG
from frog_triton.linalg.rows import written_out

D = 4
LIMIT = 1e-10


class Net(nn.Module):
    """A layer between two others, and what it is called with."""

    def __init__(self, inner, call=lambda inner, h: inner(h), last=True, size=D):
        super().__init__()
        self.first, self.inner = nn.Linear(D, D), inner
        self.last = nn.Linear(size, 3) if last else nn.Identity()
        self.call = call

    def forward(self, x):
        return self.last(torch.tanh(self.call(self.inner, self.first(x))))


def batch(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def frog(net, **options):
    options = {"exclude_output_layer": False} | options
    return FROG(net.double(), sample_size=EVERYTHING, **options)


def backward(net, opt, x):
    opt.zero_grad()
    net(x).square().sum().backward()


def steps(net, opt, x, count=3):
    for _ in range(count):
        backward(net, opt, x)
        opt.step()


def products(opt, name):
    """``X^T Y`` and the bias's sum of Y, of a layer's samples; None without any."""
    layer = opt._plan.layers[name]
    if not opt.capture.calls(name):
        return None
    x, y = opt.capture.samples(layer, False)
    rows, groups, dim = layer.geometry.rows, layer.geometry.groups, layer.geometry.dim
    y = oracles.as_numpy(written_out(y)).reshape(-1, groups, rows // groups)
    x = oracles.as_numpy(x.matrix().x).reshape(len(y), -1, dim)
    x = np.broadcast_to(x, (len(y), groups, dim))
    return np.einsum("ngr,ngd->grd", y, x).reshape(rows, dim), y.sum(0).reshape(-1)


def sampled(opt):
    """Names of layers with samples, which are right.

    Of weights that are computed from others the chain rule is the test's own.
    """
    found = set()
    for name, layer in opt._plan.layers.items():
        both = products(opt, name)
        if both is None:
            continue
        found.add(name)
        weight = layer.uses[0].weight.name
        for param, product in zip((layer.weight, layer.bias), both, strict=True):
            if param is None or param.grad is None:
                continue
            if param is layer.weight:
                product = behind(layer.uses[0].module, weight, product)
            grad = oracles.as_numpy(param.grad).reshape(product.shape)
            scale = max(np.linalg.norm(grad), 1e-300)
            assert np.linalg.norm(product - grad) <= LIMIT * scale, name
    return found


def behind(module, name, product):
    """The gradient by v, where ``w = g v / |v|``, from that by w."""
    if name.endswith("_v"):
        g, v = (getattr(module, f"{name[:-2]}_{part}") for part in "gv")
    elif name.endswith(".original1"):
        _, of, _ = name.split(".")
        g, v = module.parametrizations[of].parameters()
    else:
        return product
    g, v = oracles.as_numpy(g), oracles.as_numpy(v)
    length = np.linalg.norm(v, axis=1, keepdims=True)
    unit = v / length
    return g / length * (product - unit * (product * unit).sum(1, keepdims=True))


def modes():
    """How many modes of torch's function dispatch are open."""
    return torch._C._len_torch_function_stack()


E, T = 4, 12


HIDDEN = 3


def first_of(inner, h):
    return inner(h)[0]


def normed_hidden(norm):
    def build():
        inner = nn.LSTM(D, HIDDEN, batch_first=True).double()
        norm(inner, "weight_hh_l0")
        return inner

    return build


class Counted(nn.Linear):
    """Its own forward, which counts calls and may become another."""

    count = 0

    def forward(self, x):
        self.count += 1
        return self.change(x, F.linear(x, self.weight, self.bias))

    def change(self, x, y):
        return y
