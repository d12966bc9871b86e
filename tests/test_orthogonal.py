"""Newton-Schulz iterations against a polynomial of the singular values."""

from dataclasses import replace

import oracles
import pytest
import torch
from torch import nn

from frog_triton import FROG
from frog_triton.ops import torch_ops
from frog_triton.ops.types import Rows
from frog_triton.orthogonal import newton_schulz, orthogonalize
from frog_triton.step import directions


def randn(*shape, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=dtype).to(device)


@pytest.mark.parametrize(
    ("dtype", "limit"),
    # Measured: 3e-15 and 2e-6.
    [(torch.float64, 1e-13), (torch.float32, 2e-5)],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "dim", "groups"),
    [(5, 9, 1), (9, 5, 1), (7, 7, 1), (6, 4, 2), (6, 2, 3), (6, 3, 6), (4, 0, 1)],
)
def test_against_singular_values(rows, dim, groups, bias, dtype, limit):
    if dim + bias == 0:
        pytest.skip("nothing to orthogonalize")
    weight, b = randn(2, rows, dim, dtype=dtype), randn(2, rows, dtype=dtype)
    every = torch.ones(2, rows, dtype=torch.bool)
    found = orthogonalize(Rows(weight, b if bias else None), every, groups)
    assert found.weight.dtype == dtype and (found.bias is not None) == bias
    for i in range(2):
        whole = torch.cat([weight[i], b[i, :, None]], 1) if bias else weight[i]
        expected = oracles.orthogonalized(oracles.as_numpy(whole), groups)
        parts = [found.weight[i]] + ([found.bias[i, :, None]] if bias else [])
        assert oracles.relative_error(torch.cat(parts, 1), expected) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scale_does_not_matter(scale, dtype):
    m = randn(4, 6, dtype=dtype)
    error = oracles.relative_error(
        newton_schulz(m * scale), oracles.as_numpy(newton_schulz(m))
    )
    assert error < 100 * torch.finfo(dtype).eps  # measured 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_leave_the_others_as_if_they_were_not_there(bad):
    weight, bias = randn(1, 6, 9), randn(1, 6)
    weight[0, 2, 3] = bad
    finite = torch.ones(1, 6, dtype=torch.bool)
    finite[0, 4] = False
    found = orthogonalize(Rows(weight, bias), finite)
    rest = [0, 1, 3, 5]
    whole = torch.cat([weight[0], bias[0, :, None]], 1)[rest]
    expected = oracles.orthogonalized(oracles.as_numpy(whole), 1)
    assert oracles.relative_error(found.weight[0, rest], expected[:, :-1]) < 1e-13
    assert not found.weight[0, [2, 4]].any() and not found.bias[0, [2, 4]].any()


def test_pieces_of_a_layer_come_in_the_order_of_its_rows(monkeypatch):
    """A rank that holds parts of two groups and whole ones between solves the like."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(5, 15, 3, groups=5), nn.Flatten(), nn.Linear(15, 2))
    net.double()
    opt = FROG(net, sample_size=100)
    net(torch.randn(4, 5, 3, 3).double()).square().sum().backward()
    group = opt.param_groups[0]
    (step,) = opt._gather(group)
    x, y = step.x, step.y
    cuts = [(5, 6), (6, 9), (9, 10)]  # of groups of three
    pieces = [
        step.narrow(
            slice(a, b),
            slice(a, b),
            x.narrow_groups(a // 3, -(-b // 3)),
            y[:, a:b],
        )
        for a, b in cuts
    ]
    found = []
    for grouped in (True, False):
        monkeypatch.setattr(torch_ops, "GROUPS_LAYERS", grouped)
        twins = [
            replace(p, momentum=p.momentum.clone(), grads=p.grads.clone())
            for p in pieces
        ]
        parts, _ = directions(twins, group, "gram", opt._anomalies)
        found.append(torch.cat([d.rows.weight for d in parts["0"]]))
    assert oracles.relative_error(found[0], oracles.as_numpy(found[1])) < 1e-12


def test_zeros_stay_zeros():
    assert not newton_schulz(torch.zeros(2, 3, 4)).any()


def test_singular_values_are_near_one():
    values = torch.linalg.svdvals(newton_schulz(randn(40, 100)))
    assert values.min() > 0.6 and values.max() < 1.3  # measured 0.68 to 1.13


def test_channels_last_parameters_step_alike():
    nets = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 2)).double()
        net[0].weight.data = net[0].weight.data.to(memory_format=layout)
        opt = FROG(net, sample_size=100, orthogonalize=True)
        net(torch.randn(4, 4, 3, 3).double()).square().sum().backward()
        opt.step()
        nets.append(net)
    error = oracles.relative_error(
        nets[0][0].weight, oracles.as_numpy(nets[1][0].weight)
    )
    assert error < 1e-12  # measured 1e-16


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "dim"), [(64, 576), (768, 3072), (3072, 768)])
def test_in_bfloat16_on_the_device(rows, dim):
    m = randn(rows, dim, dtype=torch.float32, device="cuda")
    found = newton_schulz(m)
    assert found.dtype == torch.bfloat16
    expected = oracles.orthogonalized(oracles.as_numpy(m), 1)
    assert oracles.relative_error(found, expected) < 5e-2  # not measured yet
