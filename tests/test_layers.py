"""Linear maps against the layers themselves and against explicit patches."""

from functools import partial

import numpy as np
import oracles
import pytest
import torch
from cases import CASES, problem
from torch import nn

from frog_triton.layers import (
    LayerAdapter,
    MatrixMap,
    adapter_for,
    is_proven,
    pool_samples,
    register,
)
from frog_triton.linalg.rows import Rows
from frog_triton.ops import torch_ops


def linear_map(module, x):
    adapter = adapter_for(module)
    bias = module.bias is not None
    return adapter.linear_map(module, adapter.batched(module, x), bias)


def rows_of(module):
    return Rows(module.weight.detach().flatten(1), module.bias)


@pytest.mark.parametrize("name", CASES)
def test_apply_is_the_layer(name):
    module, x, *_ = problem(name)
    adapter = adapter_for(module)
    expected = adapter.canonical(adapter.batched(module, module(x)))
    actual = linear_map(module, x).apply(rows_of(module))
    # Measured: 3e-16.
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_apply_adjoint_is_the_weight_gradient(name):
    module, x, y, *_ = problem(name)
    adapter = adapter_for(module)
    module(x).backward(y)
    t = adapter.canonical(adapter.batched(module, y)).contiguous()
    actual = linear_map(module, x).apply_adjoint(t)
    torch.testing.assert_close(
        actual.weight, module.weight.grad.flatten(1), rtol=1e-12, atol=1e-15
    )
    if module.bias is not None:
        torch.testing.assert_close(
            actual.bias, module.bias.grad, rtol=1e-12, atol=1e-15
        )


@pytest.mark.parametrize("name", CASES)
def test_matrix_and_row_norms_are_the_explicit_patches(name):
    module, x, *_ = problem(name)
    adapter = adapter_for(module)
    expected = oracles.patches(module, oracles.as_numpy(adapter.batched(module, x)))
    map_ = linear_map(module, x)
    actual = map_.matrix().grouped().transpose(0, 1)
    np.testing.assert_array_equal(oracles.as_numpy(actual), expected)
    norms = map_.row_norms().transpose(1, 2).reshape(len(expected), -1)
    homogeneous = 1 if module.bias is not None else 0
    np.testing.assert_allclose(
        oracles.as_numpy(norms), (expected**2).sum(-1) + homogeneous, rtol=1e-12
    )


@pytest.mark.parametrize("name", CASES)
def test_positions_are_rows_of_the_matrix(name):
    module, x, y, *_ = problem(name)
    adapter = adapter_for(module)
    x, y = adapter.batched(module, x), adapter.batched(module, y)
    total = y.shape[0] * adapter.positions(y)
    index = torch.randperm(total)[: max(1, total // 2)]
    at = index.numpy()
    expected = linear_map(module, x).matrix().x[index]
    actual = adapter.take_input_positions(module, x, y.shape, index, torch_ops)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    grads = oracles.gradient_rows(module, oracles.as_numpy(y))[at]
    np.testing.assert_array_equal(
        oracles.as_numpy(adapter.take_output_positions(y, index)), grads
    )


def test_positions_of_channels_last_images():
    module, x, *_ = problem("conv2d")
    adapter, index = adapter_for(module), torch.tensor([3, 0, 11])
    shape = module(x).shape
    expected = adapter.take_input_positions(module, x, shape, index, torch_ops)
    strided = x.contiguous(memory_format=torch.channels_last)
    actual = adapter.take_input_positions(module, strided, shape, index, torch_ops)
    assert torch.equal(actual, expected)


def test_pooling_joins_equal_shapes_and_writes_out_unequal_ones():
    module = nn.Conv2d(2, 3, 3, padding=1).double()
    rows = rows_of(module)
    xs = [torch.randn(n, 2, s, s).double() for n, s in ((2, 5), (1, 5), (2, 4))]
    ys = [module(x).detach().flatten(2) for x in xs]
    same, y = pool_samples([linear_map(module, x) for x in xs[:2]], ys[:2])
    assert not isinstance(same, MatrixMap)
    torch.testing.assert_close(same.apply(rows), y)
    mixed, y = pool_samples([linear_map(module, x) for x in xs], ys)
    assert isinstance(mixed, MatrixMap) and mixed.samples == 3 * 25 + 2 * 16
    torch.testing.assert_close(mixed.apply(rows), y)


def test_registry_serves_subclasses_that_inherit_forward():
    class Renamed(nn.Linear):
        pass

    class Different(nn.Linear):
        def forward(self, x):
            return super().forward(x).square()

    assert adapter_for(Renamed(2, 2)) is adapter_for(nn.Linear(2, 2))
    assert is_proven(Renamed(2, 2))
    # Served if its calls prove to be those of a Linear layer.
    assert adapter_for(Different(2, 2)) is adapter_for(nn.Linear(2, 2))
    assert not is_proven(Different(2, 2))
    assert adapter_for(nn.Embedding(2, 2)) is None


def test_registrations_that_cannot_be():
    import frog_triton
    from frog_triton import layers

    class Right(nn.Module):
        """``x W``, the weight ``(in, out)``."""

        def __init__(self, dim, rows):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(dim, rows))
            self.bias = nn.Parameter(torch.zeros(rows))

        def forward(self, x):
            return x @ self.weight + self.bias

    with pytest.raises(TypeError, match="register takes an adapter"):
        register(Right, layers.Weight(axes=layers.ROWS_SECOND))
    register(Right, layers.LinearAdapter())
    try:
        net = nn.Sequential(Right(3, 4), nn.Linear(4, 2))
        message = r"0: Right has a weight of shape \(3, 4\), hence 3 rows"
        with pytest.raises(ValueError, match=message):
            frog_triton.FROG(net)
        net = nn.Sequential(Right(4, 4), nn.Linear(4, 2))  # nothing shows in shapes
        opt = frog_triton.FROG(net)
        net(torch.randn(20, 4)).square().sum().backward()
        with pytest.warns(UserWarning, match=r"0: .*forward is not F\.linear"):
            opt.step()
        register(Right, layers.LinearAdapter(layers.Weight(axes=layers.ROWS_SECOND)))
        for dim in (3, 4):
            net = nn.Sequential(Right(dim, 4), nn.Linear(4, 2))
            opt = frog_triton.FROG(net)
            net(torch.randn(20, dim)).square().sum().backward()
            assert opt.capture.calls("0")
            opt.step()
        # Zeros prove nothing, but the kind is registered: samples from the first call.
        for wrap in (lambda net: net, partial(torch.compile, backend="aot_eager")):
            net = nn.Sequential(Right(4, 4), nn.Linear(4, 2))
            nn.init.zeros_(net[0].weight)
            opt = frog_triton.FROG(net)
            wrap(net)(torch.randn(20, 4)).square().sum().backward()
            assert opt.capture.calls("0")
            opt.step()
    finally:
        del layers._REGISTRY[Right]


def test_a_new_kind_is_one_adapter_and_one_line():
    import frog_triton

    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))
            self.bias = None

        def forward(self, x):
            return 2 * x @ self.weight.T

    linear = adapter_for(nn.Linear(1, 1))

    class DoubledAdapter(LayerAdapter):
        def geometry(self, module, weight=None):
            fake = nn.Linear(4, 3, bias=False)
            return linear.geometry(fake)

        def batched(self, module, x):
            return linear.batched(module, x)

        def positions(self, y):
            return linear.positions(y)

        def take_input_positions(self, module, x, *rest):
            return 2 * linear.take_input_positions(module, x, *rest)

        def take_output_positions(self, y, index):
            return linear.take_output_positions(y, index)

        def linear_map(self, module, x, bias, output_shape=None):
            return linear.linear_map(module, 2 * x, bias)

        def canonical(self, y):
            return linear.canonical(y)

    from frog_triton import layers

    register(Doubled, DoubledAdapter())
    try:
        model = nn.Sequential(Doubled(), nn.Linear(3, 2))
        opt = frog_triton.FROG(model)
        assert opt.describe().updated_by("frog") == ["0.weight"]
        before = model[0].weight.clone()
        model(torch.randn(5, 4)).square().sum().backward()
        opt.step()
        assert not torch.equal(before, model[0].weight)
    finally:
        del layers._REGISTRY[Doubled]
