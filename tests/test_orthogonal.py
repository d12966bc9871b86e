"""Newton-Schulz iterations against a polynomial of the singular values."""

import math

import oracles
import pytest
import torch
from algorithm1 import Algorithm1
from cases import PAPER
from torch import nn

from frog_triton import FROG
from frog_triton.distributed.directions import collect
from frog_triton.linalg.numbers import Numbers
from frog_triton.linalg.products import has_fast_bfloat16
from frog_triton.linalg.rows import Rows
from frog_triton.ops import torch_ops, triton_ops
from frog_triton.ops.fisher import NON_FINITE
from frog_triton.ops.orthogonal import newton_schulz, orthogonalize
from frog_triton.update import numbers_of, solutions


def randn(*shape, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=dtype).to(device)


@pytest.mark.parametrize(
    ("dtype", "limit"),
    # Measured: 4e-15 and 1e-6.
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
    expected = oracles.orthogonalized(oracles.as_numpy(m), 1)
    error = oracles.relative_error(newton_schulz(m * scale), expected)
    assert error < 100 * torch.finfo(dtype).eps  # measured 9


def test_a_bias_alone_among_bad_rows():
    """The weight is frozen: rows have no other entry, and one of them stays."""
    weight, bias = torch.empty(1, 6, 0), randn(1, 6)
    finite = torch.arange(6)[None] != 4
    found = orthogonalize(Rows(weight, bias), finite)
    expected = torch.where(finite, bias, 0).mT  # (6, 1)
    expected = oracles.orthogonalized(oracles.as_numpy(expected), 1)
    assert oracles.relative_error(found.bias.mT, expected) < 2e-5  # measured: 2e-7
    assert found.weight.shape == (1, 6, 0)


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
    assert (
        oracles.relative_error(found.weight[0, rest], expected[:, :-1]) < 1e-13
    )  # 1.5e-15
    assert not found.weight[0, [2, 4]].any() and not found.bias[0, [2, 4]].any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "shape"), [(5, (7,)), (70, (3, 2, 2)), (4, (0,))])
def test_a_step_along_directions(rows, shape, dtype, bias):
    """Along directions that are written out; rows that are not finite stay."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dim = math.prod(shape)
    weight, b = randn(2, rows, *shape, device=device), randn(2, rows, device=device)
    direction = Rows(
        randn(2, rows, dim, dtype=torch.float32, device=device),
        randn(2, rows, dtype=torch.float32, device=device) if bias else None,
    )
    finite = torch.ones(2, rows, dtype=torch.bool, device=device)
    finite[1, 2] = False
    direction.weight[1, 2] = 0
    status = torch.zeros(2, rows, dtype=torch.int32, device=device)
    status[0, 1] = NON_FINITE
    for ops in (torch_ops, triton_ops):
        params = [
            Rows(weight[i].to(dtype), b[i].to(dtype) if bias else None).clone()
            for i in range(2)
        ]
        before = [p.clone() for p in params]
        counts = [torch.zeros_like(status) for _ in range(2)]
        numbers = Numbers(lr=0.1, weight_decay=0.2)
        ops.direction_update_(params, direction, status, finite, counts, numbers)
        for i in range(2):
            for found, old, z in zip(
                params[i], before[i], direction.layer(i), strict=True
            ):
                if found is None:
                    continue
                step = (1 - 0.1 * 0.2) * old.double() - 0.1 * z.double().view(old.shape)
                moves = finite[i].view(-1, *(1,) * (old.ndim - 1))
                expected = torch.where(moves, step, old.double())
                # Measured: 0.6 of eps in either dtype.
                limit = 2 * torch.finfo(dtype).eps
                torch.testing.assert_close(
                    found.double(), expected, rtol=limit, atol=limit
                )
        assert torch.equal(params[1].weight[2], before[1].weight[2])
        assert counts[0].sum() == counts[0][0, 1] == 1  # samples
        assert counts[1].sum() == counts[1][1, 2] == 1  # a row that stayed


def first_step(net, **options):
    """FROG, and what its first layer saw and got, after a backward pass."""
    seen = {}

    def hook(module, args, output):
        seen["x"] = args[0].detach()
        output.register_hook(lambda grad: seen.__setitem__("y", grad.clone()))

    opt = FROG(net, sample_size=100, **options)
    net[0].register_forward_hook(hook)
    channels = net[0].in_channels
    net(torch.randn(4, channels, 3, 3).double()).square().sum().backward()
    return opt, seen["x"], seen["y"], net[0].weight.grad, net[0].bias.grad


def test_pieces_of_a_layer_come_in_the_order_of_its_rows(monkeypatch):
    """A rank that holds parts of two groups and whole ones between solves the like."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(5, 15, 3, groups=5), nn.Flatten(), nn.Linear(15, 2))
    opt, *seen = first_step(net.double(), damping=1e-2)
    group = opt.param_groups[0]
    opt._gathering.complete_state(group, group["params"], opt.state)
    (step,) = opt._gathering.bring(group, group["params"], opt.state).steps
    cuts = [(5, 6), (6, 9), (9, 10)]  # of groups of three
    pieces = [
        step.narrow(
            slice(a, b),
            slice(a, b),
            step.x.narrow_groups(a // 3, -(-b // 3)),
            step.y[:, a:b],
        )
        for a, b in cuts
    ]
    monkeypatch.setattr(torch_ops, "GROUPS_LAYERS", True)
    how = ("primal", opt._anomalies.counts, None, {})
    solved = solutions(pieces, group, numbers_of(group), *how)
    found = torch.cat([d.rows.weight for d in collect(solved)["0"]])
    expected, _ = oracles.precondition(net[0], *seen, 1e-2, 4)
    expected = expected.reshape(15, -1)[5:10]
    assert oracles.relative_error(found, expected) < 1e-10  # measured 7e-13


def test_zeros_stay_zeros():
    assert not newton_schulz(torch.zeros(2, 3, 4)).any()


def test_singular_values_are_near_one():
    values = torch.linalg.svdvals(newton_schulz(randn(40, 100)))
    assert values.min() > 0.6 and values.max() < 1.3  # measured 0.68 to 1.13


@pytest.mark.parametrize(
    "options", [{}, PAPER | {"orthogonalize": True, "damping": 1e-2}]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_step_in_either_layout(layout, options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    net[0].weight.data = net[0].weight.data.to(memory_format=layout)
    model = Algorithm1(net[0], **options)
    opt, *seen = first_step(net, **options)
    model.step(*seen)
    opt.step()
    assert oracles.relative_error(net[0].weight, model.weight) < 1e-12  # measured 6e-15


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "dim"), [(64, 576), (768, 769), (3072, 769), (3, 27)])
def test_in_bfloat16_on_the_device(rows, dim):
    m = randn(rows, dim, dtype=torch.float32, device="cuda")
    found = newton_schulz(m)
    assert found.dtype == torch.bfloat16
    expected = oracles.orthogonalized(oracles.as_numpy(m), 1)
    # Measured with bfloat16 on a CPU: 3.5e-2; ragged sides are filled up with zeros.
    assert oracles.relative_error(found, expected) < 1e-1


def with_values(values, columns):
    u = torch.linalg.qr(randn(len(values), len(values))).Q
    v = torch.linalg.qr(randn(columns, len(values))).Q
    return (u * values) @ v.mT


@pytest.mark.parametrize(
    "values",
    [torch.logspace(0, -7, 64), (torch.arange(64) < 32).float()],
    ids=["seven decades", "half rank"],
)
@pytest.mark.parametrize("shape", [(64, 300), (300, 64)])
def test_small_values_of_a_wide_matrix(shape, values):
    """Iterated on ``X X^T``, whose rounding is all that is left of the smallest."""
    m = with_values(values.double(), 300)
    m = m if shape[0] < shape[1] else m.mT
    expected = oracles.orthogonalized(oracles.as_numpy(m), 1)
    # Measured: 4e-4, and in float64 1e-12.
    assert oracles.relative_error(newton_schulz(m.float()), expected) < 2e-3
    assert oracles.relative_error(newton_schulz(m), expected) < 1e-11


@pytest.mark.parametrize("shape", [(140, 150), (150, 140), (128, 384)])
def test_nearly_square_matrices_where_the_cpu_has_units_for_bfloat16(shape):
    m = randn(*shape, dtype=torch.float32)
    found = newton_schulz(m)
    narrow = has_fast_bfloat16(m.device)
    assert found.dtype == (torch.bfloat16 if narrow else torch.float32)
    expected = oracles.orthogonalized(oracles.as_numpy(m), 1)
    # Measured: 1.1e-2, without such units 3e-6.
    assert oracles.relative_error(found, expected) < (3e-2 if narrow else 2e-5)
    rows = orthogonalize(Rows(m[None], None), torch.ones(1, shape[0]) > 0)
    assert rows.weight.dtype == torch.float32
    assert oracles.relative_error(rows.weight[0], expected) < (3e-2 if narrow else 2e-5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", [(40, 50), (40, 200)])
def test_scale_of_large_products_does_not_matter(shape, scale):
    m = randn(3, *shape, dtype=torch.float32)
    found = orthogonalize(Rows(m * scale, None), torch.ones(3, 40, dtype=torch.bool))
    for i in range(3):
        expected = oracles.orthogonalized(oracles.as_numpy(m[i]), 1)
        # Measured: 2e-6.
        assert oracles.relative_error(found.weight[i], expected) < 1e-5
