"""Directions do not depend on the size of Y, M or X: all that float32 can hold."""

import copy

import oracles
import pytest
import torch
from cases import PAPER, precondition
from torch import nn

from frog_triton import FROG, ops
from frog_triton.kernels import common
from frog_triton.layers import ConvMap, MatrixMap
from frog_triton.layers.conv import ConvSpec
from frog_triton.linalg.numbers import Numbers
from frog_triton.linalg.rows import Rows
from frog_triton.linalg.scales import REACH, power_of_two
from frog_triton.ops import torch_ops, triton_ops
from frog_triton.preconditioner import solve
from frog_triton.solve import Batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
POWERS = range(-140, 121)
# Triton's interpreter misreads subnormal numbers of bfloat16.
POWERS_OF_16_BITS = POWERS if DEVICE == "cuda" else range(-110, 121)
BACKENDS = {"torch": torch_ops, "triton": triton_ops}
ITERS, DAMPING = 3, 1e-2

both = pytest.mark.parametrize("backend", BACKENDS)
formulations = pytest.mark.parametrize("formulation", ["gram", "primal"])
biases = pytest.mark.parametrize("bias", [True, False])


def randn(*shape, seed=0, dtype=F32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def powers(dtype=F32):
    some = POWERS_OF_16_BITS if dtype == BF16 else POWERS
    return torch.tensor([2.0**e for e in some], dtype=F64).to(DEVICE, dtype)


def worst_row(actual, expected):
    """Largest relative error of a row; infinite where anything is not finite."""
    actual = torch.as_tensor(actual, dtype=F64).cpu().flatten(1)
    expected = torch.as_tensor(expected, dtype=F64).flatten(1)
    errors = (actual - expected).norm(dim=1) / expected.norm(dim=1)
    return float(errors.nan_to_num(float("inf")).max())


@formulations
@both
@biases
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("where", ["y", "m"])
def test_rows_of_any_size(where, dtype, bias, backend, formulation):
    """A row for each power of two."""
    n, d, r = 12, 9, len(powers(dtype))
    x, y = randn(n, d, dtype=dtype), randn(n, r, seed=1, dtype=dtype)
    m, mb = randn(r, d, seed=2), randn(r, seed=3) if bias else None
    if where == "y":
        y = y * powers(dtype)
    else:
        sizes = powers()[:r]
        m, mb = m * sizes[:, None], None if mb is None else mb * sizes
    module = nn.Linear(d, r, bias=bias)
    expected = oracles.precondition(module, x, y, m, mb, DAMPING, ITERS)
    options = {"damping": DAMPING, "cg_iters": ITERS, "formulation": formulation}
    actual = precondition(module, x, y, m, mb, **options, backend=backend)
    # Measured: 4e-6 (weights), 3e-4 (biases: some happen to be small); 1.2e-4 where the
    # kernels multiply samples in bfloat16 with two terms, and there are more of them
    # than weights in a row, in the worst of 261 rows.
    two_terms = dtype == BF16 and (backend, formulation) == ("triton", "gram")
    assert worst_row(actual[0], expected[0]) < (5e-4 if two_terms else 2e-5)
    if bias:
        assert worst_row(actual[1][:, None], expected[1][:, None]) < 1e-3


@formulations
@both
@biases
def test_samples_of_any_size(bias, backend, formulation):
    """A layer for each power of two; they share every launch."""
    n, d, r, layers, iters = 7, 9, 3, len(POWERS), 2
    xs = [randn(n, d) * p for p in powers()]
    y, m, mb = randn(n, r, seed=1), randn(r, d, seed=2), randn(r, seed=3)
    mb = mb if bias else None
    # With a bias beside it, X of some sizes makes an ill-conditioned system.
    damping = 1.0 if bias else DAMPING
    batch = Batch(
        [MatrixMap(x, bias=bias) for x in xs],
        [y.unsqueeze(-1)] * layers,
        [Rows(m.clone(), mb)] * layers,
        numbers=Numbers(damping=damping),
    )
    options = {"cg_iters": iters, "formulation": formulation}
    rows = solve(BACKENDS[backend], batch, **options).rows()
    module = nn.Linear(d, r, bias=bias)
    worst = 0.0
    for x, actual in zip(xs, rows.weight, strict=True):
        expected = oracles.precondition(module, x, y, m, mb, damping, iters)
        worst = max(worst, worst_row(actual, expected[0]))
    assert worst < 2e-5  # measured: 5e-7


@both
@formulations
@pytest.mark.parametrize(
    ("power", "dtype"), [(-140, F32), (64, F32), (120, F32), (-110, BF16), (120, BF16)]
)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_images_of_any_size(groups, power, dtype, formulation, backend):
    """Whole images; depthwise where there are as many groups as channels."""
    module = nn.Conv2d(4, 4, 3, padding=1, groups=groups)
    x = (randn(2, 4, 5, 6) * 2.0**power).to(dtype)
    y = (randn(2, 4, 5, 6, seed=1) * 2.0**-power).to(dtype)
    mb = randn(4, seed=3)
    m = randn(*module.weight.shape, seed=2)
    expected = oracles.precondition(module, x, y, m, mb, DAMPING, ITERS)
    options = {"damping": DAMPING, "cg_iters": ITERS, "formulation": formulation}
    actual = precondition(module, x, y, m, mb, **options, backend=backend)
    # Products of bfloat16 images round their other factor, too.
    limit = 5e-5 if dtype == F32 else 2e-2  # measured: 7e-6, 5e-3
    assert worst_row(actual[0], expected[0]) < limit


@both
@formulations
def test_groups_have_scales_of_their_own(formulation, backend):
    x = randn(3, 6)
    x[:, :3] *= 2.0**-120
    x[:, 3:] *= 2.0**100
    y, m = randn(3, 4, seed=1), randn(4, 3, seed=2)
    rows, numbers = [Rows(m, None)], Numbers(damping=DAMPING)
    batch = Batch([MatrixMap(x, 2)], [y.unsqueeze(-1)], rows, numbers=numbers)
    options = {"cg_iters": ITERS, "formulation": formulation}
    actual = solve(BACKENDS[backend], batch, **options).rows().weight[0]
    for g in range(2):
        of_x, of_r = slice(3 * g, 3 * g + 3), slice(2 * g, 2 * g + 2)
        expected, _ = oracles.precondition(
            nn.Linear(3, 2), x[:, of_x], y[:, of_r], m[of_r], None, DAMPING, ITERS
        )
        assert worst_row(actual[of_r], expected) < 2e-5  # measured: 6e-7


def trained(power, backend, formulation, options, steps=2):
    """Parameters after steps whose loss is multiplied by a power of two."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(DEVICE)
    options = options | {"exclude_output_layer": False, "sample_size": 8}
    opt = FROG(net, backend=backend, formulation=formulation, **options)
    for _ in range(steps):
        opt.zero_grad()
        (net(randn(16, 6)).square().mean() * 2.0**power).backward()
        opt.step()
    assert not opt.anomalies()
    return [p.detach().clone() for p in net.parameters()]


@both
@formulations
@pytest.mark.parametrize(
    ("power", "options"),
    [(p, PAPER) for p in (-100, -60, 58, 62, 64, 70, 115)] + [(-100, {}), (115, {})],
)
def test_a_step_does_not_depend_on_the_size_of_the_loss(
    power, options, formulation, backend
):
    plain = trained(0, backend, formulation, options)
    found = trained(power, backend, formulation, options)
    for ours, theirs in zip(found, plain, strict=True):
        assert torch.equal(ours, theirs)


@both
@formulations
@pytest.mark.parametrize("options", [{}, PAPER, PAPER | {"nesterov": True}])
def test_a_momentum_that_would_overflow_stays_as_it_was(options, formulation, backend):
    net = nn.Linear(4, 3).to(DEVICE)
    options = options | {"exclude_output_layer": False}
    opt = FROG(net, backend=backend, formulation=formulation, **options)
    largest = torch.finfo(F32).max
    counted = 0
    for _ in range(3):
        net(randn(8, 4)).square().sum().backward()
        net.weight.grad[1, 2] = 0.7 * largest
        before, state = copy.deepcopy(net), copy.deepcopy(opt.state_dict()["state"])
        opt.step()
        opt.zero_grad()
        assert all(p.isfinite().all() for p in net.parameters())
        kept = opt.state[net.weight]["momentum_buffer"]
        assert kept.isfinite().all()
        found = sum(a["overflowing_momenta"] for a in opt.anomalies().values())
        if found > counted:
            assert torch.equal(net.weight[1], before.weight[1])
            before = state[0]["momentum_buffer"] if state else torch.zeros_like(kept)
            assert torch.equal(kept[1], before[1])
        counted = found
    assert counted


@both
@formulations
def test_a_dead_row_outlives_its_momentum(formulation, backend):
    """Its momentum decays until it is subnormal, and then nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(DEVICE)
    options = {"momentum": 2.0**-8, "lr": 1e-3, "exclude_output_layer": False}
    options = PAPER | options
    opt = FROG(net, backend=backend, formulation=formulation, **options)
    seen = set()
    for step in range(22):
        opt.zero_grad()
        net(randn(8, 3)).square().sum().backward()
        if step == 1:
            with torch.no_grad():
                net[0].bias[2] = -1e3
        opt.step()
        m = opt.state[net[0].weight]["momentum_buffer"][2].abs().max().item()
        seen.add("zero" if m == 0 else "subnormal" if m < 2.0**-126 else "normal")
        assert all(p.isfinite().all() for p in net.parameters())
    assert seen == {"zero", "subnormal", "normal"} and not opt.anomalies()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_powers_of_two(dtype):
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    values = [1.0, 1.99, 0.3, 5.0, largest, smallest, smallest / 8, 0.0, float("inf")]
    values = torch.tensor(values, dtype=dtype)
    scales = power_of_two(values)
    assert torch.equal(scales[:4], torch.tensor([1, 1, 4, 0.25], dtype=dtype))
    mantissas, _ = torch.frexp(scales)
    assert (mantissas == 0.5).all() and (scales >= smallest).all()
    scaled = (values * scales)[:7]
    assert (scaled[:6] >= 1).all() and (scaled < 4).all() and scaled[6] == 1 / 8
    near = torch.tensor([2.0**REACH, 2.0**-REACH, 3e-5, 7e8], dtype=dtype)
    assert (power_of_two(near, REACH) == 1).all()
    far = torch.tensor([2.0**50, 2.0**-50], dtype=dtype)
    expected = torch.tensor([2.0**-10, 2.0**10], dtype=dtype)
    assert torch.equal(power_of_two(far, REACH), expected)


def images(how, dtype=F32, groups=2):
    x = randn(3, 4, 5, 6, dtype=dtype)
    x[1, 3, 4, 2], x[2, 1, 0, 5] = -50.0, 7.0  # of the second group, of the first
    if how == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif how == "spread":
        x = torch.stack([x, 100 + x], -1)[..., 0]
    elif how == "signals":
        x = x.flatten(2)
    kernel = (3,) * (x.ndim - 2)
    spec = ConvSpec(kernel, *[(1,) * len(kernel)] * 3, groups)
    return ConvMap(x, spec, True)


@pytest.mark.parametrize("how", ["dense", "channels_last", "spread", "signals"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_largest_entry_of_each_group(how, dtype):
    map_ = images(how, dtype)
    (one, two), _ = triton_ops.prepare([map_, map_], [randn(3, 2, 5)] * 2, F32)
    for prepared in (one, two):
        assert prepared.largest.amax(1).tolist() == [7, 50]
    (whole,), _ = triton_ops.prepare([images(how, dtype, 1)], [randn(3, 2, 5)], F32)
    assert whole.largest.amax(1).tolist() == [50]


@pytest.mark.parametrize("size", [1, 4095, 4097, 300_000])
def test_the_largest_entry_wherever_it_lies(size):
    x = torch.full((2, size), 0.25, device=DEVICE)
    x[0, size // 3], x[1, -1] = 3.0, 5.0
    maps = [MatrixMap(row[None]) for row in x]
    prepared, _ = triton_ops.prepare(maps, [randn(1, 1, 1)] * 2, F32)
    assert [float(m.largest.amax()) for m in prepared] == [3.0, 5.0]
    assert all(m.largest.isfinite().all() for m in prepared)


def test_ordinary_samples_are_left_as_they_are():
    for map_ in (MatrixMap(randn(5, 6), 2, True), images("dense")):
        (prepared,), _ = torch_ops.prepare([map_], [randn(5, 2, 1)], F32)
        assert (prepared.scale == 1).all() and prepared.scale.shape == (2,)
    assert common.REACH.value == REACH


def test_backends_are_those_of_the_package():
    assert set(BACKENDS) == {b for b in ops.BACKENDS if b != "auto"}
