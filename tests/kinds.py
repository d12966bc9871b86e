"""Layers of every served kind, with their products written out by hand.

A `Kind` says how a layer is called and what it computes, product by product, so that
the rows of X and Y of each of its matrices are known without the package. `Model` is
Algorithm 1 for all of them, in float64.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import oracles
import torch
import torch.nn.functional as F
from algorithm1 import Algorithm1
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

# Where a weight has its rows: it as groups of matrices ``(G, R, ...)``, a numpy view.
Matrices = Callable[[np.ndarray], np.ndarray]


def rows_first(weight):
    return weight[None]


def rows_second(weight):
    return weight.swapaxes(0, 1)[None]


def experts(weight):
    return weight


def experts_second(weight):
    return weight.swapaxes(1, 2)


def in_groups(groups):
    return lambda weight: weight.reshape(groups, -1, *weight.shape[1:])


def transposed(groups):
    return lambda weight: in_groups(groups)(weight).swapaxes(1, 2)


@dataclass
class Kind:
    """One way to use a layer.

    Attributes:
        build: makes it.
        inputs: makes what it is called with.
        by_hand: what it computes of its inputs, given a `Record`, a twin of the module
            and its parameters by name.
        matrices: of each weight by name: the name of its bias or None, and its rows.
        call: the module on its inputs.
        exact: whether ``Y^T X`` is the weight's gradient.
        steps: for recurrent layers, positions of a sequence.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    by_hand: Callable[..., Any]
    matrices: dict[str, tuple[str | None, Matrices]]
    call: Callable[..., Any] = field(default=lambda module, *inputs: module(*inputs))
    exact: bool = True
    steps: int = 1

    def module(self, dtype=torch.float64, seed=0):
        """The layer with random parameters that float32 holds."""
        torch.manual_seed(seed)
        module = self.build()
        with torch.no_grad():
            for param in module.parameters():
                param.copy_(torch.randn(param.shape) * 0.6)
        return module.to(dtype)

    def batch(self, seed, dtype=torch.float64):
        """What it is called with, in values that float32 holds."""
        torch.manual_seed(seed)
        return tuple(_to(each, dtype) for each in self.inputs())


def _to(value, dtype):
    if isinstance(value, list | tuple) and not hasattr(value, "batch_sizes"):
        return type(value)(_to(each, dtype) for each in value)
    data = getattr(value, "data", value)
    return value.to(dtype) if data.is_floating_point() else value


def loss_of(outputs):
    """A number whose gradients differ by position and by value."""
    total = 0.0
    for tensor in tensors_of(outputs):
        weights = torch.arange(1, tensor.numel() + 1).cos().to(tensor)
        total = total + (1.3 * tensor + weights.view(tensor.shape)).sin().sum()
    return total


def tensors_of(outputs):
    if isinstance(outputs, Tensor):
        return [outputs]
    if hasattr(outputs, "batch_sizes"):
        return [outputs.data]
    return [t for each in outputs if each is not None for t in tensors_of(each)]


class Record:
    """Inputs and outputs of products by (weight's name, group)."""

    def __init__(self):
        self.made = defaultdict(list)

    def linear(self, name, x, weight, bias=None, group=0):
        y = x @ weight.T
        return self.keep(name, x, y if bias is None else y + bias, group)

    def keep(self, name, x, y, group=0, take=lambda grad: grad):
        y.retain_grad()
        self.made[name, group].append((x.detach().reshape(-1, x.shape[-1]), y, take))
        return y

    def layer(self, name, x, y):
        """A layer's output ``(n, R, ...)`` with rows of X ``(N, G, D)``."""
        y.retain_grad()
        groups = x.shape[1]
        for group in range(groups):

            def take(grad, group=group):
                return grad.movedim(1, -1).unflatten(-1, (groups, -1))[..., group, :]

            self.keep(name, x[:, group], y, group, take)
        return y

    def rows(self, name, group):
        """X ``(N, D)`` and Y ``(N, R)``, once the gradients are there."""
        found = [
            (x, take(torch.zeros_like(y) if y.grad is None else y.grad).flatten(0, -2))
            for x, y, take in self.made[name, group]
        ]
        return tuple(torch.cat(each) for each in zip(*found, strict=True))


class Model:
    """Algorithm 1 for a layer, each of its matrices alone.

    Args:
        kind: of the layer.
        module: whose parameters are the start.
        frozen: whether its weights are, so that a bias is the whole row.
        options: of `Algorithm1`.
    """

    def __init__(self, kind, module, frozen=False, **options):
        self.kind, self.net = kind, copy.deepcopy(module).double()
        self.frozen, self.algorithms = frozen, {}
        for name, group, weight, bias in self._matrices(oracles.as_numpy):
            if frozen and bias is None:
                continue
            weight, bias = (bias[:, None], None) if frozen else (weight, bias)
            layer = nn.Linear(*weight.shape[::-1], bias=bias is not None).double()
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(weight))
                if bias is not None:
                    layer.bias.copy_(torch.from_numpy(bias))
            self.algorithms[name, group] = Algorithm1(layer, **options)
        self.params = {name: oracles.as_numpy(p) for name, p in self._named()}

    def _named(self):
        return self.net.named_parameters()

    def _matrices(self, of):
        """Each weight's matrices ``(R, D)`` and biases, from tensors made by `of`."""
        params = dict(self._named())
        for name, (bias_name, view) in self.kind.matrices.items():
            weights = view(of(params[name]))
            biases = None
            if bias_name is not None:
                biases = of(params[bias_name]).reshape(len(weights), -1)
            for group, weight in enumerate(weights):
                bias = None if biases is None else biases[group]
                yield name, group, weight.reshape(len(weight), -1), bias

    def record(self, *batches):
        """Forward and backward passes of the net by hand."""
        record = Record()
        self.net.zero_grad()
        for inputs in batches:
            params = dict(self._named())
            outputs = self.kind.by_hand(record, self.net, params, *inputs)
            expected = self.kind.call(self.net, *inputs)
            for made, known in zip(
                tensors_of(outputs), tensors_of(expected), strict=True
            ):
                torch.testing.assert_close(made, known, rtol=1e-11, atol=1e-11)
            loss_of(outputs).backward()
        return record

    def step(self, *batches):
        """One step from the gradients and samples of some batches."""
        record = self.record(*batches)
        for name, group, grad, grad_bias in self._matrices(_grad):
            if (name, group) not in self.algorithms:
                continue
            x, y = record.rows(name, group)
            if self.kind.exact:
                actual = oracles.as_numpy(y.T @ x)
                np.testing.assert_allclose(actual, grad, rtol=1e-9, atol=1e-9)
            if self.frozen:
                x, grad, grad_bias = x.new_ones(len(x), 1), grad_bias[:, None], None
            tensors = [
                None if g is None else torch.tensor(g) for g in (grad, grad_bias)
            ]
            self.algorithms[name, group].step(x, y, *tensors)
        self._write()
        return record

    def _write(self):
        """Bring what the algorithms have made to the net's parameters."""
        for name, (bias_name, view) in self.kind.matrices.items():
            weights = view(self.params[name])
            for group, weight in enumerate(weights):
                algorithm = self.algorithms.get((name, group))
                if algorithm is None:
                    continue
                bias = algorithm.bias
                if self.frozen:
                    bias = algorithm.weight[:, 0]
                else:
                    weight[...] = algorithm.weight.reshape(weight.shape)
                if bias_name is not None:
                    biases = self.params[bias_name].reshape(len(weights), -1)
                    biases[group] = bias
        with torch.no_grad():
            for name, param in self._named():
                param.copy_(torch.from_numpy(self.params[name]))


def _grad(param):
    grad = torch.zeros_like(param) if param.grad is None else param.grad
    return oracles.as_numpy(grad)


# -- layers whose call is the product --------------------------------------------------


class Right(nn.Module):
    """Multiplies from the right, a kind that nobody but its user knows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 5))
        self.bias = nn.Parameter(torch.empty(5))

    def forward(self, input):
        return input @ self.weight + self.bias


class Equalised(nn.Linear):
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
    """Rows of X as derivatives of the outputs by the first row of each group."""
    y, weight, groups = net(x), params["weight"], net.groups
    every = y.movedim(1, -1).flatten(0, -2).unflatten(-1, (groups, -1))
    rows = []
    for position in every:
        derivatives = [
            torch.autograd.grad(first[0], weight, retain_graph=True)[0]
            for first in position
        ]
        both = zip(derivatives, range(groups), strict=True)
        rows.append([transposed(groups)(d)[g, 0].flatten() for d, g in both])
    x_rows = torch.stack([torch.stack(each) for each in rows])
    return record.layer("weight", x_rows, net(x))


def bilinear(record, net, params, first, second):
    rows = torch.einsum("...i,...j->...ij", first, second).flatten(-2)
    return record.linear("weight", rows, params["weight"].flatten(1), params["bias"])


def randn(*shapes):
    return lambda: tuple(torch.randn(shape) for shape in shapes)


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
    "equalised": _linear(lambda: Equalised(4, 5), exact=False),
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
