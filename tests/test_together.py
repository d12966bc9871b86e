"""Layers of different sizes that a CPU solves together."""

from collections import Counter

import oracles
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from frog_triton import FROG
from frog_triton.layers import MatrixMap
from frog_triton.linalg.numbers import Numbers
from frog_triton.linalg.products import times_transposed
from frog_triton.linalg.rows import Rows
from frog_triton.ops import torch_ops
from frog_triton.ops.fisher import NO_GRADIENT
from frog_triton.solve import FORMULATIONS, Batch, prepared, together

NUMBERS = Numbers(momentum=0.9, damping=0.1, lr=0.02, weight_decay=0.01)

# Rows, D without the bias, whether there is one: on the rows and in Gram space.
SIZES = [(5, 3, True), (7, 40, False), (12, 3, True), (4, 31, True), (9, 4, False)]
N = 24


def systems(dtype=torch.float64, nesterov=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def rows(r, d, bias):
        return Rows(randn(r, d), randn(r) if bias else None)

    xs = [MatrixMap(randn(N, d), bias=bias) for _, d, bias in SIZES]
    ys = [randn(N, r, 1) for r, _, _ in SIZES]
    ms, gs = ([rows(*sizes) for sizes in SIZES] for _ in range(2))
    return Batch(xs, ys, ms, gs, NUMBERS, nesterov)


def part(batch, *which):
    def of(values):
        return [values[i] for i in which]

    ms = [m.clone() for m in of(batch.ms)]
    return Batch(
        of(batch.xs), of(batch.ys), ms, of(batch.grads), NUMBERS, batch.nesterov
    )


def alone(batch, i, formulation, iters=4):
    """The layer's solution by the backend that has every function, and its momentum."""
    one = prepared(torch_ops, part(batch, i))
    solution = FORMULATIONS[formulation](torch_ops, one, iters)
    return solution, one.ms[0]


def joined(rows):
    if rows.bias is None:
        return rows.weight
    return torch.cat([rows.weight, rows.bias.unsqueeze(-1)], -1)


@pytest.mark.parametrize("formulation", ["primal", "gram", "auto"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("dtype", "limit"),
    # Measured: 2e-14 and 2e-4, in Gram space with more samples than weights in a row.
    [(torch.float64, 1e-12), (torch.float32, 1e-3)],
)
def test_as_each_layer_by_itself(formulation, nesterov, dtype, limit):
    batch = systems(dtype, nesterov)
    batch.ys[0][:, 2] = 0  # a row without a gradient
    for part_of in (*batch.ms[1], *batch.grads[1]):
        if part_of is not None:
            part_of[3] = 0  # a row without momentum
    exact = systems(torch.float64, nesterov)
    for name in ("xs", "ys", "ms", "grads"):
        for i, value in enumerate(getattr(batch, name)):
            getattr(exact, name)[i] = value.to(torch.float64)
    together_ = part(batch, *range(len(SIZES)))
    found = dict(together.solve(together_, 4, formulation))
    assert sorted(found) == list(range(len(SIZES)))
    for i, solution in found.items():
        expected, momentum = alone(exact, i, "primal")
        assert torch.equal(solution.status, expected.status)
        assert solution.finite.all() and not solution.has_anomalies
        rows = solution.rows()
        assert rows.weight.dtype == dtype and (rows.bias is None) == (not SIZES[i][2])
        z = oracles.as_numpy(joined(expected.rows()))
        assert oracles.relative_error(joined(rows), z) < limit
        advanced, limit_of_m = joined(together_.ms[i]), 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(  # measured: 4 in float64, 1.3
            advanced.double(), joined(momentum), rtol=0, atol=limit_of_m
        )
    assert found[0].status[0, 2] == NO_GRADIENT
    assert not found[1].rows().weight[0, 3].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("formulation", ["primal", "gram"])
def test_a_layer_does_not_depend_on_the_others(formulation, dtype):
    batch = systems(dtype)
    every = part(batch, *range(len(SIZES)))
    found = dict(together.solve(every, 4, formulation))
    for i in range(len(SIZES)):
        ((_, by_itself),) = together.solve(part(batch, i), 4, formulation)
        assert torch.equal(joined(by_itself.rows()), joined(found[i].rows()))


@pytest.mark.parametrize("formulation", ["primal", "gram"])
def test_portions_change_nothing(formulation, monkeypatch):
    batch = systems()
    found = dict(together.solve(part(batch, *range(len(SIZES))), 4, formulation))
    monkeypatch.setattr(together, "ENTRIES", 10 * N)
    again = dict(together.solve(part(batch, *range(len(SIZES))), 4, formulation))
    for i, solution in again.items():
        assert torch.equal(joined(solution.rows()), joined(found[i].rows()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "y", "gradient", "momentum", "sum"])
@pytest.mark.parametrize("formulation", ["primal", "gram"])
def test_a_layer_that_is_not_finite_is_left_as_it_was(formulation, where, bad):
    batch = systems(torch.float32)
    expected = dict(together.solve(part(batch, 0, 1, 3, 4), 4, formulation))
    layer = part(batch, *range(len(SIZES)))
    if where == "x":
        layer.xs[2] = MatrixMap(layer.xs[2].x.clone(), bias=True)
        layer.xs[2].x[3, 1] = bad
    elif where == "y":
        layer.ys[2] = layer.ys[2].clone()
        layer.ys[2][3, 1] = bad
    elif where == "sum":
        layer.ms[2].weight[1, 1] = layer.grads[2].weight[1, 1] = 3e38
    else:
        rows = layer.grads[2] if where == "gradient" else layer.ms[2]
        rows.bias[4] = bad
    before = layer.ms[2].clone()
    found = dict(together.solve(layer, 4, formulation))
    assert found[2] is None
    assert torch.equal(before.bias.nan_to_num(), layer.ms[2].bias.nan_to_num())
    assert torch.equal(before.weight, layer.ms[2].weight)
    for i, j in enumerate([0, 1, 3, 4]):
        assert torch.equal(joined(found[j].rows()), joined(expected[i].rows()))


@pytest.mark.parametrize("exponent", [-120, -60, 60, 100])
@pytest.mark.parametrize("formulation", ["primal", "gram"])
def test_sizes_do_not_matter(formulation, exponent):
    batch = systems(torch.float32)
    expected = dict(together.solve(part(batch, *range(len(SIZES))), 4, formulation))
    scaled = part(batch, *range(len(SIZES)))
    for rows in (scaled.ms[2], scaled.grads[2]):
        for tensor in rows:
            tensor.mul_(2.0**exponent)
    scaled.ys[2] = scaled.ys[2] * 2.0**exponent
    for i, solution in together.solve(scaled, 4, formulation):
        assert torch.equal(joined(solution.rows()), joined(expected[i].rows()))


def test_nothing_is_solved_together_where_the_step_may_be_skipped():
    batch = systems()
    skipped = Numbers(momentum=0.9, damping=0.1, skipped=torch.zeros(()))
    batch = Batch(batch.xs, batch.ys, batch.ms, batch.grads, skipped)
    assert all(s is None for _, s in together.solve(batch, 4))


@pytest.mark.parametrize("shape", [(130, 400, 100), (256, 1200, 40), (64, 64, 300)])
def test_products_of_any_strides(shape):
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(s, k, generator=generator) for s in (m, n))
    exact = oracles.as_numpy(a.double() @ b.double().T)
    wide = torch.zeros(n, k + 3)
    wide[:, 2:-1] = b
    for left in (a, a.T.contiguous().T):
        for right in (b, b.T.contiguous().T, wide[:, 2:-1]):
            # Measured: 3.6e-7.
            assert oracles.relative_error(times_transposed(left, right), exact) < 2e-6


class Counting(TorchDispatchMode):
    """Torch's operations by name; views are free."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += not func.is_view
        return out


def operations(depth, **options):
    torch.manual_seed(0)
    layers = [nn.Linear(6 + i, 7 + i) for i in range(depth)]
    net = nn.Sequential(*layers, nn.Linear(6 + depth, 2))
    opt = FROG(net, orthogonalize=False, sample_size=8, **options)
    for _ in range(3):
        opt.zero_grad()
        net(torch.randn(16, 6)).square().sum().backward()
        with Counting() as counting:
            opt.step()
    return counting.calls


def test_operations_of_a_layer_more():
    """In Gram space, where products and what reads or writes a layer are its own."""
    few, many = (operations(depth, formulation="gram") for depth in (2, 6))
    layer = (sum(many.values()) - sum(few.values())) / 4
    assert layer <= 25
