"""Layers of every served kind, with their products written out by hand.

A `Kind` says how a layer is called and what it computes, product by product, so that
the rows of X and Y of each of its matrices are known without the package. `Model` is
Algorithm 1 for all of them, in float64.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracles
import torch
from algorithm1 import Algorithm1
from torch import Tensor, nn

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
        seed: of the start, as for `Kind.module`.
        frozen: whether its weights are, so that a bias is the whole row.
        options: of `Algorithm1`.
    """

    def __init__(self, kind, seed=0, frozen=False, **options):
        self.kind, self.net = kind, kind.module(seed=seed)
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
            if (name, group) not in self.algorithms or not record.made[name, group]:
                continue  # an expert without tokens stays as it is
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


def randn(*shapes):
    return lambda: tuple(torch.randn(shape) for shape in shapes)
